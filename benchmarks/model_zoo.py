"""Adapts small models of well-known packages, and compares the meta-gradient with an eager loop in float64.

    python benchmarks/model_zoo.py [--only WORD] [--markdown FILE] [--errors] [--check]

The models have random weights; nothing is downloaded. A package that is not installed is reported as such. The eager backend is used, as
capture decides what a model may do. Two steps of SGD are taken. The model stays in the mode in which it is built, mostly that of training.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
import adaptrt
from benchmarks.zoo import language, vision
from benchmarks.zoo.entry import ZOO, Case, Entry
from tests import naive

DECLARED = (language, vision)  # importing them fills ZOO
LR = 1e-2
K = 2
LIMIT_S = 120
TOLERANCE = 1e-10
NOT_TRIED = ("not installed", "cannot be imported")


class Row(NamedTuple):
    """What came of a model.

    Attributes:
      entry: the model.
      outcome: "right", "wrong", "refused", "plain PyTorch fails", "failed", "too slow", "not installed", or "cannot be imported".
      detail: the relative error, or the error's type and first line.
      seconds: until the first adaptation; none where there was none.
    """

    entry: Entry
    outcome: str
    detail: str = ""
    seconds: float | None = None


class TooSlow(BaseException):
    """A model took longer than the limit. No `Exception`, as code in between may catch those."""


@contextlib.contextmanager
def at_most(seconds: int) -> Generator[None]:
    """Interrupts the block after so many seconds."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(entry: Entry, show_errors: bool = False) -> Row:
    """Builds a model, adapts it both ways and compares."""
    if importlib.util.find_spec(entry.package) is None:
        return Row(entry, "not installed")
    stage = "plain PyTorch fails"
    try:
        with at_most(LIMIT_S), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                case = built(entry)
            except (ImportError, OSError) as reason:  # a package that was built for another PyTorch or another device
                return Row(entry, "cannot be imported", first_line(reason))
            support, query = case.batch(), case.batch()
            wanted = by_loop(built(entry), support, query)  # of its own, as a model may keep something
            stage = "failed"
            start = time.perf_counter()
            got, seconds = by_adaptrt(case, support, query, start)
        error = worst(got, wanted)
        return Row(entry, "right" if error <= TOLERANCE else "wrong", f"{error:.0e}", seconds)
    except TooSlow as reason:
        return Row(entry, "too slow", f"{stage}: {reason}")
    except adaptrt.errors.AdaptrtError as reason:
        outcome, first = "refused", reason
    except Exception as reason:
        outcome, first = stage, reason
    if show_errors:
        traceback.print_exception(first)
    return Row(entry, outcome, first_line(first))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def built(entry: Entry) -> Case:
    torch.manual_seed(0)
    case = entry.make()
    case.model.double()
    return case


def by_loop(case: Case, support: tuple[object, ...], query: tuple[object, ...]) -> dict[str, Tensor]:
    """Adapted parameters, meta-loss and meta-gradient of the oracle."""
    for part in case.model.modules():  # PyTorch's checkpointing computes again after functional_call has put the old parameters back
        for flag in ("gradient_checkpointing", "memory_efficient"):
            if getattr(part, flag, False) is True:
                setattr(part, flag, False)
    params = {name: value for name, value in case.model.named_parameters() if value.requires_grad}
    frozen = {name: value for name, value in case.model.named_parameters() if not value.requires_grad}
    loop = naive.Loop(case.model, case.loss, naive.sgd, {"lr": LR}, K)
    start = naive.Start(params, frozen, dict(case.model.named_buffers()), {})
    after = naive.adapt(loop, start, support)
    loss, _ = naive.evaluate(loop, {**after.frozen, **after.params}, after.buffers, query)
    return flat(after.params, loss, params)


def by_adaptrt(case: Case, support: tuple[object, ...], query: tuple[object, ...], start: float) -> tuple[dict[str, Tensor], float]:
    """The same of adaptrt, and the seconds until the first adaptation."""
    unroll = adaptrt.compile_unroll(case.model, adaptrt.optim.sgd(lr=LR), K, loss=case.loss, backend="eager")
    adapted = unroll.adapt(support)
    seconds = time.perf_counter() - start
    params = {name: value for name, value in case.model.named_parameters() if value.requires_grad}
    return flat(adapted.params, unroll(support, query), params), seconds


def flat(adapted: Mapping[str, Tensor], loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    found = {f"gradient of {name}": torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), grads, strict=True)}
    return {"loss": loss.detach(), **{f"adapted {name}": value.detach() for name, value in adapted.items()}, **found}


def worst(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest error, relative to the largest number of its kind: the loss, all that is adapted, the whole gradient."""
    if not all(bool(torch.isfinite(value).all()) for value in (*got.values(), *wanted.values())):
        return float("inf")
    kinds = {name: name.split()[0] for name in wanted}
    largest = {kind: max(float(value.abs().max()) for name, value in wanted.items() if kinds[name] == kind) for kind in set(kinds.values())}
    return max(float((got[name] - value).abs().max()) / (largest[kinds[name]] or 1.0) for name, value in wanted.items())


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| package | model | outcome | relative error, or the error | first adapt |", "|---|---|---|---|---|"]
    for row in rows:
        package = row.entry.package
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package += f" {importlib.metadata.version(package)}"
        seconds = "" if row.seconds is None else f"{row.seconds:.1f} s"
        lines.append(f"| {package} | {row.entry.name} | {row.outcome} | {row.detail.replace('|', '/')} | {seconds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="models whose package and name contain this")
    parser.add_argument("--markdown", type=Path, help="write the table here, too")
    parser.add_argument("--errors", action="store_true", help="print where errors were raised")
    parser.add_argument("--check", action="store_true", help="fail where an outcome is not the one that is known for the model")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    rows: list[Row] = []
    for entry in ZOO:
        if options.only.lower() in f"{entry.package} {entry.name}".lower():
            rows.append(run(entry, options.errors))
            print(
                f"{entry.package:16} {entry.name:44} {rows[-1].outcome:10} {rows[-1].seconds or 0:6.1f} s  {rows[-1].detail[:300]}",
                flush=True,
            )
    text = table(rows)
    print(f"\nPyTorch {torch.__version__}\n\n{text}")
    if options.markdown:
        options.markdown.write_text(text)
    unexpected = [row for row in rows if row.outcome not in (row.entry.expected, *NOT_TRIED)]
    if options.check and unexpected:
        sys.exit("\n".join(f"{row.entry.package}, {row.entry.name}: {row.outcome}, not {row.entry.expected}" for row in unexpected))


if __name__ == "__main__":
    main()
