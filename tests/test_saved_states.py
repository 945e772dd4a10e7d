"""States of adaptations in files: what is read is what was written, or it is refused."""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptrt
from adaptrt import Adapted, CompiledUnroll, compile_unroll, optim
from adaptrt.errors import InvalidState, InvalidType
from adaptrt.runtime import saved


class Net(nn.Module):
    """Layers that adapt, a layer that does not, running statistics, a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.scale = torch.tensor(1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.base(x)))) * self.scale


class Counting(nn.Module):
    """A loss with a parameter, and a buffer that every step changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.weight * F.cross_entropy(output, target) * (1.0 + 0.1 * self.calls)


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def batch(seed: int = 1, *lead: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 6, 3, generator=generator), torch.randint(2, (*lead, 6), generator=generator)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda model: optim.sgd(lr=0.1),
    "adam": lambda model: optim.adam(lr=0.01, amsgrad=True),
    "torch.optim": lambda model: torch.optim.Adam([*model.norm.parameters(), *model.head.parameters()], lr=0.01),  # type: ignore[union-attr]
    "lbfgs": lambda model: optim.lbfgs(lr=0.1, max_iter=2),
}


def make(
    model: nn.Module | None = None, optimizer: str = "adam", loss: Any = F.cross_entropy, params: Any = ("norm.*", "head.*")
) -> CompiledUnroll:
    model = net() if model is None else model
    return compile_unroll(model, OPTIMIZERS[optimizer](model), 2, loss=loss, params=params, backend="eager", adjoint=adaptrt.Replay())


def tensors(adapted: Adapted) -> dict[str, Tensor]:
    return {**adapted.state.named_tensors(), "losses": adapted.losses}


def assert_same(one: Adapted, other: Adapted) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert list(mine) == list(theirs) and one.num_tasks == other.num_tasks
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]) and value.dtype is theirs[name].dtype, name


@pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_was_written_is_read(optimizer: str, tasks: bool, tmp_path: Path) -> None:
    """In an unroll of another copy of the model, and adapting goes on as it would have."""
    unroll = make(optimizer=optimizer)
    unroll = unroll.vmap() if tasks else unroll
    lead = (3,) if tasks else ()
    adapted = unroll.adapt(batch(1, *lead))
    adapted.save(tmp_path / "user.safetensors")
    other = make(optimizer=optimizer)
    other = other.vmap() if tasks else other
    loaded = other.load(tmp_path / "user.safetensors")
    assert_same(loaded, adapted)
    assert not any(value.requires_grad for value in tensors(loaded).values())
    assert torch.equal(loaded(batch(2, *lead)[0]), adapted(batch(2, *lead)[0]))
    assert_same(other.adapt(batch(3, *lead), start=loaded).detach(), unroll.adapt(batch(3, *lead), start=adapted).detach())


