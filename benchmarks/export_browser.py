"""The time of one adaptation in the browser: onnxruntime-web on one thread of WebAssembly, in headless Chromium.

    python -m benchmarks.export_browser [--site build/browser/site] [--calls 100] [--name HARDWARE_DATE]

Two models: that of the page in export/browser, with five symbols of five examples, and a conv4-64 with BatchNorm, 28×28, 5-way 5-shot,
k = 3. Before a time is printed, parameters after the adaptation are compared with a loop of plain PyTorch in float64: all together, by the
norm of the difference. An error may be 1e-5, or twice that of the same loop from images that were changed by a millionth: which of two
inputs a max-pool takes, or whether a ReLU lets one through, can depend on the last bit of a sum, and then all that follows does.

The first calls of a program are slower than those that follow, until Chromium has compiled it well; the first is shown beside the median of
the second half of all calls. Needs what `make browser` made, and Chromium.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

import adaptrt
from benchmarks.export_onnx import conv4
from benchmarks.suite.report import RESULTS, machine, shown_time, table
from export.browser import learner
from export.browser.serve import server
from export.browser.strokes import rasterise, redrawn
from export.browser.symbols import sign

SCRIPT = Path(__file__).parents[1] / "export" / "browser" / "test" / "bench.mjs"
TOLERANCE, TIMES_SHAKEN = 1e-5, 2.0
SHAKEN, NUM_SHAKEN = 1e-6, 4
CONV4_STEPS, CONV4_LR = 3, 0.05


class Case(NamedTuple):
    """An export with its data, and the same adaptation in plain PyTorch."""

    title: str
    folder: str
    data: Mapping[str, Tensor]
    model: nn.Module
    rates: Mapping[str, Sequence[float]]  # of what adapts, one for each step
    loss: Callable[[Callable[..., Tensor], Mapping[str, Tensor]], Tensor]
    bar_s: float


def page_case(site: Path) -> Case:
    weights = load_file(site / "model" / "weights.safetensors")
    model = learner.Recogniser()
    for name, value in model.named_parameters():
        value.data.copy_(weights[f"state.params.{name}"] if f"state.params.{name}" in weights else weights[f"fixed.params.{name}"])
    prefix = "fixed.hyper.lr.numbers.values."
    rates = {name.removeprefix(prefix): value.tolist() for name, value in weights.items() if name.startswith(prefix)}
    generator = np.random.default_rng(0)
    signs = [sign(generator) for _ in range(learner.MAX_SYMBOLS)]
    images = np.stack([rasterise(redrawn(each, generator)) for each in signs for _ in range(learner.MAX_EXAMPLES)])
    data = {
        "support.inputs.0": torch.from_numpy(images)[:, None],
        "support.inputs.1": torch.ones(learner.MAX_SYMBOLS),
        "support.target": torch.arange(learner.ROWS) // learner.MAX_EXAMPLES,
        "support.weights": torch.full((learner.ROWS,), 1 / learner.MAX_EXAMPLES),
    }

    def loss(forward: Callable[..., Tensor], data: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(forward(data["support.inputs.0"], data["support.inputs.1"]), data["support.target"])

    return Case(f"the page's network, {learner.STEPS} steps, 25 examples", "model", data, model, rates, loss, 0.05)


def conv4_case(site: Path) -> Case:
    torch.manual_seed(0)
    model = conv4()
    x, y = torch.randn(learner.ROWS, 1, 28, 28), torch.arange(learner.ROWS) % learner.MAX_SYMBOLS
    optimizer = torch.optim.SGD(model.parameters(), lr=CONV4_LR)
    unroll = adaptrt.compile_unroll(model, optimizer, CONV4_STEPS, loss=F.cross_entropy, backend="eager")
    unroll.export(site / "conv4", (x, y), x[:1], formats="onnx")

    def loss(forward: Callable[..., Tensor], data: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(forward(data["support.inputs"]), data["support.target"])

    rates = {name: [CONV4_LR] * CONV4_STEPS for name, _ in model.named_parameters()}
    return Case(
        "conv4-64, BatchNorm, 28×28, 5-way 5-shot, k = 3", "conv4", {"support.inputs": x, "support.target": y}, model, rates, loss, 0.5
    )


def adapted(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters after all steps, by `torch.autograd.grad`."""
    model = copy.deepcopy(case.model).to(dtype)
    data = {name: value.to(dtype) if value.is_floating_point() else value for name, value in case.data.items()}
    values = {name: value.detach().requires_grad_() for name, value in model.named_parameters() if name in case.rates}
    for step in range(len(next(iter(case.rates.values())))):
        value = case.loss(lambda *inputs: functional_call(model, values, inputs), data)  # noqa: B023 - called at once
        gradients = torch.autograd.grad(value, list(values.values()))
        values = {
            name: (parameter - case.rates[name][step] * gradient).detach().requires_grad_()
            for (name, parameter), gradient in zip(values.items(), gradients, strict=True)
        }
    return {name: value.detach() for name, value in values.items()}


