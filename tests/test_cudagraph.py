"""Backend `cudagraph`: every call one launch, with the numbers of its programs run one by one, and nothing that one call leaves to another.

On the CPU a recorder of `tests/recorders.py` stands in for CUDA's; where there is a GPU the same tests run on it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, CudaGraph, Eager, FirstOrder, Inductor, Replay, Stash, Unrolled, compile_unroll, optim, tree
from adaptrt.backend.cudagraph import CudaRecorder
from adaptrt.backend.launch import Launcher
from adaptrt.errors import (
    CannotRecord,
    InvalidArgument,
    LabelOutOfRange,
    NonFiniteInput,
    NotDifferentiable,
    OutOfDeviceMemory,
    RecordingFailed,
    UnsupportedParameter,
)
from adaptrt.graph.capture import capture
from tests.models import MODELS, regress
from tests.recorders import TapeRecorder


class Place:
    """Where a test runs, and the recorders that unrolls there were given."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.recorders: list[Any] = []
        self.backend = CudaGraph(Eager(), self._recorder)

    def _recorder(self, device: torch.device) -> Any:
        recorder = (CountedCuda if device.type == "cuda" else TapeRecorder)(device)
        self.recorders.append(recorder)
        return recorder

    @property
    def launches(self) -> int:
        return sum(recorder.launches for recorder in self.recorders)

    @property
    def recordings(self) -> int:
        return sum(recorder.recordings for recorder in self.recorders)

    @property
    def tape(self) -> TapeRecorder:
        """The last recorder; for tests of the CPU only."""
        return self.recorders[-1]

    def put(self, part: Any) -> Any:
        return tree.map_leaves(lambda value: value.to(self.device), part)


