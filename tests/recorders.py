"""A recorder for the CPU, which behaves as CUDA graphs do where that can go wrong.

It notes every operation, and a launch does these again on the same memory: no Python of the call runs. As on CUDA, recording computes
nothing, what is computed on the way lies in memory that recordings of a pool share, and waiting for a value while recording is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptrt.backend.cudagraph import WARM_UPS
from adaptrt.backend.launch import Recorder
from adaptrt.errors import CannotRecord

aten: Any = torch.ops.aten


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.owned: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        before = {_place(value) for value in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        made = _tensors(result)
        self.operations.append((func, args, kwargs, made))
        for value in made:
            if _place(value) not in before:
                self.owned[_place(value)] = value
        return result


def _tensors(part: Any) -> list[Tensor]:
    return [value for value in tree_leaves(part) if isinstance(value, Tensor)]


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _spoil(value: Tensor) -> None:
    value.fill_(float("nan") if value.is_floating_point() else True if value.dtype is torch.bool else torch.iinfo(value.dtype).max)


class TapeRecorder(Recorder):
    """One pool of tapes.

    Attributes:
      launches, recordings, warm_ups: how many there were.
      order: for each launch the stream that it was on, and whether it waited for the launch before.
      stream: the stream that callers are on.
      refused, memory_full, broken: what goes wrong next.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launches = self.recordings = self.warm_ups = 0
        self.order: list[tuple[Hashable, bool]] = []
        self.stream: Hashable = "default"
        self.refused: str | None = None
        self.memory_full: str | None = None
        self.broken: Exception | None = None
        self.mode: Hashable = None
        self.busy = False
        self._shared: list[list[Tensor]] = []

    def refuse(self) -> None:
        if self.refused is not None:
            raise CannotRecord(self.refused)

    def settings(self) -> Hashable:
        return self.mode

    def warm_up(self, run: Callable[[], object]) -> int:
        self.warm_ups += 1
        if self.memory_full == "warm-up":
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        for _ in range(WARM_UPS):
            run()
        return 3_000_000

    def record(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        if self.memory_full == "recording":
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        self.recordings += 1
        tape = _Tape()
        with tape:
            outputs = run()
            if self.broken is not None:
                raise self.broken
        ends = {_place(value) for value in outputs}
        shared = [value for place, value in tape.owned.items() if place not in ends]
        self._shared.append(shared)
        for value in tape.owned.values():  # nothing was computed
            _spoil(value)

        def launch() -> None:
            assert not self.busy, "two launches at the same time"
            self.busy = True
            self.launches += 1
            for others in self._shared:  # their memory is in use by this one
                for value in others:
                    _spoil(value)
            for func, args, kwargs, made in tape.operations:
                before = {_place(value) for value in _tensors((args, kwargs))}
                if func._schema.is_mutable:
                    func(*args, **kwargs)
                elif not made or all(_place(value) in before for value in made):
                    continue  # a view
                else:
                    for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                        old.copy_(new)
            self.busy = False

        return outputs, launch

    @contextlib.contextmanager
    def in_order(self, owned: Sequence[Tensor], streams: set[Hashable]) -> Generator[None]:
        del owned
        waits = bool(self.order) and self.order[-1][0] != self.stream
        streams.add(self.stream)
        self.order.append((self.stream, waits))
        yield