def shaken(case: Case, seed: int) -> Case:
    """The same with images that were changed by a millionth of each pixel."""
    generator = torch.Generator().manual_seed(seed)
    images = next(iter(case.data))
    change = 1 + SHAKEN * torch.randn(case.data[images].shape, generator=generator, dtype=torch.float64)
    return case._replace(data={**case.data, images: case.data[images].double() * change})


def error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The norm of the difference of all parameters together, relative to that of the parameters."""
    apart = sum((found[name].double() - value.double()).square().sum().item() for name, value in wanted.items())
    return (apart / sum(value.double().square().sum().item() for value in wanted.values())) ** 0.5


def measured(case: Case, address: str, calls: int) -> list[str]:
    """A row of the table.

    Raises:
      RuntimeError: the numbers are not those of PyTorch.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data.json").write_text(json.dumps({name: value.flatten().tolist() for name, value in case.data.items()}))
        command = ["node", str(SCRIPT), address, case.folder, str(calls), str(Path(folder) / "data.json")]
        environment = {**os.environ, "CHROMIUM": os.environ.get("CHROMIUM") or shutil.which("chromium") or ""}
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    wanted = adapted(case, torch.float64)
    outputs = {name: torch.tensor(found["outputs"][f"state.params.{name}"]).reshape(value.shape) for name, value in wanted.items()}
    unsteady = max(error(adapted(shaken(case, seed), torch.float64), wanted) for seed in range(NUM_SHAKEN))
    off, allowed = error(outputs, wanted), max(TOLERANCE, TIMES_SHAKEN * unsteady)
    if not off <= allowed:
        raise RuntimeError(f"{case.title}: parameters are off by {off:.0e}, and {allowed:.0e} is allowed")
    times_s = [1e-3 * value for value in found["milliseconds"]]
    median = statistics.median(times_s[calls // 2 :])
    verdict = "reached" if median <= case.bar_s else "**missed**"
    cells = [case.title, f"{off:.0e} of {allowed:.0e}", shown_time(1e-3 * found["load"]), shown_time(times_s[0]), shown_time(median)]
    return [*cells, f"{shown_time(case.bar_s)}: {verdict}", found["browser"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path("build/browser/site"))
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(shutil.copytree(arguments.site, Path(folder) / "site"))
        cases = [page_case(site), conv4_case(site)]
        found = server(site, 0)
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            rows = [measured(case, f"http://127.0.0.1:{found.server_port}/", arguments.calls) for case in cases]
        finally:
            found.shutdown()
            thread.join()
            found.server_close()
    head = ["", "error of those allowed", "loading", "first call", "median", "bar", "Chromium"]
    text = f"{machine()}; onnxruntime-web, one thread; {arguments.calls} calls\n\n{table(head, rows)}\n"
    print(text)
    if arguments.name:
        command = "python -m benchmarks.export_browser " + shlex.join(sys.argv[1:])
        (RESULTS / f"export-browser_{arguments.name}.md").write_text(f"# An adaptation in the browser\n\n    {command}\n\n{text}")


if __name__ == "__main__":
    main()