class CountedCuda(CudaRecorder):
    """Counts."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.launches = self.recordings = 0

    def record(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        outputs, launch = super().record(run)
        self.recordings += 1

        def counted() -> None:
            self.launches += 1
            launch()

        return outputs, counted


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    yield Place(request.param)


@pytest.fixture
def on_cpu() -> Place:
    return Place("cpu")


ADJOINTS: dict[str, Adjoint] = {
    "unrolled": Unrolled(),
    "replay": Replay(),
    "replay2": Replay(every=2),
    "stash": Stash(),
    "first-order": FirstOrder(),
}
TASKS = 2


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for got, expected in zip(found, wanted, strict=True):
        if got.device.type == "cpu":
            assert torch.equal(got, expected)  # the same operations in the same order
        else:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def all_of(unroll: CompiledUnroll, model: nn.Module, support: Any, query: Any, seed: int) -> list[Tensor]:
    """What every kind of call returns."""
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(seed)
    loss = unroll(support, query)
    results = [loss, *[g for g in torch.autograd.grad(loss, params, allow_unused=True) if g is not None]]
    adapted = unroll.adapt(support)
    results += [adapted.losses, *adapted.params.values(), *adapted.buffers.values(), *tree.leaves(adapted.opt_state)]
    outputs = [value for value in tree.leaves(adapted(query[0])) if value.is_floating_point()]
    through = torch.autograd.grad(sum(value.square().sum() for value in outputs), params, allow_unused=True)  # type: ignore[arg-type]
    results += [*outputs, *[g for g in through if g is not None]]
    with torch.inference_mode():
        served = unroll.adapt(support)
        results += [*served.params.values(), *tree.leaves(served(query[0])), unroll(support, query)]
    return [value.detach() for value in results]


def stacked(entry: Any, seed: int, n: int) -> Any:
    parts = [tree.flatten(entry.data(seed + task, n)) for task in range(TASKS)]
    return tree.unflatten(parts[0][1], [torch.stack(rows) for rows in zip(*(leaves for leaves, _ in parts), strict=True)])


CELLS = [
    *(("mlp", adjoint, False) for adjoint in ADJOINTS),
    *(("mlp", adjoint, True) for adjoint in ADJOINTS),
    *((name, "stash", False) for name in ("conv-bn-train", "dropout", "attributes", "dict-output")),
    *((name, "replay2", False) for name in ("conv-bn-train", "dict-inputs", "moving-mean-live")),
    ("dropout", "unrolled", True),
]


@pytest.mark.parametrize(("model_name", "adjoint", "tasks"), CELLS, ids=lambda value: str(value))
def test_calls_are_one_launch_with_the_same_numbers(model_name: str, adjoint: str, tasks: bool, place: Place) -> None:
    if model_name == "attributes" and place.device.type == "cuda":
        pytest.skip("its tensor attribute stays on the CPU")
    entry = MODELS[model_name]
    model = entry.model().to(place.device)
    settings: Any = {"loss": entry.loss, "params": entry.select, "adjoint": ADJOINTS[adjoint]}
    recorded, plain = (
        compile_unroll(model, optim.sgd(lr=0.1, momentum=0.9), 2, backend=backend, **settings) for backend in (place.backend, Eager())
    )
    if tasks:
        recorded, plain = recorded.vmap(), plain.vmap()
    for seed in range(3):
        make = stacked if tasks else lambda entry, seed, n: entry.data(seed, n)
        support, query = place.put(make(entry, 10 * seed, 4)), place.put(make(entry, 10 * seed + 5, 3))
        before = place.launches
        found = all_of(recorded, model, support, query, seed)
        # meta-gradient, adapt, predict, their two pullbacks; adapt, predict and meta-loss without gradients.
        assert place.launches - before == 8
        same(found, all_of(plain, model, support, query, seed))
    assert place.recordings == 7  # prediction is the same with and without gradients


def test_noise_and_numbers_change_without_another_recording(place: Place) -> None:
    entry = MODELS["dropout"]
    model = entry.model().to(place.device)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    recorded, plain = (compile_unroll(model, opt, 2, loss=entry.loss, adjoint=Replay(), backend=b) for b in (place.backend, Eager()))
    support, query = place.put(entry.data(0, 4)), place.put(entry.data(1, 3))
    losses: list[Tensor] = []
    for seed, lr in ((1, 0.1), (2, 0.1), (2, 0.3)):
        opt.param_groups[0]["lr"] = lr
        torch.manual_seed(seed)
        loss = recorded(support, query)
        torch.manual_seed(seed)
        same([loss.detach()], [plain(support, query).detach()])
        losses.append(loss.detach())
    assert place.recordings == 1 and len({float(loss) for loss in losses}) == 3


def test_parameters_and_state_are_read_at_every_call(place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    recorded, plain = (compile_unroll(model, opt, 2, loss=entry.loss, backend=b) for b in (place.backend, Eager()))
    support, query = place.put(entry.data(0, 4)), place.put(entry.data(1, 3))
    for _ in range(3):
        recorded(support, query).backward()
        same([recorded(support, query).detach()], [plain(support, query).detach()])
        opt.step()
        opt.zero_grad()


def test_what_a_caller_keeps_does_not_change(place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, adjoint=Stash(), backend=place.backend)
    kept: list[tuple[list[Tensor], list[Tensor]]] = []
    for seed in range(3):
        found = all_of(unroll, model, place.put(entry.data(seed, 4)), place.put(entry.data(9 + seed, 3)), seed)
        kept.append((found, [value.clone() for value in found]))
    for found, copies in kept:
        same(found, copies)
    places = [value.untyped_storage().data_ptr() for found, _ in kept for value in found]
    assert len(set(places)) == len(places), "results share memory"
    given = place.put(entry.data(0, 4))
    before = [value.clone() for value in tree.leaves(given)]
    unroll.adapt(given)
    same(tree.leaves(given), before)


@pytest.mark.parametrize("adjoint", [Unrolled(), Replay(), Replay(every=2), Stash()], ids=str)
def test_adaptations_wait_for_their_way_back_side_by_side(adjoint: Adjoint, place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    params = list(model.parameters())
    recorded, plain = (
        compile_unroll(model, optim.sgd(lr=0.1, momentum=0.9), 2, loss=entry.loss, adjoint=adjoint, backend=b)
        for b in (place.backend, Eager())
    )
    supports = [place.put(entry.data(seed, 4)) for seed in range(3)]
    found: list[list[Tensor]] = []
    for unroll in (recorded, plain):
        adapted = [unroll.adapt(support) for support in supports]
        found.append([g for one in reversed(adapted) for g in torch.autograd.grad(one.losses[-1] + one.params["0.weight"].sum(), params)])
    same(*found)


def test_tensors_that_the_model_holds_otherwise(place: Place) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2, dtype=torch.float64)
            self.shift = torch.zeros(2, dtype=torch.float64, device=place.device)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.shift

    model = Shifted().to(place.device)
    recorded, plain = (compile_unroll(model, optim.sgd(lr=0.1), 2, loss=regress, backend=b) for b in (place.backend, Eager()))
    support, query = place.put(MODELS["mlp"].data(0, 4)), place.put(MODELS["mlp"].data(1, 3))
    support, query = ((x[:, :3], y[:, :2]) for x, y in (support, query))
    seen: set[float] = set()

    def check() -> None:
        loss = recorded(support, query).detach()
        same([loss], [plain(support, query).detach()])
        seen.add(float(loss))

    check()
    model.shift.add_(1.0)
    check()
    assert place.recordings == 1
    model.shift = model.shift + 1.0
    check()
    check()
    assert place.recordings == 2 and len(seen) == 3
    model.shift.data = model.shift + 1.0  # the same object, other memory
    check()
    assert place.recordings == 3 and len(seen) == 4


def test_threads(place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    recorded, plain = (
        compile_unroll(model, optim.adam(lr=0.1), 3, loss=entry.loss, adjoint=Replay(), backend=b) for b in (place.backend, Eager())
    )
    batches = [(place.put(entry.data(index, 4)), place.put(entry.data(50 + index, 3))) for index in range(6)]
    wanted = [all_of(plain, model, *pair, 0) for pair in batches]
    wrong: list[BaseException] = []
    barrier = threading.Barrier(len(batches))

    def work(index: int) -> None:
        try:
            barrier.wait()
            for _ in range(4):
                same(all_of(recorded, model, *batches[index], 0), wanted[index])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert place.recordings == 7


def test_noise_is_not_drawn_while_another_thread_records(on_cpu: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = MODELS["dropout"]
    unrolls = [compile_unroll(entry.model(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend=on_cpu.backend) for _ in range(2)]
    support, query = entry.data(0, 4), entry.data(5, 3)
    results = [unrolls[0](support, query)]
    other = threading.Thread(target=lambda: results.append(unrolls[0](support, query)))
    states: list[Tensor] = []
    record = TapeRecorder.record

    def slowly(self: TapeRecorder, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        states.append(torch.get_rng_state())
        other.start()
        other.join(0.3)
        states.append(torch.get_rng_state())
        return record(self, run)

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(TapeRecorder, "record", slowly)
        unrolls[1](support, query)
    other.join()
    assert torch.equal(*states) and len(results) == 2 and not torch.equal(*results)


def test_data_that_is_not_sound_is_refused_by_name(place: Place) -> None:
    entry = MODELS["embeddings"]
    model = entry.model().to(place.device)
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, backend=place.backend)
    (tokens, labels), query = place.put(entry.data(0, 4)), place.put(entry.data(1, 3))
    expected = unroll((tokens, labels), query).detach()
    for wrong, message in ((torch.full_like(labels, 1000), "support target"), (torch.full_like(labels, -5), "holds -5")):
        with pytest.raises(LabelOutOfRange, match=message):
            unroll((tokens, wrong), query)
        with pytest.raises(LabelOutOfRange, match=message):
            unroll.adapt((tokens, wrong))
    with pytest.raises(LabelOutOfRange, match="support input"):
        unroll((tokens + 1000, labels), query)
    with pytest.raises(LabelOutOfRange, match="input"):
        unroll.adapt((tokens, labels))(tokens + 1000)
    with pytest.raises(LabelOutOfRange, match="query target"):
        unroll((tokens, labels), (query[0], query[1] + 1000))
    same([unroll((tokens, labels), query).detach()], [expected])

    dropout = MODELS["dropout"]
    net = dropout.model().to(place.device)
    for nonfinite in ("error", "ignore"):
        looks = compile_unroll(net, optim.sgd(lr=0.1), 2, loss=dropout.loss, backend=place.backend, nonfinite=nonfinite)
        (x, y), query = place.put(dropout.data(0, 4)), place.put(dropout.data(1, 3))
        x[2, 1] = float("nan")
        if nonfinite == "ignore":
            assert looks((x, y), query).isnan()
            continue
        with pytest.raises(NonFiniteInput, match=r"support input 0 holds nan at \[2, 1\]"):
            looks((x, y), query)
        with pytest.raises(NonFiniteInput, match="query input 0 holds nan"):
            looks(query, (x, y))
        with pytest.raises(NonFiniteInput, match="support input 0 holds nan"):
            looks.adapt((x, y))
        adapted = looks.adapt(query)
        state = torch.get_rng_state() if place.device.type == "cpu" else torch.cuda.get_rng_state()
        with pytest.raises(NonFiniteInput, match="input 0 holds nan"):
            adapted(x)
        now = torch.get_rng_state() if place.device.type == "cpu" else torch.cuda.get_rng_state()
        assert torch.equal(state, now)


def test_shapes_have_recordings_of_their_own(place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    recorded, plain = (compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, backend=b) for b in (place.backend, Eager()))
    for n in (4, 5, 4, 6, 5):
        support, query = place.put(entry.data(n, n)), place.put(entry.data(9, n))
        same([recorded(support, query).detach()], [plain(support, query).detach()])
    assert place.recordings == 3


def test_arguments_in_other_layouts(place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    recorded, plain = (compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, backend=b) for b in (place.backend, Eager()))
    x, y = place.put(entry.data(0, 4))
    turned = x.T.contiguous().T
    assert turned.stride() != x.stride()
    for support in ((x, y), (turned, y)):
        same([recorded(support, (x, y)).detach()], [plain((x, y), (x, y)).detach()])
    assert place.recordings == 1


def test_inference_mode_first_and_gradients_after(place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    recorded, plain = (compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, backend=b) for b in (place.backend, Eager()))
    support, query = place.put(entry.data(0, 4)), place.put(entry.data(1, 3))
    with torch.inference_mode():
        own = tree.map_leaves(torch.clone, support)
        assert recorded(own, query).is_inference()
        recorded.adapt(own)(query[0])
    same(all_of(recorded, model, support, query, 0), all_of(plain, model, support, query, 0))


def test_it_says_what_it_records(place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, backend=place.backend)
    support, query = place.put(entry.data(0, 4)), place.put(entry.data(1, 3))
    unroll.warmup(support, query)
    explanation = unroll.explain()
    assert [(name, whole) for _, name, whole in explanation.calls] == [("adapt", True), ("meta-gradient", True), ("predict", True)]
    assert "backend cudagraph" in str(explanation) and "a call of meta-gradient: one launch" in str(explanation)
    before = place.recordings
    unroll(support, query).backward()
    unroll.adapt(support)
    with torch.no_grad():
        unroll.adapt(support)(query[0])
    assert place.recordings - before == 1  # an adaptation to be differentiated keeps what its way back needs


def test_an_operation_without_second_derivative_is_refused_on_the_way_back(place: Place) -> None:
    model = nn.Linear(3, 2, dtype=torch.float64).to(place.device)
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=F.multi_margin_loss, adjoint=Stash(), backend=place.backend)
    support = place.put((torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])))
    adapted = unroll.adapt(support)
    assert adapted.losses.isfinite().all()
    with pytest.raises(NotDifferentiable, match="multi_margin_loss"):
        adapted.losses.sum().backward()
    with torch.no_grad():
        assert torch.equal(unroll.adapt(support).losses, adapted.losses)


def test_memory_is_given_back_with_the_unroll(place: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model().to(place.device)
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, backend=place.backend)
    support = place.put(entry.data(0, 4))
    alive = weakref.ref(support[0])
    unroll.adapt(support).losses.sum().backward()
    recorder = weakref.ref(place.recorders.pop())
    del support
    gc.collect()
    assert alive() is None, "a recording holds the arguments of its first call"
    del unroll
    gc.collect()
    assert recorder() is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_narrow_indices(dtype: torch.dtype, place: Place) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(256, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.rows(x.long())

    model = Bag().to(place.device)
    recorded, plain = (compile_unroll(model, optim.sgd(lr=0.1), 1, loss=regress, backend=b) for b in (place.backend, Eager()))
    support = place.put((torch.tensor([3, 100, 7], dtype=dtype), torch.randn(3, 3, dtype=torch.float64)))
    same([recorded(support, support).detach()], [plain(support, support).detach()])


def test_recordings_are_freed_without_the_collector(place: Place) -> None:
    entry = MODELS["mlp"]
    unroll = compile_unroll(entry.model().to(place.device), optim.sgd(lr=0.1), 2, loss=entry.loss, backend=place.backend, cache_size=1)
    with torch.no_grad():
        unroll.adapt(place.put(entry.data(0, 4)))
        recording = weakref.ref(unroll._execution.planner.supports.entries()[0].calls.recordings()[0])
        gc.collect()
        gc.disable()
        try:
            unroll.adapt(place.put(entry.data(0, 5)))
            unroll.adapt(place.put(entry.data(1, 5)))
            assert recording() is None
        finally:
            gc.enable()


# --- what can go wrong, by the recorder for the CPU


def test_tensors_on_another_device_are_not_recorded(on_cpu: Place) -> None:
    unroll, support, query, loss = unroll_on(on_cpu)
    on_cpu.tape.device, recordings = torch.device("meta"), on_cpu.recordings
    reason = r"'.*' cannot be recorded, .*: it is given a tensor on cpu .*, the model is on meta; move the loss"
    with pytest.warns(RecordingFailed, match=reason), torch.no_grad():
        adapted = unroll.adapt(support)
        same([unroll(support, query).detach()], [loss])
    assert adapted.losses.isfinite().all() and on_cpu.recordings == recordings


@pytest.mark.cuda
def test_noise_that_is_drawn_on_the_cpu() -> None:
    class Noisy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + torch.rand(1, dtype=input.dtype).to(input.device)

    place, model = Place("cuda"), Noisy(2, 1).double().cuda()
    recorded, plain = (compile_unroll(model, optim.sgd(lr=0.1), 2, loss=regress, backend=b) for b in (place.backend, Eager()))
    batch = torch.rand(4, 2, device="cuda", dtype=torch.float64), torch.rand(4, 1, device="cuda", dtype=torch.float64)
    torch.manual_seed(0)
    wanted = plain(batch, batch).detach()
    torch.manual_seed(0)
    with pytest.warns(RecordingFailed, match="it is given a tensor on cpu"):
        same([recorded(batch, batch).detach()], [wanted])


def test_settings_of_cuda_can_be_read() -> None:
    assert len(CudaRecorder(torch.device("cuda")).settings()) == 9  # type: ignore[arg-type]


def unroll_on(place: Place, **settings: Any) -> tuple[CompiledUnroll, Any, Any, Tensor]:
    """An unroll, its data and its loss; it has been called once."""
    entry = MODELS["mlp"]
    unroll = compile_unroll(entry.model(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend=place.backend, **settings)
    support, query = entry.data(0, 4), entry.data(1, 3)
    return unroll, support, query, unroll(support, query).detach()


def test_what_cannot_be_recorded_runs_one_by_one_and_says_why(on_cpu: Place) -> None:
    unroll, support, query, loss = unroll_on(on_cpu)
    on_cpu.tape.broken = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(RecordingFailed, match=r"'adapt' cannot be recorded, .*: operation not permitted"), torch.no_grad():
        adapted = unroll.adapt(support)
    on_cpu.tape.broken = None
    launches = on_cpu.launches
    with torch.no_grad():
        again = unroll.adapt(support)  # neither warns nor tries again
    same(list(again.params.values()), list(adapted.params.values()))
    assert on_cpu.launches == launches and "a call of adapt: could not be recorded" in str(unroll.explain())
    same([unroll(support, query).detach()], [loss])
    assert on_cpu.launches == launches + 1


@pytest.mark.parametrize(("when", "bytes_needed"), [("warm-up", "more than 0.000"), ("recording", "about 3 MB")])
def test_too_little_memory(when: str, bytes_needed: str, on_cpu: Place) -> None:
    unroll, support, query, loss = unroll_on(on_cpu)
    on_cpu.tape.memory_full = when
    with (
        pytest.raises(OutOfDeviceMemory, match=f"recording 'adapt' needs {bytes_needed}.*2.00 GiB.*smaller batch") as caught,
        torch.no_grad(),
    ):
        unroll.adapt(support)
    assert isinstance(caught.value, MemoryError)
    same([unroll(support, query).detach()], [loss])  # what was recorded before still works
    on_cpu.tape.memory_full = None
    with torch.no_grad():
        assert unroll.adapt(support).losses.isfinite().all()


def test_within_another_recording(on_cpu: Place) -> None:
    unroll, support, query, loss = unroll_on(on_cpu)
    on_cpu.tape.refused = "graphs cannot be nested"
    for call in (lambda: unroll(support, query), lambda: unroll.adapt(support)):
        with pytest.raises(CannotRecord, match="graphs cannot be nested"):
            call()
    on_cpu.tape.refused = None
    same([unroll(support, query).detach()], [loss])


def test_settings_that_a_recording_has_taken_in(on_cpu: Place) -> None:
    unroll, support, query, _ = unroll_on(on_cpu)
    for mode, recordings in (("tf32", 2), (None, 2), ("tf32", 2), ("deterministic", 3)):
        on_cpu.tape.mode = mode
        unroll(support, query)
        assert on_cpu.recordings == recordings


def test_captures_in_other_threads_do_not_change_the_settings() -> None:
    recorder, seen = CudaRecorder(torch.device("cuda")), list[Any]()

    def traced(x: Tensor) -> Tensor:
        assert not torch.backends.cudnn.enabled
        other = threading.Thread(target=lambda: seen.append(recorder.settings()))
        other.start()
        other.join()
        return x + 1

    before = recorder.settings()
    capture(traced, torch.zeros(2))
    assert seen == [before] and recorder.settings() == before


def test_deterministic_algorithms_have_programs_of_their_own(on_cpu: Place) -> None:
    unroll, support, query, loss = unroll_on(on_cpu)
    torch.use_deterministic_algorithms(True)
    try:
        same([unroll(support, query).detach()], [loss])
        assert on_cpu.recordings == 2
    finally:
        torch.use_deterministic_algorithms(False)
    same([unroll(support, query).detach()], [loss])
    assert on_cpu.recordings == 2


def test_streams_take_turns(on_cpu: Place) -> None:
    unroll, support, query, loss = unroll_on(on_cpu)
    for stream in ("default", "other", "other", "default"):
        on_cpu.tape.stream = stream
        same([unroll(support, query).detach()], [loss])
    assert on_cpu.tape.order == [("default", False), ("default", False), ("other", True), ("other", False), ("default", True)]


def test_a_failing_launch_does_not_lock_the_next_one_out(on_cpu: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    unroll, support, query, loss = unroll_on(on_cpu)
    with monkeypatch.context() as patch:
        patch.setattr(TapeRecorder, "in_order", lambda *args: (_ for _ in ()).throw(RuntimeError("device lost")))
        with pytest.raises(RuntimeError, match="device lost"):
            unroll(support, query)
    same([unroll(support, query).detach()], [loss])


def test_a_model_that_was_moved(on_cpu: Place) -> None:
    entry = MODELS["mlp"]
    model = entry.model()
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, backend=on_cpu.backend)
    unroll.adapt(entry.data(0, 4))
    model.to("meta")
    with pytest.raises(UnsupportedParameter, match="on the meta device"):
        unroll.adapt(entry.data(0, 4))


def test_the_backend_needs_cuda() -> None:
    entry = MODELS["mlp"]
    with pytest.raises(InvalidArgument, match="needs a model on a CUDA device, this one is on cpu"):
        compile_unroll(entry.model(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend="cudagraph")
    with pytest.raises(InvalidArgument, match="tiered=True needs backend='inductor'"):
        compile_unroll(entry.model(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend="cudagraph", tiered=True)


def test_a_forked_process_is_told_to_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(CannotRecord, match=r"forked.*'spawn'"):
        recorder.refuse()


@pytest.mark.parametrize("ended", [False, True])
def test_a_broken_capture_is_put_in_order(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's part played by stand-ins; `test_a_capture_that_cuda_breaks` is the same on CUDA."""
    done: list[str] = []

    class Graph:
        replay = None

    @contextlib.contextmanager
    def capturing(graph: Graph, pool: str = "its own", **kwargs: Any) -> Iterator[None]:
        done.append(f"capture in {pool} on {kwargs['stream']}")
        try:
            yield
        finally:
            if sys.exc_info()[0] is ValueError:
                raise RuntimeError("operation failed due to a previous error during capture")

    def end(index: int, pool: str) -> None:
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        done.append(f"end {pool} of {index}")

    pools = iter(["pool 1", "pool 2"])
    for module, name, stand_in in [
        (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "Stream", lambda device: f"a stream of {device}"),
        (torch.cuda, "graph", capturing),
        (torch.cuda, "graph_pool_handle", lambda: next(pools)),
        (torch.cuda, "current_stream", lambda: "the caller's"),
        (torch.cuda, "set_stream", lambda stream: done.append(f"on {stream}")),
        (torch, "zeros", lambda *size, device: done.append(f"zeros on {device}")),
        (torch._C, "_cuda_clearCublasWorkspaces", lambda: None),
        (torch._C, "_cuda_endAllocateToPool", end),
        (torch._C, "_cuda_releasePool", lambda index, pool: done.append(f"release {pool} of {index}")),
    ]:
        monkeypatch.setattr(module, name, stand_in, raising=False)
    recorder = CudaRecorder(torch.device("cuda", 1))

    class Intermediate:
        pass

    def waits() -> list[Tensor]:
        intermediate = Intermediate()
        held.append(weakref.ref(intermediate))
        raise ValueError("it waits for the device")

    held: list[weakref.ref[Intermediate]] = []
    gc.disable()
    try:
        with pytest.raises(ValueError, match="it waits"):
            recorder.record(waits)
        assert held[0]() is None
    finally:
        gc.enable()
    mended = [] if ended else ["end pool 1 of 1", "release pool 1 of 1", "capture in its own on a stream of cuda:1", "zeros on cuda:1"]
    assert done == ["capture in pool 1 on None", "on the caller's", *mended]
    recorder.record(lambda: [])
    assert done[-1] == "capture in pool 2 on None"


