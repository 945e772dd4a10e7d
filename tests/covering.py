"""A covering set of numbers for runs of Python in which tests say nothing: `python -O` removes their assertions.

It is a script that raises what it finds: `python -O -m tests.covering`. Each case is a model, an optimiser and an adjoint, whose
adaptation, meta-loss and meta-gradient are compared with the oracle. `--compiled` compiles one of them, too, where that is not refused.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from adaptrt import Adjoint, FirstOrder, Replay, Stash, Unrolled, compile_unroll, higher, optim
from adaptrt.errors import InvalidArgument
from tests import naive
from tests.models import MODELS, Entry

LIMIT = 1e-10
"""Relative error, in float64."""


class Case(NamedTuple):
    model: str
    adjoint: Adjoint
    adam: bool = False
    compiled: bool = False


CASES = (
    Case("mlp", Unrolled(), adam=True, compiled=True),
    Case("mlp", FirstOrder()),
    Case("conv-bn-train", Unrolled()),
    Case("conv-pool", Stash()),
    Case("norms", Replay()),
    Case("gru", Replay()),
    Case("attention", Stash(), adam=True),
    Case("embeddings", Unrolled()),
    Case("tied", Replay()),
    Case("in-place", Unrolled()),
    Case("dict-output", Unrolled()),
    Case("moving-mean", Replay(), adam=True),
)


def compare(case: Case, backend: str) -> float:
    """Returns the largest relative error of a case."""
    entry = MODELS[case.model]
    model, support, query = entry.model(), entry.data(1, 6), entry.data(2, 5)
    opt = optim.adam(lr=0.05) if case.adam else optim.sgd(lr=0.2, momentum=0.5)
    unroll = compile_unroll(model, opt, entry.k, loss=entry.loss, adjoint=case.adjoint, backend=backend)
    params = dict(model.named_parameters())
    adapted, loss = unroll.adapt(support), unroll(support, query)
    found = [loss, *torch.autograd.grad(loss, list(params.values()), allow_unused=True), *adapted.params.values()]

    hyper: dict[str, Any] = {"lr": 0.05} if case.adam else {"lr": 0.2, "momentum": 0.5}
    rule = naive.adam if case.adam else naive.sgd
    loop = naive.Loop(model, entry.loss, rule, hyper, entry.k, first_order=isinstance(case.adjoint, FirstOrder))
    start = naive.Start(params, {}, dict(model.named_buffers()), {})
    after = naive.adapt(loop, start, support)
    loss = naive.meta_loss(loop, start, support, query)
    wanted = [loss, *torch.autograd.grad(loss, list(params.values()), allow_unused=True), *[after.params[name] for name in adapted.params]]
    return max(map(relative_error, found, wanted))


def relative_error(found: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    if found is None or wanted is None:
        known = found if found is not None else wanted
        return 0.0 if known is None else float(known.detach().abs().max())
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-3)


def compare_higher() -> float:
    """As `compare`, of a loop in the style of `higher`."""
    entry: Entry = MODELS["mlp"]
    model, support, query = entry.model(), entry.data(1, 6), entry.data(2, 5)
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(entry.k):
            diffopt.step(entry.loss(fmodel(support[0]), support[1]))
        found = torch.autograd.grad(entry.loss(fmodel(query[0]), query[1]), list(model.parameters()))
    loop = naive.Loop(model, entry.loss, naive.sgd, {"lr": 0.2}, entry.k)
    loss = naive.meta_loss(loop, naive.Start(dict(model.named_parameters()), {}, {}, {}), support, query)
    return max(map(relative_error, found, torch.autograd.grad(loss, list(model.parameters()))))


def refuse() -> float:
    """Returns infinity unless bad input is refused: what is refused must not be left to an assertion."""
    unroll = compile_unroll(nn.Linear(2, 3), optim.sgd(lr=0.1), 1, loss=nn.functional.cross_entropy, backend="eager")
    for labels in (torch.tensor([0, 3]), torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int32)):
        try:
            unroll.adapt((torch.zeros(2, 2), labels))
        except InvalidArgument:
            continue
        return float("inf")
    return 0.0


def main() -> None:
    """Runs all cases.

    Raises:
      SystemExit: one is wrong; it says which.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true")
    compiled = parser.parse_args().compiled
    torch.set_num_threads(1)
    checks: dict[str, Callable[[], float]] = {"higher": compare_higher, "refusals": refuse}
    for case in CASES:
        name = f"{case.model} {type(case.adjoint).__name__}"
        checks[name] = lambda case=case: compare(case, "eager")
        if compiled and case.compiled:
            checks[f"{name}, compiled"] = lambda case=case: compare(case, "inductor")
    errors: dict[str, float] = {}
    for name, check in checks.items():
        errors[name] = check()
    wrong = [f"{name}: relative error {error:.1e}" for name, error in errors.items() if not error <= LIMIT]
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{len(errors)} cases, assertions {'on' if __debug__ else 'off'}, largest error {max(errors.values()):.1e}")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*jit.script_method.*", category=DeprecationWarning)  # while Inductor is imported
        main()
