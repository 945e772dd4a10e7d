"""`unroll.module()` in two processes, each with tasks of its own: gradients are those of one process that has all tasks.

Two processes are spawned once; they run every entry of `CASES`, and leave what they found in a file each. In other pairs one process dies.
Whatever waits for another process gives up after a time-out, so all of them end by themselves.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from adaptrt import CompiledUnroll, Replay, Stash, Truncated, compile_unroll, optim
from adaptrt.errors import AdaptrtError
from adaptrt.runtime.module import MetaLoss
from tests.processes import leave_group, start
from tests.test_meta_loss_module import Batch, Net, Rule, Weighted, rate

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"),
]

WORLD = 2
OUTER_STEPS = 3  # DistributedDataParallel rebuilds its buckets after the first
TIMEOUT_S = 100


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def make(opt: Any = None, model: nn.Module | None = None, **options: Any) -> CompiledUnroll:
    options = {"loss": F.mse_loss, "backend": "eager", **options}
    return compile_unroll(small() if model is None else model, optim.sgd(lr=0.1) if opt is None else opt, 2, **options)


def large() -> CompiledUnroll:
    """With buffers, and a layer that no loss reaches."""
    return make(optim.sgd(lr=0.1, momentum=0.9), Net())


def with_frozen_body() -> CompiledUnroll:
    model = Net()
    model.body.requires_grad_(False)
    return make(torch.optim.SGD(model.head.parameters(), lr=0.1), model)


def learned_rate(**options: Any) -> CompiledUnroll:
    return make(optim.sgd(lr=rate()), **options)


def truncated() -> CompiledUnroll:
    """No meta-loss depends on the parameters that adapt; on those of the losses all do."""
    return make(adjoint=Truncated(1), loss=Weighted(), query_loss=Weighted())


def with_step_weights(module: Any) -> None:
    module.step_weights = nn.Parameter(torch.tensor([0.4, 0.6]))


class Call(NamedTuple):
    """The arguments of a call: what is called, perhaps wrapped, the module in it, its unroll and the data."""

    model: Any
    module: Any
    unroll: CompiledUnroll
    batch: Batch

    def __call__(self, **options: Any) -> Tensor:
        return self.model(self.batch, self.batch, **options)


class Case(NamedTuple):
    make: Callable[[], CompiledUnroll] = make  # in float64
    loss: Callable[[Call], Tensor] = Call.__call__
    change: Callable[[MetaLoss], None] | None = None  # of the module, before it is wrapped
    wrap: dict[str, Any] = {}  # noqa: RUF012  arguments of DistributedDataParallel
    sharded: bool = False  # by fully_shard, in place of DistributedDataParallel
    num_batches: int = 1  # of each process for a step; all but the last are accumulated without communication
    scaled: bool = False
    uneven: bool = False  # rank 1 has no data for the last step
    tolerance: float = 1e-12


CASES: dict[str, Case] = {
    "large": Case(large),
    "frozen body, torch.optim": Case(with_frozen_body),
    "last layer only": Case(lambda: make(params="2.*")),
    "replay": Case(lambda: make(adjoint=Replay())),
    "learned rate": Case(learned_rate),
    "learned losses": Case(lambda: make(loss=Weighted(), query_loss=Weighted())),
    "learned optimiser": Case(lambda: make(optim.learned(Rule()), adjoint=Stash())),
    "tasks": Case(lambda: learned_rate().vmap()),
    "losses by task": Case(lambda: make().vmap(), lambda call: call(reduction="none").mean()),
    "every step, truncated": Case(truncated, lambda call: call(every_step=True).sum()),
    "step weights": Case(loss=lambda call: call(step_weights=call.module.step_weights), change=with_step_weights),
    "constant start": Case(learned_rate, lambda call: call(start=call.unroll.adapt(call.batch).detach())),
    "accumulated": Case(lambda: learned_rate(loss=Weighted()), num_batches=2),
    "scaled": Case(learned_rate, scaled=True),
    "bfloat16": Case(lambda: make(model=small().float(), dtype=torch.bfloat16), tolerance=1e-6),
    "small buckets": Case(learned_rate, wrap={"bucket_cap_mb": 0.0001, "gradient_as_bucket_view": True}),
    "looking for what is unused": Case(learned_rate, wrap={"find_unused_parameters": True}),
    "static graph": Case(learned_rate, wrap={"static_graph": True}),
    "uneven": Case(uneven=True),
    "sharded, large": Case(large, sharded=True),
    "sharded, last layer only": Case(lambda: make(params="2.*"), sharded=True),
    "sharded, learned loss": Case(lambda: make(loss=Weighted()), sharded=True),
    "sharded, learned rate, accumulated": Case(learned_rate, sharded=True, num_batches=2),
    "sharded, every step, truncated": Case(truncated, lambda call: call(every_step=True).sum(), sharded=True),
    "sharded, anchored at the start": Case(lambda: make(optim.proximal(optim.sgd(lr=0.1), strength=0.5)), sharded=True),
    "sharded, tasks": Case(lambda: make().vmap(), sharded=True),
}


def build(case: Case) -> tuple[CompiledUnroll, MetaLoss]:
    torch.manual_seed(1)
    unroll = case.make()
    module = unroll.module()
    if case.change is not None:
        case.change(module)
    return unroll, module


def batches(unroll: CompiledUnroll, case: Case, rank: int, step: int) -> list[Batch]:
    """The data of a process for an outer step. No two processes, and no two batches of one, have as many examples."""
    if case.uneven and rank and step == OUTER_STEPS - 1:
        return []
    generator = torch.Generator().manual_seed(10 * step + rank)
    lead = (3,) if "over tasks" in repr(unroll) else ()
    dtype = next(unroll.module().model.parameters()).dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=dtype)

    return [(draw(size, 3), draw(size, 2)) for size in range(5 + 3 * rank, 5 + 3 * rank + case.num_batches)]


class Found(NamedTuple):
    """Gradients of each outer step, and the parameters in the end, by name."""

    grads: list[dict[str, Tensor]]
    params: dict[str, Tensor]


def whole(value: Tensor | None) -> Tensor:
    assert value is not None
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def alone(case: Case) -> Found:
    """One process with everybody's data: the mean over processes of the mean over their batches."""
    unroll, module = build(case)
    params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    outer = torch.optim.SGD(params.values(), lr=0.2)
    grads: list[dict[str, Tensor]] = []
    for step in range(OUTER_STEPS):
        outer.zero_grad()
        for rank in range(WORLD):
            for batch in batches(unroll, case, rank, step):
                (case.loss(Call(module, module, unroll, batch)) / (WORLD * case.num_batches)).backward()
        grads.append({name: whole(value.grad) for name, value in params.items()})
        outer.step()
    return Found(grads, {name: whole(value) for name, value in params.items()})


