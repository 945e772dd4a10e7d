"""A contest: numbers are compared with the oracle first, then all contestants are timed by turns in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite.contestants import ENTRANTS, Contestant, Entrant, first_calls, loop, loop_in_bfloat16
from benchmarks.suite.workloads import Workload

NUM_TURNS = 20
QUANTITIES = ("adapt", "predict", "meta")
TOLERANCE, TIMES_EAGER = 1e-5, 20.0
"""An error in float32 may be as large as the one, or as so many times that of the eager loop in float32."""
TOLERANCE_IN_FLOAT64 = 1e-8
"""Where it is larger, the contestant must be this near in float64: then it computes the same, and rounding has turned some ReLU."""
TOLERANCE_IN_BFLOAT16, TIMES_AUTOCAST = 5e-2, 3.0
MAX_IN_BFLOAT16 = 0.5
"""In mixed precision an error may be as large as the one, or as so many times that of the eager loop under autocast, up to the last."""


class Result(NamedTuple):
    """What one contestant did on one quantity.

    Attributes:
      error: largest difference from the oracle in float64 in an array, relative to the array's largest element.
      compile_s: seconds of the first call.
      times_s: of every call, in the order in which they were made; calls of the same index are neighbours.
    """

    error: float
    compile_s: float
    times_s: Sequence[float]


def times_longer(found: Mapping[str, Result], name: str) -> dict[str, float]:
    """How many times longer than this contestant each one takes: the median over neighbouring calls."""
    own = found[name].times_s
    return {other: statistics.median(a / b for a, b in zip(result.times_s, own, strict=True)) for other, result in found.items()}


class WrongNumbers(RuntimeError):
    """A contestant differs from the oracle; the contest is off before anything is timed."""

    def __init__(self, contestant: str, workload: Workload, quantity: str, how_far: str) -> None:
        super().__init__(f"{workload.name}, {quantity}: {contestant} is off by {how_far}")
        self.contestant = contestant


def without_tf32() -> None:
    """On a GPU float32 means float32 for all: convolutions, too, which PyTorch rounds to TF32 unless told not to."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def error(found: Sequence[Any], expected: Sequence[Tensor]) -> float:
    """As in `Result.error`.

    >>> error([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 5.0])])
    0.2
    """
    tensors = [value if isinstance(value, Tensor) else torch.from_numpy(np.array(value)) for value in found]
    return max(float((a.cpu().double() - b.cpu()).abs().max() / b.abs().max()) for a, b in zip(tensors, expected, strict=True))


def by_turns(
    calls: Mapping[str, Callable[[], Any]], count: int, warm_up: int, wait: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call, `count` of each; the garbage collector rests meanwhile.

    A turn is a twentieth of the calls. Where calls take microseconds it is several: as in a loop, the processor's caches then hold what the
    contestant needs, and not what its rival has just left there.

    Args:
      calls: by contestant.
      count: calls of each.
      warm_up: calls of each that are not timed.
      wait: waits for the device, which is part of a call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn = max(1, count // NUM_TURNS)
    gc.collect()
    gc.disable()
    try:
        for begin in range(-warm_up, count, turn):
            for name, call in calls.items():
                for index in range(begin, min(begin + turn, count)):
                    began = time.perf_counter()
                    call()
                    wait()
                    if index >= 0:
                        times[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return times


def enter(
    workload: Workload, names: Sequence[str], quantities: Sequence[str] = QUANTITIES, entrants: Mapping[str, Entrant] = ENTRANTS
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants, compiled, and for those that stay away the reason."""
    absent = {name: reason for name in names if (reason := entrants[name].reason_against(workload))}
    here: dict[str, Contestant] = {}
    for name in names:
        if name not in absent:
            calls = entrants[name].make(workload, torch.float32)
            here[name] = first_calls({quantity: calls[quantity] for quantity in quantities})
    return here, absent


def contest(
    workload: Workload,
    names: Sequence[str],
    quantities: Sequence[str] = QUANTITIES,
    share: float = 1.0,
    entrants: Mapping[str, Entrant] = ENTRANTS,
) -> dict[str, dict[str, Result]]:
    """Results by quantity and contestant.

    Args:
      workload: on what.
      names: keys of `entrants`.
      quantities: which to measure.
      share: of the workload's number of calls.
      entrants: who may compete.
    Raises:
      WrongNumbers: a contestant's error is too large.
    """
    here, _ = enter(workload, names, quantities, entrants)
    count = max(3, round(share * workload.calls))
    wait = torch.cuda.synchronize if workload.device == "cuda" else lambda: None
    results: dict[str, dict[str, Result]] = {}
    errors = check(workload, here, quantities, entrants)
    for quantity in quantities:
        times = by_turns({name: entrant.calls[quantity] for name, entrant in here.items()}, count, max(1, count // 10), wait)
        results[quantity] = {name: Result(errors[quantity][name], here[name].compile_s[quantity], times[name]) for name in here}
    return results


def check(
    workload: Workload, here: Mapping[str, Contestant], quantities: Sequence[str], entrants: Mapping[str, Entrant] = ENTRANTS
) -> dict[str, dict[str, float]]:
    """The error of each contestant by quantity.

    Raises:
      WrongNumbers: one is too large.
    """
    eager, oracle = loop(workload), loop(workload, torch.float64)
    mixed = loop_in_bfloat16(workload) if any(entrants[name].in_bfloat16 for name in here) else {}
    errors: dict[str, dict[str, float]] = {quantity: {} for quantity in quantities}
    for name, contestant in here.items():
        entrant = entrants[name]
        own = entrant.oracle(workload)
        suspect: list[str] = []
        for quantity in quantities:
            found = error(contestant.calls[quantity](), own[quantity]())
            errors[quantity][name] = found
            if entrant.in_bfloat16:
                autocast = error(mixed[quantity](), oracle[quantity]())
                # Zeros are off by 1.
                allowed = min(MAX_IN_BFLOAT16, max(TOLERANCE_IN_BFLOAT16, TIMES_AUTOCAST * autocast))
                if not found <= allowed:
                    raise WrongNumbers(name, workload, quantity, f"{found:.1e}, where autocast is by {autocast:.1e}")
                continue
            if not found <= max(TOLERANCE, TIMES_EAGER * error(eager[quantity](), oracle[quantity]())):
                suspect.append(quantity)
        exact = entrant.make(workload, torch.float64) if suspect else {}
        for quantity in suspect:
            found = error(exact[quantity](), own[quantity]())
            if not found <= TOLERANCE_IN_FLOAT64:
                raise WrongNumbers(name, workload, quantity, f"{errors[quantity][name]:.1e} in float32 and {found:.1e} in float64")
    return errors