# --- on a GPU only


@pytest.mark.cuda
def test_auto_is_one_graph_launch_on_cuda() -> None:
    model = MODELS["mlp"].model().float().cuda()
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    support, query = ([value.float().cuda() for value in MODELS["mlp"].data(seed, 4)] for seed in (0, 1))
    unroll(tuple(support), tuple(query)).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        unroll(tuple(support), tuple(query)).backward()
    launches = sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")
    assert launches == 1 and "backend cudagraph" in str(unroll.explain())


@pytest.mark.cuda
@pytest.mark.parametrize("adjoint", [Unrolled(), Replay(), Stash()], ids=str)
@pytest.mark.parametrize("name", ["mlp", "conv-bn-train", "dropout"])
def test_compiled_programs_in_a_graph(name: str, adjoint: Adjoint) -> None:
    place, entry = Place("cuda"), MODELS[name]
    place.backend = CudaGraph(Inductor(), place._recorder)
    model = entry.model().cuda()
    recorded, plain = (
        compile_unroll(model, optim.adam(lr=0.05, eps=0.01), 2, loss=entry.loss, adjoint=adjoint, backend=b)
        for b in (place.backend, Eager())
    )
    for seed in range(2):
        support, query = place.put(entry.data(seed, 4)), place.put(entry.data(seed + 5, 3))
        same(all_of(recorded, model, support, query, seed), all_of(plain, model, support, query, seed))