# --- in the processes


def wrapped(module: MetaLoss, case: Case) -> Any:
    if not case.sharded:
        return DistributedDataParallel(module, **case.wrap)
    ignored = {*module.hyper.parameters()} if hasattr(module, "hyper") else set[nn.Parameter]()
    return fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)), ignored_params=ignored)


@contextlib.contextmanager
def without_communication(model: Any, holds: bool) -> Iterator[None]:
    if isinstance(model, DistributedDataParallel):
        with model.no_sync() if holds else contextlib.nullcontext():
            yield
    else:
        model.set_requires_gradient_sync(not holds)
        yield


def backward(model: Any, module: MetaLoss, unroll: CompiledUnroll, case: Case, data: Sequence[Batch], scaler: Any) -> None:
    for index, batch in enumerate(data):
        with without_communication(model, index < len(data) - 1):
            scaler.scale(case.loss(Call(model, module, unroll, batch)) / case.num_batches).backward()
    if case.sharded and hasattr(module, "hyper"):
        for value in module.hyper.parameters():
            assert value.grad is not None
            dist.all_reduce(value.grad)
            value.grad /= WORLD


def together(case: Case, rank: int) -> Found:
    unroll, module = build(case)
    model = wrapped(module, case)
    params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    outer = torch.optim.SGD(params.values(), lr=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=case.scaled)  # pyright: ignore[reportPrivateImportUsage]
    grads: list[dict[str, Tensor]] = []
    with model.join() if case.uneven else contextlib.nullcontext():
        for step in range(OUTER_STEPS):
            data = batches(unroll, case, rank, step)
            if data:
                outer.zero_grad()
                backward(model, module, unroll, case, data, scaler)
                scaler.unscale_(outer)
                grads.append({name: whole(value.grad) for name, value in params.items()})
                scaler.step(outer)
                scaler.update()
    return Found(grads, {name: whole(value) for name, value in params.items()})


