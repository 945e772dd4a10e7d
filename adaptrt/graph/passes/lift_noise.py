"""Replaces random operations by tensors that the program receives as inputs.

This happens while a function is captured, under autograd, so the derivative formulas of the random operations apply unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptrt.errors import UnsupportedRandomness
from adaptrt.graph.noise import Noise
from adaptrt.graph.operations import is_random, name_of
from adaptrt.tree import Spec

aten = torch.ops.aten
_Source = Callable[[Noise], Tensor]


class _Randomness(TorchDispatchMode):
    """Hands every random operation to `source`."""

    def __init__(self, source: _Source) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._source = source

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        kwargs = kwargs or {}
        if not is_random(func, args, kwargs):
            return func(*args, **kwargs)
        rule = _RULES.get(func)
        if rule is None:
            known = ", ".join(sorted({name_of(target) for target in _RULES}))
            raise UnsupportedRandomness(
                f"the random operation '{name_of(func)}' cannot be drawn before the program runs. Draw it outside the model and "
                f"pass it as an input, or use one of: {known} (without a generator argument)"
            )
        return rule(self._source, *args, **kwargs)


@contextmanager
def lift_noise(noise: Sequence[Tensor]) -> Generator[None]:
    """Makes random operations in the block return these tensors in order, in eager code as well as during a capture."""
    pending = iter(noise)

    def take(wanted: Noise) -> Tensor:
        value = next(pending, None)
        if value is None or tuple(value.shape) != wanted.spec.shape:
            raise UnsupportedRandomness(
                f"the model drew {wanted.kind} {wanted.spec}, which it did not draw when it was first run: its random operations must "
                "not vary from run to run"
            )
        return value.clone()  # the model may write to what it has drawn

    with _Randomness(take):
        yield


@contextmanager
def record_noise() -> Generator[list[Noise]]:
    """Records what random operations in the block would draw, and makes them return uninitialised tensors."""
    found: list[Noise] = []

    def note(wanted: Noise) -> Tensor:
        found.append(wanted)
        return torch.empty(wanted.spec.shape, dtype=wanted.spec.dtype, device=wanted.spec.device)

    with _Randomness(note):
        yield found


@contextmanager
def forbid_noise() -> Generator[None]:
    """Makes random operations in the block raise."""

    def refuse(wanted: Noise) -> Tensor:
        raise UnsupportedRandomness(
            f"a random operation ({wanted.kind} {wanted.spec}) outside the model and the loss; draw it before and pass it in"
        )

    with _Randomness(refuse):
        yield


def _like(value: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Spec:
    return Spec(tuple(value.shape), dtype or value.dtype, device or value.device)


def _order(value: Tensor) -> tuple[int, ...]:
    """Returns the axes of `value` in the order of memory, slowest first, or () if that is their own order or the memory has gaps."""
    axes = sorted(range(value.dim()), key=lambda axis: -value.stride(axis))
    expected = 1
    for axis in reversed(axes):
        if value.shape[axis] != 1 and value.stride(axis) != expected:
            return ()
        expected *= value.shape[axis]
    return () if axes == sorted(axes) else tuple(axes)


def _new(size: Sequence[int], dtype: torch.dtype | None, device: torch.device | None) -> Spec:
    return Spec(tuple(size), dtype or torch.get_default_dtype(), torch.device(device or "cpu"))


def _native_dropout(source: _Source, value: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    if train is False or p == 0.0:
        return value.clone(), torch.ones_like(value, dtype=torch.bool)
    # Eager dropout on the CPU draws a tensor of zeros and ones in the dtype of its input, and so does this rule.
    mask = source(Noise("bernoulli", (1.0 - p,), _like(value), _order(value)))
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return value * mask * scale, mask.to(torch.bool)


def _filled(kind: str, *defaults: float) -> Callable[..., Tensor]:
    """Makes a rule for an in-place fill such as `uniform_(low, high)`."""

    def rule(source: _Source, value: Tensor, *constants: float, generator: torch.Generator | None = None) -> Tensor:
        _refuse_generator(generator)
        return value.copy_(source(Noise(kind, tuple(map(float, (*constants, *defaults[len(constants) :]))), _like(value), _order(value))))

    return rule


def _made(kind: str, *constants: float) -> Callable[..., Tensor]:
    """Makes a rule for a factory such as `rand(size)`."""

    def rule(source: _Source, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        return source(Noise(kind, constants, _new(size, dtype, device)))

    return rule


def _made_like(kind: str, *constants: float) -> Callable[..., Tensor]:
    """Makes a rule for a factory such as `rand_like(value)`."""

    def rule(source: _Source, value: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        return source(Noise(kind, constants, _like(value, dtype, device), _order(value)))

    return rule


def _bernoulli(source: _Source, value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    _refuse_generator(generator)
    return (source(Noise("uniform", (0.0, 1.0), _like(value), _order(value))) < value).to(value.dtype)


def _bernoulli_p(source: _Source, value: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    _refuse_generator(generator)
    return source(Noise("bernoulli", (p,), _like(value), _order(value)))


def _bernoulli_tensor_(source: _Source, value: Tensor, p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    _refuse_generator(generator)
    return value.copy_(source(Noise("uniform", (0.0, 1.0), _like(value, p.dtype), _order(value))) < p)


def _normal(source: _Source, mean: Tensor | float, std: Tensor | float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    _refuse_generator(generator)
    like = mean + std
    assert isinstance(like, Tensor)
    return source(Noise("normal", (0.0, 1.0), _like(like))) * std + mean


def _normal_constants(
    source: _Source, mean: float, std: float, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return source(Noise("normal", (mean, std), _new(size, dtype, device)))


def _randint(source: _Source, high: int, size: Sequence[int], *, dtype: Any = torch.int64, device: Any = None, **_: Any) -> Tensor:
    return source(Noise("randint", (0, high), _new(size, dtype or torch.int64, device)))


def _randint_low(
    source: _Source, low: int, high: int, size: Sequence[int], *, dtype: Any = torch.int64, device: Any = None, **_: Any
) -> Tensor:
    return source(Noise("randint", (low, high), _new(size, dtype or torch.int64, device)))


def _randint_like(source: _Source, value: Tensor, high: int, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return source(Noise("randint", (0, high), _like(value, dtype, device), _order(value)))


def _randperm(source: _Source, n: int, *, dtype: Any = torch.int64, device: Any = None, **_: Any) -> Tensor:
    return source(Noise("randperm", (n,), _new((n,), dtype or torch.int64, device)))


def _refuse_generator(generator: torch.Generator | None) -> None:
    if generator is not None:
        raise UnsupportedRandomness(
            "the model draws from a generator of its own; drop the generator argument and pass generator= to the unroll instead"
        )


_RULES: dict[Any, Callable[..., Any]] = {
    aten.native_dropout.default: _native_dropout,
    aten.bernoulli_.float: _filled("bernoulli", 0.5),
    aten.bernoulli_.Tensor: _bernoulli_tensor_,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli_p,
    aten.uniform_.default: _filled("uniform", 0.0, 1.0),
    aten.normal_.default: _filled("normal", 0.0, 1.0),
    aten.normal.Tensor_Tensor: _normal,
    aten.normal.Tensor_float: _normal,
    aten.normal.float_Tensor: _normal,
    aten.normal.float_float: _normal_constants,
    aten.exponential_.default: _filled("exponential", 1.0),
    aten.rand.default: _made("uniform", 0.0, 1.0),
    aten.randn.default: _made("normal", 0.0, 1.0),
    aten.rand_like.default: _made_like("uniform", 0.0, 1.0),
    aten.randn_like.default: _made_like("normal", 0.0, 1.0),
    aten.randint.default: _randint,
    aten.randint.low: _randint_low,
    aten.randint_like.default: _randint_like,
    aten.randperm.default: _randperm,
}
