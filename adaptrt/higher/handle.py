"""The classes of a handle's modules: a model whose parameters are fast weights.

Each module of a handle has a class of its own, which inherits from `Patched` and from the class of its original. So it is an instance of
the original's class and has its methods, but a call of it runs on its twin; see `twins`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptrt.errors import CannotBePickled
from adaptrt.higher.fast_weights import FastWeights
from adaptrt.higher.methods import flags_refused


class Patched(nn.Module):
    """The class of every module of a handle, besides the class of its original."""

    _adaptrt_fast: FastWeights | None = None
    """The handle's fast weights. It is None for a module that the handle's own methods make of its class: a slice of a `Sequential` has
    parts of the handle, but is no part of it."""
    _adaptrt_number: int
    """The module's number in `Places`."""
    _adaptrt_only_shows: bool = False
    """Whether an assignment to a parameter only changes what the module shows until the next update, and not the fast weights."""

    def __call__(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """Returns what the module returns for these arguments with the latest fast weights.

        Args:
          args, kwargs: arguments of the model's `forward`.
          params: fast weights that become the latest before.
        Raises:
          ValueError: there are no fast weights yet.
        """
        if self._adaptrt_fast is None:
            return super().__call__(*args, **kwargs)
        return self._adaptrt_run(lambda twin: twin(*args, **kwargs), self._adaptrt_fast, params)

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """Does what a call does, without the hooks of the module itself."""
        if self._adaptrt_fast is None:
            return super().forward(*args, **kwargs)
        return self._adaptrt_run(lambda twin: twin.forward(*args, **kwargs), self._adaptrt_fast, params)

    def _adaptrt_run(self, run: Callable[[Any], Any], fast: FastWeights, params: Iterable[Tensor] | None) -> Any:
        if params is not None:
            fast.update(params)
        twins = fast.running()
        fast.num_running += 1
        try:
            with fast.differentiable_twice():
                return run(twins.modules[self._adaptrt_number])
        finally:
            fast.num_running -= 1
            fast.take_over(twins)

    def __setattr__(self, name: str, value: Any) -> None:
        fast = self._adaptrt_fast
        if fast is None or name not in self.__dict__.get("_parameters", ()):
            super().__setattr__(name, value)
            self._adaptrt_changed()
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"a fast weight must be a tensor, got {torch.typename(value)} for '{name}'")
        if self._adaptrt_only_shows:
            self.__dict__["_parameters"][name] = value
            return
        if fast.latest is None:
            raise ValueError(
                f"'{name}' cannot be assigned: the patched module does not hold fast weights of its own; call update_params first"
            )
        index = dict(fast.places.of_module[self._adaptrt_number])[name]
        fast.update([value if i == index else old for i, old in enumerate(fast.latest)])

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._adaptrt_changed()

    def __copy__(self) -> Any:
        raise TypeError("copy.copy of a patched module would share its fast weights and take over their places; use copy.deepcopy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._adaptrt_fast is not None and id(self._adaptrt_fast) not in memo:
            raise TypeError("a part of a patched module has no weights of its own to copy; copy the patched module, or the original's part")
        made = memo[id(self)] = object.__new__(type(self))
        made.__setstate__(copy.deepcopy(vars(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CannotBePickled(
            "a patched module cannot be pickled: its fast weights are part of a graph; save its state_dict(), which the original loads"
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Does what it does for any module. With `assign=True` all assigned tensors together are one update of the fast weights.

        The new fast weights require grad where the old ones did.
        """
        fast = self._adaptrt_fast
        before = [] if fast is None else list(fast.versions or [])
        keys = super().load_state_dict(state_dict, strict, assign)
        if fast is not None and before and fast.latest is not None and fast.latest is not before[-1]:
            pairs = zip(fast.latest, before[-1], strict=True)
            assigned = [new if new is old else new.detach().requires_grad_(old.requires_grad) for new, old in pairs]
            fast.versions = before
            fast.update(assigned)
        return keys

    def get_parameter(self, target: str) -> Any:
        """Returns a parameter by its name, which on a handle is a fast weight. `nn.Module` refuses what is no `nn.Parameter`."""
        path, _, name = target.rpartition(".")
        found = self.get_submodule(path)._parameters.get(name)
        return super().get_parameter(target) if found is None else found

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter, which is none of the fast weights. In the place of a fast weight it is what an assignment is."""
        fast = self._adaptrt_fast
        if fast is None or name not in dict(fast.places.of_module[self._adaptrt_number]):
            super().register_parameter(name, param)
            self._adaptrt_changed()
            return
        if name not in self._parameters:  # it was deleted, and comes back
            super().register_parameter(name, param)
        setattr(self, name, param)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Does what it does for any module, if all weights are leaves of the graph.

        Raises:
          NotALeaf: one of them was computed, and is to be frozen.
        """
        with flags_refused():
            return super().requires_grad_(requires_grad)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        self._adaptrt_changed()

    def _adaptrt_changed(self) -> None:
        if self._adaptrt_fast is not None:
            self._adaptrt_fast.forget_twins()


class FunctionalModule(Patched):
    """The root of a handle, which users step and ask for its fast weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy.deepcopy(self._adaptrt_fast, memo)
        return super().__deepcopy__(memo)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._adaptrt_fast is not None:
            self._adaptrt_fast.places.adopt({part._adaptrt_number: part for part in self.modules() if isinstance(part, Patched)})

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """Returns the fast weights, in the order of the model's parameters.

        Args:
          recurse: has no effect; the signature of `nn.Module` has it. All fast weights are returned in either case.
          time: the number of updates after which these were the fast weights. None returns the latest.
        Raises:
          ValueError: there are no fast weights yet, or an earlier version is asked for while `track_higher_grads` is off.
          IndexError: there were fewer updates.
        """
        if self._adaptrt_fast is None:
            return super().parameters(recurse)
        versions = self._adaptrt_fast.versions
        if versions is None:
            raise ValueError("the patched module does not hold fast weights of its own; call update_params first")
        if not recurse:
            warnings.warn("parameters(recurse=False) of a patched module returns the fast weights of all modules", stacklevel=2)
        if not self.track_higher_grads and time not in (None, -1, 0):
            raise ValueError(f"time={time}: only the latest fast weights are kept while track_higher_grads is off; leave time out")
        if time is not None and not -len(versions) <= time < len(versions):
            raise IndexError(f"time={time}: there were {len(versions) - 1} updates of the fast weights; give a time from 0 to that")
        return iter(versions[-1 if time is None else time])

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The fast weights before the first update.

        Raises:
          ValueError: there are no fast weights yet, or `track_higher_grads` is off.
        """
        if not self.track_higher_grads:
            raise ValueError("init_fast_params are kept only while track_higher_grads is on")
        if self._held.versions is None:
            raise ValueError("the patched module does not hold fast weights of its own; call update_params first")
        return self._held.versions[0]

    @property
    def _held(self) -> FastWeights:
        if self._adaptrt_fast is None:
            raise ValueError("a slice of a patched module has no fast weights of its own; use the patched module")
        return self._adaptrt_fast

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest fast weights. Assigning a list of tensors makes them the latest."""
        return self._held.latest

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self._held.update(value)

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Makes `params` the latest fast weights.

        Args:
          params: one tensor for each parameter of the model, in their order.
        Raises:
          IndexError: there are too few.
          TypeError: one of them is no tensor.
        """
        self._held.update(params)

    @property
    def track_higher_grads(self) -> bool:
        """Whether earlier fast weights are kept, so that gradients can flow back to them."""
        return self._held.track

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads must be a bool, got {type(value).__name__}; give True or False")
        self._held.track = value
