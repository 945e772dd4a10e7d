"""The settings of a registered optimiser as its `_update` sees them while it is traced.

Floats and floating-point tensors in the groups are inputs of the program (`inputs`); all else is a constant, which is compared before every
call (`constants`). An input is handed to `_update` as a `Watched`, so that what Python decides by its value is known, and can be looked at
again before every call.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt.errors import NotTraceable
from adaptrt.higher.utils import _recursive_map, flatten, settings_of

Groups = Sequence[Mapping[str, Any]]
"""An optimiser's `param_groups`."""


def is_number(leaf: Any) -> bool:
    """Tells whether a setting, or an entry of one, is an input of a program."""
    return isinstance(leaf, float) or (isinstance(leaf, Tensor) and leaf.is_floating_point())


def inputs(groups: Groups) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Returns the numbers that are inputs, by the group's index (as a string) and the setting's name."""
    return {
        str(i): {key: found for key, value in settings_of(group).items() if (found := tuple(filter(is_number, flatten(value))))}
        for i, group in enumerate(groups)
    }


def constants(opt: torch.optim.Optimizer) -> Any:
    """Returns all else that a step reads of the instance, its other settings and its attributes, as a value that can be compared."""

    def constant(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return ("number", tuple(leaf.shape)) if leaf.is_floating_point() else ("tensor", leaf.dtype, leaf.tolist())
        return float if isinstance(leaf, float) else (type(leaf), leaf)

    def attribute(leaf: Any) -> Any:
        return ("tensor", id(leaf)) if isinstance(leaf, Tensor) else (type(leaf), leaf)

    own = {name: value for name, value in vars(opt).items() if name not in _attributes_of_any()}
    return [_recursive_map(settings_of(group), constant) for group in opt.param_groups], _recursive_map(own, attribute)


@functools.cache
def _attributes_of_any() -> frozenset[str]:
    """The names of the attributes that every optimiser has, and of those that a scheduler adds."""
    return frozenset(vars(torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.1))) | {"step", "_opt_called"}


class Place(NamedTuple):
    """Where a number stands in the settings: in which group, under which key, and as which of the key's numbers."""

    group: int
    key: str
    position: int

    def held(self, groups: Groups) -> Any:
        """Returns the number that stands there now."""
        return flatten(groups[self.group][self.key])[self.position]


class Question(NamedTuple):
    """A question about a setting whose answer decides what a step does, such as whether `lr` is greater than 0.

    Attributes:
      place: where the setting stands.
      ask: a function of the setting and of `other`.
      other: a number, the `Place` of another setting, or None.
    """

    place: Place
    ask: Callable[[Any, Any], Any]
    other: Any

    def answer(self, groups: Groups) -> Any:
        """Returns the answer for the numbers that stand in the groups now."""
        found = [part.held(groups) if isinstance(part, Place) else part for part in (self.place, self.other)]
        result = self.ask(*[part.detach() if isinstance(part, Tensor) else part for part in found])
        return bool(result) if isinstance(result, Tensor) else result


def _number(value: Any, other: None) -> float:
    del other
    return float(value)


class Watched:
    """A setting as `_update` sees it.

    In arithmetic it is a tensor. Where Python decides by it (`if`, a comparison, `float`), its current value decides, and the question and
    the answer are noted.

    Args:
      tensor: the program's input, which arithmetic takes.
      place: where the setting stands.
      groups: the groups that it stands in.
      outcomes: the answers by question. All programs of one structure share it, so that they decide alike.
    """

    def __init__(self, tensor: Any, place: Place, groups: Groups, outcomes: dict[Question, Any]) -> None:
        self._tensor, self._place, self._groups, self._outcomes = tensor, place, groups, outcomes

    @property
    def __class__(self) -> type:  # what isinstance asks for  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(self._place.held(self._groups), float):
            return float
        raise NotTraceable(
            f"_update asks for the type of the setting '{self._place.key}', which is a tensor. Compute with it as with a number"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return func(*_recursive_map(args, plain), **_recursive_map(kwargs or {}, plain))

    def _decide(self, ask: Callable[[Any, Any], Any], other: Any = None) -> Any:
        held = self._place.held(self._groups)
        if isinstance(held, Tensor) and held.numel() != 1:
            raise NotTraceable(
                f"_update decides by the setting '{self._place.key}', which is a tensor of several elements. Use torch.where"
            )
        question = Question(self._place, ask, other)
        if question not in self._outcomes:
            self._outcomes[question] = question.answer(self._groups)
        return self._outcomes[question]

    def _compare(self, ask: Callable[[Any, Any], Any], other: Any) -> Any:
        if type(other) is Watched:
            return self._decide(ask, other._place)
        if isinstance(other, Tensor):
            return ask(self._tensor, other)
        return self._decide(ask, other) if isinstance(other, int | float) else ask(float(self), other)

    def __float__(self) -> float:
        held = self._place.held(self._groups)
        if isinstance(held, Tensor) and held.requires_grad:
            raise NotTraceable(
                f"_update turns the setting '{self._place.key}', which requires grad, into a Python number. Compute with the tensor: "
                "torch.sqrt or ** 0.5 for math.sqrt"
            )
        return self._decide(_number)

    def __bool__(self) -> bool:
        return self._decide(operator.ne, 0)

    def __int__(self) -> int:
        return int(float(self))

    def __round__(self, digits: int | None = None) -> Any:
        return round(float(self), digits)

    def __format__(self, form: str) -> str:
        return format(float(self), form)

    def __str__(self) -> str:
        return str(float(self))

    def __repr__(self) -> str:
        return repr(float(self))

    __hash__ = None  # type: ignore[assignment]


def _arithmetic(name: str) -> Callable[..., Any]:
    ask = getattr(operator, name)
    return lambda self, *others: ask(plain(self), *map(plain, others))


def _reflected(name: str) -> Callable[..., Any]:
    ask = getattr(operator, name)
    return lambda self, other: ask(plain(other), plain(self))


def _comparison(name: str) -> Callable[..., Any]:
    ask = getattr(operator, name)
    return lambda self, other: self._compare(ask, other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Watched, f"__{_name}__", _arithmetic(_name))
    setattr(Watched, f"__r{_name}__", _reflected(_name))
for _name in ("neg", "pos", "abs", "getitem"):
    setattr(Watched, f"__{_name}__", _arithmetic(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Watched, f"__{_name}__", _comparison(_name))


def plain(leaf: Any) -> Any:
    """Returns the tensor of a watched setting, and anything else as it is."""
    return leaf._tensor if type(leaf) is Watched else leaf


def number_or_zero(leaf: Any) -> Any:
    """Returns a watched setting in the form that an optimiser of `adaptrt.optim` takes, and anything else as it is.

    The Python number zero removes a term there, so a float that is zero becomes that number; other settings become tensors.
    """
    if type(leaf) is not Watched:
        return leaf
    return 0.0 if isinstance(leaf._place.held(leaf._groups), float) and leaf == 0 else leaf._tensor
