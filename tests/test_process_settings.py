"""What a program was compiled for, and finds changed when it is called: numbers of threads, defaults of PyTorch's, modes, processors."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import Replay, Stash, Unrolled, compile_unroll, optim
from adaptrt.backend import Inductor
from adaptrt.backend.inductor import processor
from adaptrt.errors import ModelChanged
from adaptrt.graph.capture import capture
from tests import naive
from tests.tolerances import KERNEL, META_GRADIENT, ROUNDING, assert_close, assert_near

ROOT = Path(__file__).parent.parent


# --- threads

# Compiled for as many threads as there are processors, this ended with a bus error when there were more.
SCRIPT = """
    import os, sys, threading, warnings
    warnings.simplefilter("ignore")
    import torch, torch.nn.functional as F
    from torch import nn
    import adaptrt
    from tests import covering, naive
    counts = [eval(count, {"cpus": os.cpu_count()}) for count in sys.argv[1:]]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))
    support, query = [(torch.randn(512, 32), torch.randn(512, 32)) for _ in range(2)]
    params = list(model.parameters())
    loop = naive.Loop(model, F.mse_loss, naive.sgd, {"lr": 0.1}, 1)
    loss = naive.meta_loss(loop, naive.Start(dict(model.named_parameters()), {}, {}, {}), support, query)
    wanted = [loss, *torch.autograd.grad(loss, params)]
    torch.set_num_threads(counts[0])
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 1, loss=F.mse_loss, backend="inductor")

    def check(count):
        torch.set_num_threads(count)
        loss = unroll(support, query)
        print(max(map(covering.relative_error, [loss, *torch.autograd.grad(loss, params)], wanted)))

    for count in counts:
        check(count)
        other = threading.Thread(target=check, args=[2 * count])
        other.start()
        other.join()
"""


def errors(cache: Path, *counts: str) -> list[float]:
    """Runs an unroll with these numbers of threads one after the other, compiled for the first."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *counts],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] or f"the process ended with {done.returncode}"
    return [float(line) for line in done.stdout.splitlines()]


def test_more_and_fewer_threads_than_a_program_was_compiled_for(tmp_path: Path) -> None:
    found = errors(tmp_path, "cpus", "4 * cpus", "1")
    assert len(found) == 6 and max(found) < META_GRADIENT[torch.float64]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def regions(libraries: list[str]) -> list[str]:
    return [line.strip() for line in "\n".join(libraries).splitlines() if line.strip().startswith("#pragma omp parallel")]


@pytest.mark.parametrize("count", sorted({1, 2, os.cpu_count() or 1}))
def test_every_parallel_region_has_as_many_threads_as_buffers_at_most(
    count: int, libraries: list[str], empty_cache: None, threads: Callable[[int], None]
) -> None:
    threads(count)
    x = torch.randn(1 << 10, 1 << 10, dtype=torch.float64)
    (found,) = Inductor().compile(capture(lambda x: (count + 0.25) * x.square().sum(), x))([x])
    assert_close(found, (count + 0.25) * x.square().sum(), ROUNDING)
    assert set(regions(libraries)) == (
        {f"#pragma omp parallel num_threads(std::min({count}, omp_get_max_threads()))"} if count > 1 else set()
    )
    threads(count + 1)
    libraries.clear()
    Inductor().compile(capture(lambda x: (count + 0.25) * x.square().sum(), x))
    assert any(f"std::min({count + 1}," in region for region in regions(libraries)), "the number is not part of the key on disk"


# --- processors


def test_code_for_one_processor_is_not_loaded_on_another(libraries: list[str], empty_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8)

    def compile_again() -> list[str]:
        libraries.clear()
        (found,) = Inductor().compile(capture(lambda x: (x + 6.5).sin(), x))([x])
        torch.testing.assert_close(found, (x + 6.5).sin())
        return [line for source in libraries for line in source.splitlines() if line.startswith("// For a processor")]

    first = compile_again()
    assert first and "avx512_fp16_of_another" not in first[0]
    monkeypatch.setattr(processor, "instruction_sets", lambda: "avx512_fp16_of_another")
    (line,) = compile_again()
    assert line.endswith("avx512_fp16_of_another")


# --- defaults


