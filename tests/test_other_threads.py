"""What other threads draw at random, and what they set, while one captures: it is theirs, and a capture neither sees nor changes it."""

from __future__ import annotations

import contextlib
import cProfile
import functools
import gc
import queue
import random
import threading
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.random import rand as imported
from torch import Tensor, nn

from adaptrt import compile_unroll
from adaptrt.errors import AdaptrtError, NonFiniteInput, UnsupportedRandomness
from adaptrt.graph.capture import capture
from tests.processes import run_script

DRAWS: dict[str, Callable[[], float]] = {
    "random.random": random.random,
    "random.gauss": lambda: random.gauss(0.0, 1.0),
    "random.randrange": lambda: random.randrange(1 << 30),
    "numpy.random.rand": lambda: float(np.random.rand()),
    "an imported function of NumPy": lambda: float(imported()),
    "NumPy's generator": lambda: float(np.random.mtrand._rand.normal()),  # pyright: ignore[reportAttributeAccessIssue]
    "torch.rand": lambda: float(torch.rand(())),
}
IN_PYTHON = {name: draw for name, draw in DRAWS.items() if name != "torch.rand"}


class Drawing:
    """A thread that draws a number each time it is asked. What it has is behind queues, where a capture does not look for state."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.asks, self.answers, self._drawn = queue.SimpleQueue[bool](), queue.SimpleQueue[bool](), queue.SimpleQueue[float]()
        threading.Thread(target=self._run, args=(draw,), daemon=True).start()

    def _run(self, draw: Callable[[], float]) -> None:
        while self.asks.get():
            self._drawn.put(draw())
            self.answers.put(True)

    def once(self) -> None:
        self.asks.put(True)
        assert self.answers.get(timeout=60)

    def drawn(self) -> list[float]:
        """What it has drawn so far; ends it."""
        self.asks.put(False)
        return [self._drawn.get() for _ in range(self._drawn.qsize())]


class Meanwhile(nn.Module):
    """A linear layer during whose calls another thread draws, and it may do so itself."""

    def __init__(self, other: Drawing | None, draw: Callable[[], object] = bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3, dtype=torch.float64)
        self.asks = None if other is None else other.asks
        self.answers = None if other is None else other.answers
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        if self.asks is not None and self.answers is not None:
            self.asks.put(True)
            assert self.answers.get(timeout=60)
        self.draw()
        return self.linear(x)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def adapted(model: nn.Module, support: tuple[Tensor, Tensor]) -> list[Tensor]:
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), k=2, loss=F.mse_loss, backend="eager")
    return [value.detach() for value in unroll.adapt(support).params.values()]


@contextlib.contextmanager
def seeded() -> Generator[Callable[[], None]]:
    """Gives a function that seeds all generators, and puts them back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    yield seed
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_other_threads_are_neither_refused_nor_rewound(name: str) -> None:
    other = Drawing(DRAWS[name])
    model, support = Meanwhile(other), data()
    with seeded() as seed:
        seed()
        got = adapted(model, support)
        drawn = other.drawn()
        seed()
        assert len(drawn) >= 2 and drawn == [DRAWS[name]() for _ in drawn]
    params = [value.detach().clone().requires_grad_() for value in model.linear.parameters()]
    for _ in range(2):
        grads = torch.autograd.grad(F.mse_loss(F.linear(support[0], *params), support[1]), params)
        params = [(value - 0.1 * grad).detach().requires_grad_() for value, grad in zip(params, grads, strict=True)]
    for value, wanted in zip(got, params, strict=True):
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", IN_PYTHON)
@pytest.mark.parametrize("beside", [None, "random.random", "numpy.random.rand"])
def test_draws_of_the_model_are_refused_beside_others(name: str, beside: str | None) -> None:
    other = None if beside is None else Drawing(DRAWS[beside])
    with seeded() as seed:
        seed()
        with pytest.raises(UnsupportedRandomness, match=r"draw with torch instead"):
            adapted(Meanwhile(other, DRAWS[name]), data())
        if other is not None and beside is not None:
            drawn = other.drawn()
            seed()
            assert drawn[0] == DRAWS[beside]() and len(set(drawn)) == len(drawn) > 1, "nothing was drawn again"


@pytest.mark.parametrize("keep", ["attribute", "closure", "partial", "method of the generator"])
def test_a_function_of_numpy_that_the_model_keeps(keep: str) -> None:
    other = Drawing(DRAWS["numpy.random.rand"])
    draw: Callable[..., Any] = np.random.rand
    if keep == "method of the generator":
        draw = np.random.mtrand._rand.normal  # pyright: ignore[reportAttributeAccessIssue]
    if keep == "partial":
        draw = functools.partial(draw, 2)
    with pytest.raises(UnsupportedRandomness):
        adapted(Meanwhile(other, (lambda: draw()) if keep == "closure" else draw), data())


def test_nothing_is_left_in_numpy() -> None:
    before = dict(vars(np.random))
    with pytest.raises(UnsupportedRandomness):
        capture(lambda x: x * np.random.rand(), torch.zeros(2))
    other = Drawing(DRAWS["numpy.random.rand"])
    capture(lambda x: (other.once(), x.sin())[1], torch.zeros(2))
    assert dict(vars(np.random)) == before