def test_one_task_of_several_and_a_start_and_a_loss_with_buffers(tmp_path: Path) -> None:
    unroll = make(loss=Counting())
    states = [*unroll.vmap().adapt(batch(1, 3)), unroll.start(), unroll.start(num_tasks=2), unroll.adapt(batch())]
    for index, state in enumerate(states):
        state.save(tmp_path / f"{index}.safetensors")
        assert_same(unroll.load(str(tmp_path / f"{index}.safetensors")), state)
    assert "buffers.loss:calls" in tensors(unroll.load(tmp_path / "0.safetensors"))
    assert (tmp_path / "0.safetensors").stat().st_size < 4000  # one task, not the memory of three


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unroll, path = make(), tmp_path / "user.safetensors"
    first = unroll.adapt(batch(1))
    first.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~current_umask()
    unroll.adapt(batch(2)).save(path)
    assert not torch.equal(unroll.load(path).losses, first.losses)

    def fails(*args: Any) -> None:
        del args
        raise OSError("no space left")

    monkeypatch.setattr(saved, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        first.save(path)
    monkeypatch.undo()
    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no space left"):
        first.save(path)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["user.safetensors"]
    assert not torch.equal(unroll.load(path).losses, first.losses)


def current_umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


# --- states of something else


def change_frozen(model: Net, loss: Counting) -> None:
    del loss
    with torch.no_grad():
        model.base.weight[0, 0] += 1e-7


def change_plain(model: Net, loss: Counting) -> None:
    del loss
    model.scale = torch.tensor(1.6)


def change_loss(model: Net, loss: Counting) -> None:
    del model
    with torch.no_grad():
        loss.weight.mul_(2.0)


@pytest.mark.parametrize("change", [change_frozen, change_plain, change_loss])
def test_a_state_of_another_base(change: Callable[[Net, Counting], None], tmp_path: Path) -> None:
    model, loss = net(), Counting()
    make(model, loss=loss).adapt(batch()).save(tmp_path / "user.safetensors")
    change(model, loss)
    with pytest.raises(InvalidState, match="was adapted from another base"):
        make(model, loss=loss).load(tmp_path / "user.safetensors")


def test_a_tensor_that_only_caches(tmp_path: Path) -> None:
    """It is compared where both sides have it, and named."""
    model, path = net(), tmp_path / "user.safetensors"
    unroll = make(model)
    unroll.adapt(batch()).save(path)
    model.last = torch.ones(3)  # type: ignore[assignment]
    assert unroll.load(path).num_tasks is None
    unroll.adapt(batch()).save(path)
    model.last = torch.zeros(3)  # type: ignore[assignment]
    with pytest.raises(InvalidState, match=r"another base: model\.last had other values then"):
        unroll.load(path)


def test_what_adapts_is_no_part_of_the_base(tmp_path: Path) -> None:
    """A model that was trained on where it adapts may go on from an older state."""
    model = net()
    unroll = make(model)
    adapted = unroll.adapt(batch())
    adapted.save(tmp_path / "user.safetensors")
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    assert_same(unroll.load(tmp_path / "user.safetensors"), adapted)


def test_states_of_other_unrolls(tmp_path: Path) -> None:
    path = tmp_path / "user.safetensors"
    make().adapt(batch()).save(path)
    for unroll, message in (
        (make(optimizer="sgd"), "opt_state.head.weight.exp_avg: nothing expected"),
        (make(params="head.*"), "params.norm.weight: nothing expected"),
        (make(net().double()), r"params.head.weight: float64\[2, 4\] expected, got float32"),
        (make(nn.ModuleDict({"norm": nn.Linear(2, 2), "head": nn.Linear(4, 2)})), "expected"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidState, match=message):
            unroll.load(path)


# --- damaged files


def test_other_files(tmp_path: Path) -> None:
    unroll, path = make(), tmp_path / "user.safetensors"
    with pytest.raises(FileNotFoundError):
        unroll.load(path)
    with pytest.raises(FileNotFoundError):
        unroll.start().save(tmp_path / "nowhere" / "user.safetensors")
    with pytest.raises(InvalidType, match="must be a string or a path, got int"):
        unroll.load(3)  # type: ignore[arg-type]
    with pytest.raises(IsADirectoryError):
        unroll.load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(InvalidState, match="is damaged, or is no file"):
        unroll.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InvalidState, match=r"none that Adapted\.save"):
        unroll.load(path)
    torch.save(unroll.start().state_dict(), path)
    with pytest.raises(InvalidState, match="is damaged, or is no file"):
        unroll.load(path)


def rewritten(path: Path, **changes: str) -> None:
    """Writes the file again with other metadata, as somebody else's program might."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(path), path, {key: value for key, value in {**metadata, **changes}.items() if value != "left out"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2"}, "was written in format 2, this adaptrt reads formats up to 1; update adaptrt"),
        ({"format_version": "one"}, "digest"),
        ({"digest": "0"}, "digest"),
        ({"digest": "left out"}, "digest"),
        ({"num_tasks": "2"}, "digest"),
        ({"fingerprint": "left out"}, "digest"),
        ({"more": "of it"}, "digest"),
    ],
)
def test_other_metadata(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    unroll, path = make(), tmp_path / "user.safetensors"
    unroll.adapt(batch()).save(path)
    rewritten(path, **changes)
    with pytest.raises(InvalidState, match=message):
        unroll.load(path)


_UNROLL = make()
_ADAPTED = _UNROLL.adapt(batch())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_or_equal(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "user.safetensors"
    _ADAPTED.save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        for _ in range(data.draw(st.integers(1, 3), "flips")):
            # Half of the places in the header, which is the smaller part.
            last = data.draw(st.sampled_from([400, len(content) - 1]), "part")
            content[data.draw(st.integers(0, last), "place")] ^= 1 << data.draw(st.integers(0, 7), "bit")
    path.write_bytes(content)
    try:
        loaded = _UNROLL.load(path)
    except InvalidState:
        return
    assert_same(loaded, _ADAPTED)


def test_a_copy_saves_the_same(tmp_path: Path) -> None:
    copied = copy.deepcopy(_ADAPTED)
    copied.save(tmp_path / "user.safetensors")
    assert_same(_UNROLL.load(tmp_path / "user.safetensors"), _ADAPTED)
