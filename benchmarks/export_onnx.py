"""The whole adaptation as an ONNX model: seconds of the export, errors, and ONNX Runtime's time of a call beside eager PyTorch's.

    python benchmarks/export_onnx.py [--only NAME ...] [--threads N] [--calls N] [--compiled] [--profile FOLDER] [--name HARDWARE_DATE]

Six kinds of models, in float32. Everything is compared with float64 before anything is timed: the outputs of `adapt_predict`, and the
parameters after `adapt`, all together, each by the norm of the difference relative to its own. An error may be 1e-5, or three times that of
eager PyTorch in float32. The graph in float64 is itself compared with an eager loop of `torch.optim` in float64, where nothing is random.

Seconds of the export are for all four programs, from the unroll to the serialised models: `capture` is PyTorch's run of the model, `write`
the translation. Calls are of `adapt_predict`, by turns with an eager loop of `torch.optim` that starts from the same parameters each time,
and with `--compiled` with adaptrt's own compiled program; medians, and medians of the ratios of neighbouring calls. `--profile` writes
ONNX Runtime's own profile of a few calls, summed by operation, to the screen. The low-rank adapters need `transformers`.
"""

from __future__ import annotations

import argparse
import collections
import copy
import importlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
import adaptrt
from adaptrt import tree
from adaptrt.adjoint import Unrolled
from adaptrt.export.onnx import to_onnx
from benchmarks.suite.contest import by_turns
from benchmarks.suite.report import RESULTS, machine, shown_time, table
from benchmarks.suite.workloads import LowRank, Recurrent, sine_mlp
from tests.exports import error, in_double, inputs_of, programs_of, run_graph, run_session, session, start_of

TOLERANCE, TIMES_EAGER = 1e-5, 3.0
"""How far results may be from float64: so far, or so many times as far as eager PyTorch's in float32."""
MAX_EXPORT_S = 3.0
MAX_TIMES_EAGER, MAX_TIMES_COMPILED = 1.0, 2.0
Batch = tuple[Any, ...]


# --- models


def conv4(width: int = 64, ways: int = 5) -> nn.Module:
    layers: list[nn.Module] = []
    for before in (1, width, width, width):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, ways))


def grouped() -> nn.Module:
    """GroupNorm and SiLU between convolutions with strides, dilation and groups."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1, stride=2), nn.GroupNorm(8, 32), nn.SiLU()),
        *(nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=4), nn.GroupNorm(8, 32), nn.SiLU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)),
    )


class Encoder(nn.Module):
    """PyTorch's own transformer encoder over embedded tokens."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(32, 64), nn.Parameter(0.1 * torch.randn(16, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=dropout, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x) + self.positions).mean(1))


class Bert(nn.Module):
    """A small BERT whose queries and values get low-rank adapters; the rest is frozen but for the head."""

    def __init__(self) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=16
        )
        self.bert = transformers.BertModel(config).eval().requires_grad_(False)
        for layer in self.bert.encoder.layer:
            for name in ("query", "value"):
                setattr(layer.attention.self, name, LowRank(64, 64, 4))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bert(x).pooler_output)


class Case(NamedTuple):
    """A model with its optimiser, data and loss."""

    title: str
    make: Callable[[], nn.Module]
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    k: int
    inputs: Callable[[Generator, int], Tensor]
    counts: tuple[int, int]
    num_classes: int = 5
    eval_mode: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        return model.eval() if self.eval_mode else model

    def data(self) -> tuple[Batch, Batch]:
        generator = Generator().manual_seed(1)

        def batch(count: int) -> Batch:
            x = self.inputs(generator, count)
            return x, torch.arange(count) % self.num_classes if self.num_classes else torch.sin(x)

        return batch(self.counts[0]), batch(self.counts[1])

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.cross_entropy if self.num_classes else F.mse_loss


def normal(*shape: int) -> Callable[[Generator, int], Tensor]:
    return lambda generator, count: torch.randn(count, *shape, generator=generator)


def tokens(size: int, length: int) -> Callable[[Generator, int], Tensor]:
    return lambda generator, count: torch.randint(size, (count, length), generator=generator)


def sgd(lr: float, momentum: float = 0.0) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum)