def test_noise_is_planned_once_where_a_capture_traces_twice() -> None:
    support = data()
    losses: list[Tensor] = []
    for other in (Drawing(random.random), None):
        torch.manual_seed(2)
        model = nn.Sequential(Meanwhile(other), nn.Dropout(0.5))
        unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), k=2, loss=F.mse_loss, backend="eager")
        losses.append(unroll.adapt(support, generator=torch.Generator().manual_seed(3)).losses)
    assert torch.equal(*losses)


@pytest.mark.parametrize("draws", [True, False])
def test_a_failing_call_rewinds_only_its_own_draws(draws: bool) -> None:
    """A call that has drawn dropout masks and then fails leaves the generator as it was, unless another thread has drawn meanwhile."""
    other = Drawing(DRAWS["torch.rand"])
    fails: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if not fails.empty():
            if draws:
                other.asks.put(True)
                assert other.answers.get(timeout=60)
            raise KeyError("on purpose")
        return F.mse_loss(output, target)

    model = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), nn.Dropout(0.5))
    support = data()
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), k=1, loss=loss, backend="eager")
    unroll._execution.router.find(support, None, None, True)  # pyright: ignore[reportPrivateUsage]
    before = torch.get_rng_state()
    fails.put(True)
    with pytest.raises((AdaptrtError, KeyError)):
        unroll.adapt(support)
    assert torch.equal(torch.get_rng_state(), before) == (not draws)
    if draws:
        assert float(torch.rand(())) not in other.drawn(), "what the other thread has drawn is not drawn again"


def test_an_invalid_call_draws_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), nn.Dropout(0.5))
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), k=1, loss=F.mse_loss, backend="eager")
    x, y = data()
    unroll.adapt((x, y))
    before = torch.get_rng_state()
    with pytest.raises(NonFiniteInput):
        unroll.adapt((x * float("nan"), y))
    assert torch.equal(torch.get_rng_state(), before)


# --- flags


def threaded(fn: Callable[[], object]) -> None:
    """Runs it in another thread, and waits for that."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            fn()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not raised, raised


FLAGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "gc": (gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
    "gc threshold": (lambda: gc.get_threshold()[0] == 701, lambda value: gc.set_threshold(701 if value else 0, 10, 10)),
    "flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "math": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "memory efficient": (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    "mkldnn": (lambda: torch.backends.mkldnn.enabled, lambda value: setattr(torch.backends.mkldnn, "enabled", value)),  # pyright: ignore
    "mkldnn by flags": (lambda: torch.backends.mkldnn.enabled, lambda value: torch.backends.mkldnn.set_flags(value)),  # pyright: ignore
    "cudnn": (lambda: torch.backends.cudnn.enabled, lambda value: setattr(torch.backends.cudnn, "enabled", value)),
    "fast path": (
        lambda: torch.backends.mha.get_fastpath_enabled(),
        lambda value: torch.backends.mha.set_fastpath_enabled(value),
    ),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("value", [True, False])
def test_what_another_thread_sets_stands_afterwards(name: str, before: bool, value: bool) -> None:
    read, put = FLAGS[name]
    users, thresholds = read(), gc.get_threshold()
    seen: list[Any] = []

    def meanwhile() -> None:
        seen.append(read())
        put(value)
        seen.append(read())

    def fn(x: Tensor) -> Tensor:
        threaded(meanwhile)
        return x.sin()

    try:
        put(before)
        capture(fn, torch.zeros(2))
        assert read() == value
        assert seen[1] == value and (name == "gc threshold" or seen[0] == before), "it reads the user's values"
    finally:
        put(users)
        gc.set_threshold(*thresholds)


def test_a_block_of_another_thread_within_a_capture_and_beyond() -> None:
    """PyTorch's own context managers read flags when they begin and put them back when they end, whichever of these is in a capture."""
    kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    block = contextlib.ExitStack()

    def begin(x: Tensor) -> Tensor:
        threaded(lambda: block.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION)))
        return x.sin()

    def end(x: Tensor) -> Tensor:
        threaded(block.close)
        return x.sin()

    capture(begin, torch.zeros(2))
    assert not torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
    capture(end, torch.zeros(2))
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == kernels


def test_a_capture_keeps_its_kernels_whatever_others_set() -> None:
    """Attention is captured with a second derivative although another thread asks for the flash kernel meanwhile."""

    def fn(x: Tensor) -> Tensor:
        threaded(lambda: torch.backends.cuda.enable_math_sdp(False))
        return F.scaled_dot_product_attention(x, x, x)

    try:
        graph = capture(fn, torch.zeros(1, 2, 4, 8))
        assert not any("flash" in str(node.target) for node in graph.module.graph.nodes)
        assert not torch.backends.cuda.math_sdp_enabled()
    finally:
        torch.backends.cuda.enable_math_sdp(True)


def test_beside_a_profiler() -> None:
    """`cProfile` is a profile function written in C before Python 3.12, which nothing but itself can put back."""
    profiler = cProfile.Profile()
    support = data()
    profiler.enable()
    try:
        adapted(Meanwhile(None), support)
        sorted([3, 1, 2])
    finally:
        profiler.disable()
    names = [entry.code if isinstance(entry.code, str) else entry.code.co_name for entry in profiler.getstats()]
    assert any("sorted" in name for name in names), "it goes on afterwards"


def test_the_first_capture_is_made_in_a_thread_that_ends() -> None:
    """PyTorch 2.11 for CUDA crashes without a GPU if the thread of the first fake tensor has ended."""
    run_script("""
model, unroll = make("eager")
thread = threading.Thread(target=check, args=(model, unroll, 4))
thread.start()
thread.join()
check(model, unroll, 5)
""")
