"""Describes random tensors that a program receives as inputs instead of drawing them itself.

A random operation that is called while a function is captured becomes an input of role NOISE, described by a `Noise`. The values are drawn
before the program runs, in the order in which eager code would draw them. So on the CPU, for contiguous parameters and data, a seed gives
the same dropout masks as in eager PyTorch.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from adaptrt.tree import Spec


@dataclasses.dataclass(frozen=True, slots=True)
class Noise:
    """Describes one random tensor: its distribution and constants, shape, dtype and device, and the order in which elements are drawn.

    `kind` is "bernoulli" (p), "uniform" (low, high), "normal" (mean, std), "exponential" (rate), "randint" (low, high) or
    "randperm" (n). `order` lists the axes from the slowest to the fastest varying in the memory of the tensor that eager code would draw.
    It is empty if that is the order of the shape.
    """

    kind: str
    constants: tuple[float, ...]
    spec: Spec
    order: tuple[int, ...] = ()

    def draw(self, generator: torch.Generator | None = None, num_tasks: int | None = None) -> Tensor:
        """Draws the tensor, with a leading axis of independent draws if `num_tasks` is given."""
        spec = self.spec
        if self.kind == "randperm":
            rows = [torch.randperm(spec.shape[0], generator=generator, dtype=spec.dtype, device=spec.device) for _ in range(num_tasks or 1)]
            return torch.stack(rows) if num_tasks is not None else rows[0]
        order = self.order or tuple(range(len(spec.shape)))
        lead = () if num_tasks is None else (num_tasks,)
        drawn = self._fill(torch.empty((*lead, *(spec.shape[axis] for axis in order)), dtype=spec.dtype, device=spec.device), generator)
        if not self.order:
            return drawn
        place = {axis: index + len(lead) for index, axis in enumerate(order)}
        return drawn.permute(*range(len(lead)), *(place[axis] for axis in range(len(order)))).contiguous()

    def _fill(self, empty: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.kind == "bernoulli":
            return empty.bernoulli_(self.constants[0], generator=generator)
        if self.kind == "uniform":
            return empty.uniform_(*self.constants, generator=generator)
        if self.kind == "normal":
            return empty.normal_(*self.constants, generator=generator)
        if self.kind == "exponential":
            return empty.exponential_(*self.constants, generator=generator)
        low, high = map(int, self.constants)
        return empty.random_(low, high, generator=generator)


def draw(noises: Sequence[Noise], generator: torch.Generator | None = None, num_tasks: int | None = None) -> tuple[Tensor, ...]:
    """Draws every tensor in order. With `generator=None` it uses the global generator of the device, as eager code does."""
    drawn = _drawn.get(None)
    if drawn is not None:
        drawn.append((noises, num_tasks))
    return tuple(noise.draw(generator, num_tasks) for noise in noises)


_drawn: contextvars.ContextVar[list[tuple[Sequence[Noise], int | None]]] = contextvars.ContextVar("drawn")
"""What was drawn in the block whose draws are taken back if it raises."""


def restored_on_error(noises: Sequence[Noise], generator: torch.Generator | None) -> contextlib.AbstractContextManager[None]:
    """If the block raises, takes back what it has drawn of `noises`, unless others have drawn from the same generator meanwhile."""
    return restored_on_any_error(noises[0].spec.device, generator) if noises else _NOTHING


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def restored_on_any_error(device: torch.device, generator: torch.Generator | None) -> Generator[None]:
    """If the block raises, takes back what it has drawn, as `restored_on_error`; for blocks whose noise is not known beforehand."""
    if generator is None:
        generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    drawn: list[tuple[Sequence[Noise], int | None]] = []
    around = _drawn.get(None)
    token = _drawn.set(drawn)
    try:
        yield
    except BaseException:
        made = list(drawn)
        if _is_after(state, made, generator):
            generator.set_state(state)
            made = []
        drawn[:] = made  # without those of the comparison
        raise
    finally:
        _drawn.reset(token)
        if around is not None:
            around.extend(drawn)


def _is_after(state: Tensor, drawn: Sequence[tuple[Sequence[Noise], int | None]], generator: torch.Generator) -> bool:
    """Whether the generator is where these draws, and no others, have brought it from `state`."""
    twin = torch.Generator(generator.device)
    twin.set_state(state)
    for noises, num_tasks in list(drawn):
        draw(noises, twin, num_tasks)
    return torch.equal(twin.get_state(), generator.get_state())
