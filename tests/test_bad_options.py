"""Wrong values of `k`, `adjoint`, `backend` and the other options are refused with an error that names the option."""

from __future__ import annotations

import pytest

from adaptrt import Replay
from adaptrt.errors import InvalidArgument, InvalidType
from tests.bad_input import Attempt, Case, anything, attempt, check_refused, fresh

CASES: list[Case] = [
    *[
        Case(f"k: {k!r}", lambda k=k: attempt(k=k), error, rf"k must be {wanted}, got {got}")
        for k, error, wanted, got in (
            (0, InvalidArgument, "at least 1", "0"),
            (-3, InvalidArgument, "at least 1", "-3"),
            (True, InvalidType, "an int", "bool"),
            (2.0, InvalidType, "an int", "float"),
            ("2", InvalidType, "an int", "str"),
            (None, InvalidType, "an int", "NoneType"),
        )
    ],
    Case("cache_size: 0", lambda: attempt(cache_size=0), InvalidArgument, r"cache_size must be at least 1, got 0"),
    Case(
        "adjoint: unknown string", lambda: attempt(adjoint="replay"), InvalidArgument, r"adjoint must be .*'auto'.*Replay\(.*got 'replay'"
    ),
    Case(
        "adjoint: not one",
        lambda: attempt(adjoint=Replay),
        InvalidType,
        r"adjoint must be 'auto', Unrolled\(\), Replay\(every=n\).*got <class",
    ),
    Case(
        "adjoint: Replay(every=0)",
        lambda: Attempt(lambda: Replay(every=0), ()),
        InvalidArgument,
        r"Replay\(every=0\): every must be an int of at least 1",
    ),
    Case(
        "adjoint: Replay(every=1.5)",
        lambda: Attempt(lambda: Replay(every=anything(1.5)), ()),
        InvalidArgument,
        r"Replay\(every=1\.5\): every must be an int",
    ),
    Case(
        "backend: unknown string",
        lambda: attempt(backend="tvm"),
        InvalidArgument,
        r"backend must be one of 'auto', 'eager', 'inductor', 'cudagraph', got 'tvm'",
    ),
    Case("backend: not one", lambda: attempt(backend=3), InvalidArgument, r"backend must be .*'eager'.*got 3"),
    Case(
        "on_new_shape: unknown",
        lambda: attempt(on_new_shape="warn"),
        InvalidArgument,
        r"on_new_shape must be one of 'compile', 'error', got 'warn'",
    ),
    Case(
        "nonfinite: unknown", lambda: attempt(nonfinite="warn"), InvalidArgument, r"nonfinite must be one of 'error', 'ignore', got 'warn'"
    ),
    Case("loss: not callable", lambda: attempt(loss="cross_entropy"), InvalidType, r"loss must be a function, a module or None, got str"),
    Case("vmap: twice", lambda: fresh(lambda unroll: unroll.vmap().vmap()), InvalidArgument, r"vmap\(\).*has a task axis already"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