@pytest.mark.cuda
def test_two_streams_on_cuda() -> None:
    place, entry = Place("cuda"), MODELS["mlp"]
    model = entry.model().cuda()
    # Nothing waits for the device: what is found out about data would.
    recorded, plain = (
        compile_unroll(model, optim.sgd(lr=0.1), 3, loss=entry.loss, backend=b, nonfinite="ignore") for b in (place.backend, Eager())
    )
    batches = [place.put(entry.data(seed, 4)) for seed in range(8)]
    recorded(batches[0], batches[0])
    wanted = [plain(batch, batch).detach() for batch in batches]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[Tensor] = []
    for index, batch in enumerate(batches):
        with torch.cuda.stream(streams[index % 2]):
            torch.cuda._sleep(10_000_000 * (1 - index % 2))
            found.append(recorded(batch, batch).detach())
    torch.cuda.synchronize()
    same(found, wanted)


@pytest.mark.cuda
def test_within_a_capture_of_the_callers() -> None:
    place, entry = Place("cuda"), MODELS["mlp"]
    unroll = compile_unroll(entry.model().cuda(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend=place.backend)
    batch = place.put(entry.data(0, 4))
    wanted = unroll(batch, batch).detach()
    other = torch.zeros(3, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1.0)
        with pytest.raises(CannotRecord, match="cannot be nested"):
            unroll(batch, batch)
    same([unroll(batch, batch).detach()], [wanted])


@pytest.mark.cuda
def test_a_capture_that_cuda_breaks() -> None:
    place, entry = Place("cuda"), MODELS["dropout"]
    unroll = compile_unroll(entry.model().cuda(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend=place.backend)
    batch = place.put(entry.data(0, 4))

    def seeded() -> Tensor:
        torch.manual_seed(0)
        return unroll(batch, batch).detach()

    wanted = seeded()
    reserved = torch.cuda.memory_reserved()
    x, recorder = torch.ones(3, device="cuda"), CudaRecorder(torch.device("cuda", torch.cuda.current_device()))

    def record_both() -> None:
        launcher = Launcher(recorder)
        with pytest.warns(RecordingFailed, match="'waits' cannot be recorded.*operation not permitted"):
            waits = launcher.record("waits", lambda x: [x * x.sum().item() * torch.ones(1 << 22, 1, device="cuda")], [x], lambda: [])
        assert float(waits(x)[0][0, 0]) == 3.0
        doubles = launcher.record("doubles", lambda x: [x * 2], [x], lambda: [])
        assert doubles.is_one_launch
        same([doubles(x)[0]], [x * 2])

    for _ in range(3):
        record_both()
    torch.rand(3, device="cuda")  # which PyTorch takes for a part of the broken capture otherwise
    same([seeded()], [wanted])
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved + (8 << 20)


@pytest.mark.cuda
def test_too_little_memory_on_cuda() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * torch.ones(200_000_000_000 // 4, device=x.device).mean()

    place, entry = Place("cuda"), MODELS["mlp"]
    batch = place.put(entry.data(0, 4))
    unroll = compile_unroll(entry.model().cuda(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend=place.backend)
    wanted = unroll(batch, batch).detach()
    large = compile_unroll(Large().cuda(), optim.sgd(lr=0.1), 1, loss=regress, backend=place.backend)
    with pytest.raises(OutOfDeviceMemory, match="recording 'adapt'"), torch.no_grad():
        large.adapt((torch.ones(2, 1, device="cuda"), torch.ones(2, 1, device="cuda")))
    same([unroll(batch, batch).detach()], [wanted])
