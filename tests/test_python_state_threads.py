"""Other threads write to what a model can reach while it is traced: nothing of theirs is lost, and it does not count as the model's."""

from __future__ import annotations

import collections
import threading
import types
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy
import pytest
import torch
from test_python_state import Net, assert_follows, batch, unrolled
from torch import Tensor

from adaptrt.errors import NotTraceable

CACHE: dict[Any, Any] = {}
LOG: list[Any] = []


def meanwhile(write: Callable[[], object]) -> None:
    """Another thread writes, and this one waits for it."""
    other = threading.Thread(target=write)
    other.start()
    other.join()


def beside(write: Callable[[Net], object]) -> Net:
    """A model during each pass of which another thread writes."""

    def forward(self: Net, x: Tensor) -> Tensor:
        meanwhile(lambda: write(model))
        x = x.clone()
        x[:, 0] *= 2  # so that it is code that changes a container which has come from elsewhere
        return self.linear(x) * self.settings.temperature

    model = Net(forward)
    model.settings.history = types.SimpleNamespace(  # type: ignore[attr-defined]
        items=[0], table={0: 0}, queue=collections.deque([0]), names={0}, counts=numpy.zeros(1)
    )
    return model


def history(model: Net) -> Any:
    return model.settings.history  # type: ignore[attr-defined]


WRITES: dict[str, tuple[Callable[[Net], object], Callable[[Net], int]]] = {
    "a list": (lambda model: history(model).items.append(1), lambda model: len(history(model).items)),
    "a dict": (
        lambda model: history(model).table.update({len(history(model).table): 1}),
        lambda model: len(history(model).table),
    ),
    "a deque": (lambda model: history(model).queue.append(1), lambda model: len(history(model).queue)),
    "a set": (lambda model: history(model).names.add(len(history(model).names)), lambda model: len(history(model).names)),
    "an array": (lambda model: history(model).counts.__iadd__(1), lambda model: 1 + int(history(model).counts[0])),
    "an attribute": (
        lambda model: setattr(history(model), "calls", getattr(history(model), "calls", 1) + 1),
        lambda model: history(model).calls,
    ),
    "a list of the module": (lambda model: model.seen.append(1), lambda model: 1 + len(model.seen)),
    "a dict of the module": (lambda model: model.table.update({len(model.table): 1}), lambda model: 1 + len(model.table)),
    "a global list": (lambda model: LOG.append(1), lambda model: 1 + len(LOG)),
}


@pytest.mark.parametrize("where", WRITES)
def test_what_another_thread_writes_stays_and_is_no_state_of_the_model(where: str) -> None:
    write, count = WRITES[where]
    calls: SimpleQueue[int] = SimpleQueue()  # which no snapshot looks into
    LOG.clear()
    model = beside(lambda model: (calls.put(1), write(model)))
    unroll = unrolled(model)
    assert_follows(unroll, model)
    assert count(model) == 1 + calls.qsize()


def test_entries_of_two_threads_in_one_list_are_told_apart() -> None:
    calls: SimpleQueue[int] = SimpleQueue()

    def forward(self: Net, x: Tensor) -> Tensor:
        output = self.linear(x)
        LOG.append(output.detach())
        meanwhile(lambda: (calls.put(1), LOG.append("another thread's")))
        return output

    LOG.clear()
    unroll = unrolled(Net(forward))
    with pytest.raises(NotTraceable, match=r"LOG"):  # the list grows with each pass
        unroll.adapt(batch())
    assert ["another thread's"] * calls.qsize() == LOG and LOG


def test_a_tensor_that_another_thread_puts_into_a_cache_stays() -> None:
    written: SimpleQueue[int] = SimpleQueue()  # which no snapshot looks into

    def forward(self: Net, x: Tensor) -> Tensor:
        if x.shape[0] not in CACHE:
            CACHE[x.shape[0]] = torch.linspace(1, 2, 3, dtype=torch.float64)
            if written.empty():
                written.put(1)
                meanwhile(lambda: CACHE.update(other=torch.ones(2)))
        return self.linear(x) * CACHE[x.shape[0]]

    CACHE.clear()
    model = Net(forward)
    assert_follows(unrolled(model), model)
    assert type(CACHE.pop("other")) is Tensor
    CACHE.clear()


def test_a_thread_that_writes_all_the_time_loses_nothing() -> None:
    model = beside(lambda model: None)
    written, done = [0], threading.Event()

    def write() -> None:
        while not done.wait(0.0005):
            written[0] += 1
            history(model).items.append(written[0])
            history(model).table[written[0]] = written[0]

    other = threading.Thread(target=write)
    other.start()
    try:
        for _ in range(3):
            assert_follows(unrolled(model), model)
    finally:
        done.set()
        other.join()
    assert history(model).items == list(range(written[0] + 1)) and list(history(model).table) == list(range(written[0] + 1))


def test_what_other_threads_do_to_objects_of_the_standard_library_stays() -> None:
    """Making a thread runs code of the standard library that sets the attribute of another event, too."""
    model = beside(lambda model: history(model).stop.set())
    history(model).stop = threading.Event()
    unroll = unrolled(model)
    assert_follows(unroll, model)
    assert history(model).stop.is_set()