class Factories(nn.Module):
    """Makes tensors of the default dtype, on the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * torch.tensor(0.1).sqrt() + torch.linspace(0.1, 0.7, 3)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, dtype=torch.float64, generator=generator), torch.arange(6) % 3


def require_right(unroll: Any, model: nn.Module, k: int = 2) -> None:
    """Compares adaptation, meta-loss and meta-gradient with the oracle under the present settings."""
    support, query = batch(1), batch(2)
    params = dict(model.named_parameters())
    loop = naive.Loop(model, F.cross_entropy, naive.sgd, {"lr": 0.4}, k)
    start = naive.Start(params, {}, dict(model.named_buffers()), {})
    wanted = naive.meta_loss(loop, start, support, query)
    found = unroll(support, query)
    assert_near({"loss": found}, {"loss": wanted})
    grads, wanted_grads = (dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)) for loss in (found, wanted))
    assert_near(grads, wanted_grads)
    assert_near(dict(unroll.adapt(support).params), naive.adapt(loop, start, support).params)


def sgd(model: nn.Module, **options: Any) -> Any:
    return compile_unroll(model, optim.sgd(lr=0.4), 2, loss=F.cross_entropy, **{"backend": "eager", **options})


def test_the_default_dtype_is_part_of_what_a_program_is_for() -> None:
    model = Factories().double()
    unroll = sgd(model)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            require_right(unroll, model)
    finally:
        torch.set_default_dtype(before)
    assert len(unroll.graphs()) == 2 * len(sgd_graphs(model)), "a dtype that was seen before is compiled again"


def sgd_graphs(model: nn.Module) -> dict[str, Any]:
    unroll = sgd(model)
    require_right(unroll, model)
    return unroll.graphs()


def test_what_is_on_disk_is_for_one_default_dtype(empty_cache: None) -> None:
    x = torch.ones(3, dtype=torch.float16)

    def numbers(x: Tensor) -> Tensor:
        return torch.arange(3, device="cpu") * 1.5 + torch.arange(3, device="cpu").sqrt() + x

    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            (found,) = Inductor().compile(capture(numbers, x))([x])
            assert found.dtype is dtype
            assert_close(found, numbers(x), ROUNDING if dtype is torch.float64 else KERNEL)
    finally:
        torch.set_default_dtype(before)


def test_a_default_that_changes_between_a_call_and_its_backward_is_an_error() -> None:
    model = nn.Linear(2, 3).double()
    unroll = sgd(model, adjoint=Replay())
    losses = unroll.adapt(batch(1)).losses
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ModelChanged, match="a default of PyTorch's"):
            losses.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_default_device_that_holds_no_values() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3)).double()
    x, y = torch.arange(6), torch.arange(6) % 3
    schedule = optim.per_step([0.1, 0.2])
    wanted = compile_unroll(model, optim.sgd(lr=schedule), 2, loss=F.cross_entropy, backend="eager").adapt((x, y))
    torch.set_default_device("meta")
    try:
        unroll = compile_unroll(model, optim.sgd(lr=optim.per_step([0.1, 0.2])), 2, loss=F.cross_entropy, backend="eager")
        found = unroll.adapt((x, y))
        assert torch.is_tensor(unroll((x, y), (x, y)))
    finally:
        torch.set_default_device(None)
    assert_near(dict(found.params), dict(wanted.params))
    with torch.device("meta"), torch.device("cpu"):
        assert_near(dict(unroll.adapt((x, y)).params), dict(wanted.params))


def test_a_default_device_of_another_thread_does_not_matter() -> None:
    model = Factories().double()
    unroll = sgd(model)
    entered, leave = threading.Event(), threading.Event()

    def load_a_model() -> None:
        with torch.device("meta"):
            entered.set()
            leave.wait(30)

    require_right(unroll, model)
    graphs = unroll.graphs()
    other = threading.Thread(target=load_a_model)
    other.start()
    try:
        assert entered.wait(30)
        require_right(unroll, model)
    finally:
        leave.set()
        other.join()
    assert unroll.graphs().keys() == graphs.keys()


# --- modes around a call


@contextlib.contextmanager
def set_by(setter: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


def packed(value: Tensor) -> Any:
    return value.detach().numpy().copy()  # of a tensor without values it cannot be made


def unpacked(value: Any) -> Tensor:
    return torch.from_numpy(value)


AROUND: dict[str, Callable[[], Any]] = {
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(packed, unpacked),
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "no hooks on saved tensors": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "anomaly mode without checks": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "deterministic": lambda: set_by(torch.use_deterministic_algorithms, True, False),
    "no oneDNN": lambda: set_by(lambda on: setattr(torch.backends.mkldnn, "enabled", on), False, True),
    "bfloat16 products": lambda: set_by(torch.set_float32_matmul_precision, "medium", "highest"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "flushed denormals": lambda: set_by(torch.set_flush_denormal, True, False),
    "gradients on within gradients off": lambda: combined(torch.no_grad(), torch.enable_grad()),
    "out of inference mode again": lambda: combined(torch.inference_mode(), torch.inference_mode(False)),
}


@contextlib.contextmanager
def combined(*contexts: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("adjoint", [Unrolled(), Stash()], ids=str)
def test_a_mode_around_a_call(around: str, adjoint: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    first_within, first_outside = sgd(model, adjoint=adjoint), sgd(model, adjoint=adjoint)
    require_right(first_outside, model)
    support, query = batch(1), batch(2)
    wanted = torch.autograd.grad(first_outside(support, query), list(model.parameters()))
    for unroll in (first_within, first_outside):
        with warnings.catch_warnings(), AROUND[around]():
            warnings.simplefilter("ignore")  # anomaly mode warns that it is slow
            found = torch.autograd.grad(unroll(support, query), list(model.parameters()))
            unroll.adapt(support)(support[0])
        assert_close(found, wanted, ROUNDING)
        require_right(unroll, model)


def test_modes_around_compiling() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    unroll = sgd(model, backend="inductor")
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True), AROUND["hooks on saved tensors"]():
        warnings.simplefilter("ignore")
        unroll(batch(1), batch(2)).backward()
    require_right(unroll, model)
    assert re.search("inductor", unroll.explain().backend)