def adam(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


CASES = {
    "sine": Case("sine MLP 1-40-40-1, SGD, k = 5", sine_mlp, sgd(0.01), 5, normal(1), (10, 10), num_classes=0),
    "conv4-momentum": Case("conv4-64, BatchNorm, max-pool, momentum, k = 3", conv4, sgd(0.05, 0.9), 3, normal(1, 28, 28), (25, 75)),
    "conv4-adam": Case("conv4-64, BatchNorm, max-pool, Adam, k = 3", conv4, adam, 3, normal(1, 28, 28), (25, 75)),
    "grouped": Case("GroupNorm, SiLU, dilation, groups, momentum, k = 3", grouped, sgd(0.05, 0.9), 3, normal(3, 32, 32), (10, 15)),
    "transformer": Case("transformer encoder, Adam, k = 2", lambda: Encoder(0.0), adam, 2, tokens(32, 16), (10, 15)),
    "transformer-dropout": Case("the same with dropout", lambda: Encoder(0.1), adam, 2, tokens(32, 16), (10, 15)),
    "lstm": Case("LSTM, 12 time steps, SGD, k = 3", lambda: Recurrent(8, 32, 3), sgd(0.1), 3, normal(12, 8), (9, 6), num_classes=3),
    "bert-lora": Case("small BERT, low-rank adapters, Adam, k = 2", Bert, adam, 2, tokens(64, 16), (10, 15), eval_mode=True),
}


# --- references


def _adapting(model: nn.Module) -> list[Tensor]:
    return [value for value in model.parameters() if value.requires_grad]


def eager_loop(case: Case, model: nn.Module, support: Batch, query: Tensor) -> Callable[[], Tensor]:
    """k steps of `torch.optim` and a prediction, from the same parameters and buffers at each call."""
    model = copy.deepcopy(model)
    values = [*model.parameters(), *model.buffers()]
    start = [value.detach().clone() for value in values]

    def call() -> Tensor:
        with torch.no_grad():
            for value, first in zip(values, start, strict=True):
                value.copy_(first)
        opt = case.optimizer(_adapting(model))
        for _ in range(case.k):
            opt.zero_grad()
            case.loss(model(support[0]), support[1]).backward()
            opt.step()
        with torch.no_grad():
            return model(query)

    return call


def _double(value: Any) -> Any:
    return tree.map_leaves(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, value)


def unroll_of(case: Case, model: nn.Module, backend: str) -> adaptrt.CompiledUnroll:
    opt = case.optimizer(_adapting(model))
    return adaptrt.compile_unroll(model, opt, case.k, loss=case.loss, adjoint=Unrolled(), backend=backend)


# --- measuring


class Exported(NamedTuple):
    """The models, and what their export took."""

    unroll: adaptrt.CompiledUnroll
    programs: dict[str, Any]
    models: dict[str, Any]
    capture_s: float
    write_s: float


def export(case: Case, model: nn.Module, support: Batch, query: Tensor) -> Exported:
    unroll = unroll_of(case, model, "eager")
    began = time.perf_counter()
    programs = programs_of(unroll, support, query)
    captured = time.perf_counter()
    models = {name: to_onnx(program.graph, name) for name, program in programs.items()}
    for value in models.values():
        value.SerializeToString()
    return Exported(unroll, programs, models, captured - began, time.perf_counter() - captured)


class Checked(NamedTuple):
    """An error, the one that is allowed, and whether it is within that."""

    found: float
    allowed: float

    def shown(self) -> str:
        return f"{self.found:.0e} of {self.allowed:.0e}" + ("" if self.found <= self.allowed else " BAR MISSED")


def check(case: Case, exported: Exported, support: Batch, query: Tensor, num_threads: int) -> list[Checked]:
    """Compares outputs and parameters with float64.

    Raises:
      RuntimeError: the reference itself is off.
    """
    model = copy.deepcopy(case.model()).double()
    doubled = programs_of(unroll_of(case, model, "eager"), _double(support), _double(query))
    found: list[Checked] = []
    for name, data, prefix in (("adapt_predict", (support, query), "result.0"), ("adapt", (support,), "result.0.params")):
        program = exported.programs[name]
        inputs = inputs_of(program, start_of(exported.unroll), data)
        wanted = run_graph(doubled[name].graph, in_double(doubled[name], inputs))
        if name == "adapt_predict" and not program.noise:
            loop = eager_loop(case, model, _double(support), _double(query))()
            off = error({"result.0": wanted["result.0"]}, {"result.0": loop})
            if off > 1e-8:
                raise RuntimeError(f"{case.title}: the graph in float64 is off by {off:.0e} from an eager loop")
        eager = error(run_graph(program.graph, inputs), wanted, prefix)
        got = run_session(session(exported.models[name], num_threads), inputs)
        found.append(Checked(error(got, wanted, prefix), max(TOLERANCE, TIMES_EAGER * eager)))
    return found


def of_runtime(exported: Exported, support: Batch, query: Tensor, num_threads: int) -> Callable[[], Any]:
    program = exported.programs["adapt_predict"]
    inputs = inputs_of(program, start_of(exported.unroll), (support, query))
    ready = session(exported.models["adapt_predict"], num_threads)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    return lambda: ready.run(None, feeds)


def profile(exported: Exported, support: Batch, query: Tensor, num_threads: int, folder: Path) -> str:
    """Milliseconds of a call by kind of operation, as ONNX Runtime counts them; the full trace goes to `folder`."""
    program = exported.programs["adapt_predict"]
    inputs = inputs_of(program, start_of(exported.unroll), (support, query))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = num_threads, True
    options.profile_file_prefix = str(folder / "onnxruntime")
    ready = onnxruntime.InferenceSession(exported.models["adapt_predict"].SerializeToString(), options)
    feeds, count = {name: value.numpy() for name, value in inputs.items()}, 5
    for _ in range(count):
        ready.run(None, feeds)
    times: dict[str, float] = collections.defaultdict(float)
    numbers: dict[str, int] = collections.defaultdict(int)
    for event in json.loads(Path(ready.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]] += event["dur"] / count / 1e3
            numbers[event["args"]["op_name"]] += 1
    ordered = sorted(times, key=times.__getitem__, reverse=True)
    return table(["operation", "ms", "nodes"], [[name, f"{times[name]:.2f}", str(numbers[name] // count)] for name in ordered])


def measured(name: str, args: argparse.Namespace) -> list[str]:
    """One row of the table."""
    case = CASES[name]
    model, (support, (query, _)) = case.model(), case.data()
    exported = export(case, model, support, query)
    errors = check(case, exported, support, query, args.threads)
    if args.profile:
        print(f"\n{case.title}\n\n{profile(exported, support, query, args.threads, args.profile)}\n")
    calls = {"eager": eager_loop(case, model, support, query), "onnx": of_runtime(exported, support, query, args.threads)}
    if args.compiled:
        compiled = unroll_of(case, model, "auto")
        calls["adaptrt"] = lambda: compiled.adapt(support)(query)
        calls["adaptrt"]()
    times = by_turns(calls, args.calls, warm_up=3)
    medians = {key: statistics.median(values) for key, values in times.items()}
    export_s = exported.capture_s + exported.write_s
    cells = [
        case.title,
        f"{export_s:.1f} s ({exported.capture_s:.1f} + {exported.write_s:.1f})" + _missed(export_s, MAX_EXPORT_S),
        " / ".join(str(len(exported.models[key].graph.node)) for key in ("adapt", "adapt_predict", "predict", "loss")),
        *[entry.shown() for entry in errors],
        *[shown_time(medians[key]) for key in ("onnx", "eager")],
        _ratio(times["onnx"], times["eager"], MAX_TIMES_EAGER),
    ]
    if args.compiled:
        bar = MAX_TIMES_COMPILED if name.startswith("conv4") else float("inf")
        cells += [shown_time(medians["adaptrt"]), _ratio(times["onnx"], times["adaptrt"], bar)]
    return cells


def _ratio(ours: Sequence[float], others: Sequence[float], bar: float) -> str:
    found = statistics.median(a / b for a, b in zip(ours, others, strict=True))
    return f"{found:.2f}{_missed(found, bar)}"


def _missed(found: float, bar: float) -> str:
    return "" if found <= bar else f" BAR MISSED ({bar:g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--name")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[list[str]] = []
    for name in args.only:
        try:
            rows.append(measured(name, args))
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
        else:
            print(" | ".join(rows[-1]), flush=True)
    head = ["", "export (capture + write)", "nodes: adapt / adapt_predict / predict / loss", "error of outputs", "of parameters"]
    head += ["ONNX Runtime", "eager", "×"] + (["adaptrt compiled", "×"] if args.compiled else [])
    text = f"{machine()}, ONNX Runtime {onnxruntime.__version__}; float32, medians of {args.calls} calls\n\n{table(head, rows)}\n"
    print(f"\n{text}")
    if args.name:
        command = "python benchmarks/export_onnx.py " + shlex.join(sys.argv[1:])
        (RESULTS / f"export-onnx_{args.name}.md").write_text(f"# Adaptations as ONNX models\n\n    {command}\n\n{text}")


if __name__ == "__main__":
    main()