def resumed(case: Case, rank: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and state of Adam after four steps, and after four steps with an interruption in the middle."""

    def begin(seed: int) -> tuple[Any, torch.optim.Optimizer, Callable[[int], None]]:
        unroll, module = build(case)
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in module.parameters():
                value += 0.1 * torch.randn(value.shape)
        model = wrapped(module, case)
        outer = torch.optim.Adam(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=False)  # pyright: ignore[reportPrivateImportUsage]

        def step(number: int) -> None:
            outer.zero_grad()
            backward(model, module, unroll, case, batches(unroll, case, rank, number), scaler)
            outer.step()

        return model, outer, step

    def state(model: Any, outer: torch.optim.Optimizer) -> dict[str, Any]:
        of_model, of_outer = get_state_dict(model, outer)
        return {"model": of_model, "outer": of_outer}

    def values(model: Any, outer: torch.optim.Optimizer) -> dict[str, Tensor]:
        found = state(model, outer)
        flat = {name: whole(value) for name, value in found["model"].items()}
        return flat | {f"{name}.{key}": whole(value) for name, entry in found["outer"]["state"].items() for key, value in entry.items()}

    model, outer, step = begin(seed=2)
    step(0)
    step(1)
    save(state(model, outer), checkpoint_id=folder)
    step(2)
    step(3)
    uninterrupted = values(model, outer)

    model, outer, step = begin(seed=3)
    loaded = state(model, outer)
    load(loaded, checkpoint_id=folder)
    set_state_dict(model, outer, model_state_dict=loaded["model"], optim_state_dict=loaded["outer"])
    step(2)
    step(3)
    return uninterrupted, values(model, outer)


RESUMED = {
    "wrapped": Case(lambda: learned_rate(loss=Weighted(), model=Net())),
    "sharded": Case(lambda: learned_rate(loss=Weighted(), model=Net()), sharded=True),
}


def refusals(rank: int) -> dict[str, str]:
    """What is said about mistakes."""
    mesh = init_device_mesh("cpu", (WORLD,))
    data = batches(make(), Case(), rank, 0)[0]
    found: dict[str, str] = {}

    def attempt(name: str, mistake: Callable[[], Any]) -> None:
        try:
            mistake()
        except AdaptrtError as error:
            found[name] = f"{type(error).__name__}: {error}"

    def of_a_layer() -> None:
        unroll = make()
        module: Any = unroll.module()
        fully_shard(module.model[0], mesh=mesh)
        fully_shard(module, mesh=mesh)
        module(data, data)

    def outside() -> None:
        unroll = make()
        fully_shard(unroll.module(), mesh=mesh)
        unroll.adapt(data)

    def shard(unroll: CompiledUnroll) -> None:
        module = unroll.module()
        fully_shard(module, mesh=mesh)
        module(data, data)

    def of_a_sharded_model() -> None:
        layer = nn.Linear(3, 2)
        fully_shard(layer, mesh=mesh)
        compile_unroll(nn.Sequential(layer), optim.sgd(lr=0.1), 1)

    attempt("wrapped model", lambda: compile_unroll(nn.Sequential(DistributedDataParallel(Net())), optim.sgd(lr=0.1), 1))
    attempt("sharded model", of_a_sharded_model)
    attempt("sharded layer", of_a_layer)
    attempt("sharded, called outside", outside)
    rates = {name: nn.Parameter(torch.full_like(value, 0.1)) for name, value in small().named_parameters()}
    attempt("sharded rates", lambda: shard(make(optim.sgd(lr=rates))))
    return found


def adapted_while_whole() -> bool:
    """Whether a sharded model adapts between `unshard` and `reshard`, as it did before it was sharded."""
    unroll, module = build(Case())
    data = batches(unroll, Case(), 0, 0)[0]
    wanted = unroll.adapt(data)
    model = wrapped(module, Case(sharded=True))
    model.unshard()
    found = unroll.adapt(data)
    model.reshard()
    return all(torch.equal(value, wanted.params[name]) for name, value in found.params.items()) and isinstance(
        module.model.get_parameter("0.weight"), DTensor
    )


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT_S))
    found: dict[str, Any] = {name: tuple(together(case, rank)) for name, case in CASES.items()}
    found["resumed"] = {name: resumed(case, rank, Path(folder, name)) for name, case in RESUMED.items()}
    found["refusals"] = refusals(rank)
    found["adapted while whole"] = adapted_while_whole()
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


# --- what they found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def processes(folder: Path) -> Sequence[Mapping[str, Any]]:
    """What each process found."""
    running: Any = spawn(work, args=(str(folder),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + 2 * TIMEOUT_S
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(name: str, processes: Sequence[Mapping[str, Any]]) -> None:
    case = CASES[name]
    wanted = alone(case)
    assert any(value.abs().max() > 0 for value in wanted.grads[0].values())
    for rank in range(WORLD):
        found = Found(*processes[rank][name])
        assert len(found.grads) == OUTER_STEPS - (case.uneven and rank)
        for got, expected in zip([*found.grads, found.params], [*wanted.grads[: len(found.grads)], wanted.params], strict=True):
            assert got.keys() == expected.keys()
            for key, value in got.items():
                torch.testing.assert_close(value, expected[key], rtol=0.0, atol=case.tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, processes: Sequence[Mapping[str, Any]]) -> None:
    for rank in range(WORLD):
        uninterrupted, continued = processes[rank]["resumed"][name]
        assert uninterrupted.keys() == continued.keys()
        assert {"hyper.lr", "loss.scale", "hyper.lr.exp_avg", "model.body.1.running_mean"} <= uninterrupted.keys()
        assert all(torch.equal(value, continued[key]) for key, value in uninterrupted.items())


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_from_the_checkpoint_of_two(name: str, folder: Path, processes: Sequence[Mapping[str, Any]]) -> None:
    case = RESUMED[name]._replace(sharded=False)
    unroll, module = build(case)
    outer = torch.optim.Adam(module.parameters(), lr=0.05)
    of_model, of_outer = get_state_dict(module, outer)
    loaded = {"model": of_model, "outer": of_outer}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load(loaded, checkpoint_id=folder / name)
    set_state_dict(module, outer, model_state_dict=loaded["model"], optim_state_dict=loaded["outer"])
    for step in (2, 3):
        outer.zero_grad()
        for rank in range(WORLD):
            for batch in batches(unroll, case, rank, step):
                (module(batch, batch) / (WORLD * case.num_batches)).backward()
        outer.step()
    uninterrupted, _ = processes[0]["resumed"][name]
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, uninterrupted[key], rtol=0.0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrapped model", "InvalidType: module '0' is wrapped"),
        ("sharded model", "InvalidType: module '0' is sharded"),
        ("sharded layer", "InvalidArgument: parameter 'model.0.weight' is still sharded"),
        ("sharded, called outside", "InvalidType: a tensor of class DTensor"),
        ("sharded rates", "InvalidArgument: hyperparameter 'lr.0.weight' requires grad and is another tensor"),
    ],
)
def test_mistakes_are_refused(name: str, message: str, processes: Sequence[Mapping[str, Any]]) -> None:
    for rank in range(WORLD):
        assert processes[rank]["refusals"][name].startswith(message)


def test_a_sharded_model_adapts_while_it_is_whole(processes: Sequence[Mapping[str, Any]]) -> None:
    assert all(found["adapted while whole"] for found in processes)


# --- a process that dies


DYING = """
import torch.distributed as dist
from datetime import timedelta
from torch.nn.parallel import DistributedDataParallel

rank, how = int(os.environ["RANK"]), os.environ["HOW"]
dist.init_process_group("gloo", init_method=os.environ["MEETING"], rank=rank, world_size=2, timeout=timedelta(seconds=5))
unroll = adaptrt.compile_unroll(nn.Linear(2, 3).double(), adaptrt.optim.sgd(lr=0.1), 2, loss=F.mse_loss, backend="eager")
meta_loss = DistributedDataParallel(unroll.module())
for step in range(3):
    batch = data(4)
    loss = meta_loss(batch, batch)
    if rank and step == 1:
        if how == "an error":
            raise RuntimeError("rank 1 has failed")
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    try:
        loss.backward()
    except RuntimeError:
        print("an error in step", step, flush=True)
        raise
"""
DEATHS = ("killed", "an error", "stopped")  # a process that was stopped holds its connections, and says no more


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[subprocess.Popen[str]]]]:
    """For each death two processes, the second of which dies. All run at the same time."""
    found: dict[str, list[subprocess.Popen[str]]] = {}
    try:
        for how in DEATHS:
            meeting = f"file://{tmp_path_factory.mktemp('dying')}/meeting"
            found[how] = [start(DYING, {"RANK": str(rank), "HOW": how, "MEETING": meeting}) for rank in range(WORLD)]
        yield found
    finally:
        for process in (process for pair in found.values() for process in pair):
            process.kill()
            process.communicate()


@pytest.mark.parametrize("how", DEATHS)
def test_the_other_process_ends_with_an_error(how: str, dying: Mapping[str, Sequence[subprocess.Popen[str]]]) -> None:
    survivor = dying[how][0]
    try:
        output, _ = survivor.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.fail("it hangs")
    assert survivor.returncode != 0
    assert output == "an error in step 1\n"
