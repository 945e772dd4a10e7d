"""What a handle of the original offers besides its documented methods, for programs that use it.

A module of a handle gets these names only where its model has none of that name, because a model's own names come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from adaptrt.higher.utils import _get_param_mapping


class _Shown:
    """A property that an attribute of the instance hides, as a model may set one in its forward pass.

    Args:
      get: a function from the module to the value.
    """

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self._get = get

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else self._get(module)


def _root(part: Any) -> Any:
    """The handle that a module belongs to. A module that is no part of a handle is its own root."""
    return part if part._adaptrt_fast is None else part._adaptrt_fast.places.modules[0]()


def _is_outside(part: Any) -> bool:
    """Whether no forward pass of the handle is running, so that a call of a part is a call of its own."""
    return part._adaptrt_fast is None or part._adaptrt_fast.num_running == 0


def _boxed_forward(self: Any, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
    """Does what the handle's `forward` does."""
    return self.forward(*args, params=params, **kwargs)


def _refill_params_box(self: Any, params: Iterable[Tensor] | None) -> None:
    """Makes `params` the latest fast weights, if they are given.

    Raises:
      ValueError: they are not given, and there are no fast weights yet.
    """
    if params is not None:
        self.fast_params = params
    elif self.fast_params is None:
        raise ValueError("params must be given: the patched module does not hold fast weights of its own")


def _expand_params(self: Any, params: list[Tensor]) -> list[Tensor]:
    """Returns one tensor for each place of a parameter, where a shared parameter stands several times."""
    return [params[index] for index in self._param_mapping]


def _set_versions(handle: Any, versions: Iterable[Iterable[Tensor]] | None) -> None:
    fast = handle._held
    fast.versions = None if versions is None else [list(values) for values in versions]
    fast.show()
    fast.forget_twins()


_OF_ALL: Mapping[str, Any] = {
    "is_root": _Shown(lambda part: _root(part) is part),
    "root": _Shown(_root),
    "direct_submodule_call": _Shown(_is_outside),
}
_OF_ROOTS: Mapping[str, Any] = {
    "boxed_forward": _boxed_forward,
    "_refill_params_box": _refill_params_box,
    "_expand_params": _expand_params,
    "_param_mapping": _Shown(lambda handle: _get_param_mapping(handle, [], [])),
    "_fast_params": property(lambda handle: handle._held.versions, _set_versions),
}


def names_for(part: nn.Module, is_root: bool) -> dict[str, Any]:
    """Returns what the class of a handle's module gets by these names.

    Args:
      part: a copy of a module of the model, not patched yet.
      is_root: whether the module is the handle itself.
    """
    names = {**_OF_ALL, **_OF_ROOTS} if is_root else _OF_ALL
    own = {*vars(part), *part._parameters, *part._buffers, *part._modules}
    return {name: value for name, value in names.items() if name not in own and not hasattr(type(part), name)}
