"""The model after adaptation, which `CompiledUnroll.adapt` returns."""

from __future__ import annotations

import copy
import dataclasses
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.backend.entry_points import entry_point
from adaptrt.errors import CannotBePickled, CannotBeSet, InvalidArgument, InvalidState, InvalidType, LongChain
from adaptrt.inner.step import Carry, Fixed, as_call
from adaptrt.runtime import saved
from adaptrt.runtime.rows import Rows, Value
from adaptrt.runtime.state import State
from adaptrt.tree import Spec, Tree


class Predictor(Protocol):
    """Computes the outputs of an adapted model.

    Attributes:
      unroll: an object that predictors of one unroll, and of its `vmap()`, share.
    """

    unroll: Any

    def predict(self, state: State, fixed: Fixed, inputs: Tree, generator: torch.Generator | None) -> Any:
        """Returns the model's output for `inputs`."""
        ...

    def state_dict(self, state: State, fixed: Fixed) -> dict[str, Tensor]:
        """Returns the whole model's state dict."""
        ...

    def fingerprint(self, fixed: Fixed) -> dict[str, str]:
        """Returns digests of what does not adapt, by the names of its parts."""
        ...


LONG_CHAIN = 64
"""How many adaptations may follow each other before a warning says that their graphs are kept."""


class Adapted:
    """A model after adaptation: its state, and the means to predict with it. It is immutable.

    A deep copy (`copy.deepcopy`) has the values of the adaptation in memory of its own, without its autograd history, and copies of the
    parameters that did not adapt. It predicts with the same model code. An adaptation cannot be pickled; `save` writes it to a file.

    Attributes:
      state: what the steps changed, as a value.
      losses: support loss before each step, (k,) or [T, k]. They are NaN or infinite where the numbers went wrong. Of `start()` there are
        none, (0,) or [T, 0].
      fixed: what the model needs besides its state. Parameters that did not adapt are the model's own.
      kept: what the guard of `adapt(keep=...)` decided, bool [] or [T]; None without a guard. Where it is false, the state is that before
        the call.
      final_loss: support loss after the last step, [] or [T], whether it was kept or not; None without a guard.
      outputs: what the model returned for the support inputs in the first step, None unless `adapt(outputs="first")` was asked for it.
    """

    _predictor = Value[Predictor]()
    _num_links = Value[int]()
    fixed = Value[Fixed]()
    state = Value[State]()
    losses = Value[Tensor]()
    kept = Value[Tensor | None]()
    final_loss = Value[Tensor | None]()
    outputs = Value[Any]()

    def __init__(
        self,
        predictor: Predictor,
        state: State,
        losses: Tensor,
        fixed: Fixed,
        num_links: int = 0,
        kept: Tensor | None = None,
        final_loss: Tensor | None = None,
        outputs: Any = None,
    ) -> None:
        # `num_links` counts the adaptations before this one whose graphs it holds.
        held = self.__dict__  # attributes cannot be set
        held["_predictor"] = predictor
        held["state"] = state
        held["losses"] = losses
        held["fixed"] = fixed
        held["_num_links"] = num_links
        held["kept"] = kept
        held["final_loss"] = final_loss
        held["outputs"] = outputs

    def __setattr__(self, name: str, value: object = None) -> NoReturn:
        del value
        raise CannotBeSet(
            f"an Adapted has no attribute '{name}' that can be set; adapted.replace(params=..., buffers=..., opt_state=...) returns one "
            "with other values"
        )

    __delattr__ = __setattr__  # pyright: ignore

    def __copy__(self) -> Adapted:
        return Adapted(self._predictor, self.state, self.losses, self.fixed, self._num_links, self.kept, self.final_loss, self.outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        def copied(value: Tensor) -> Tensor:
            if isinstance(value, nn.Parameter):
                return copy.deepcopy(value, memo)
            if id(value) not in memo:  # one task of several has memory for one
                memo[id(value)] = value.detach().clone().requires_grad_(value.is_leaf and value.requires_grad)
            return memo[id(value)]

        other = self._map(copied, self.num_tasks, 0)
        other.__dict__["fixed"] = tree.map_leaves(copied, self.fixed)
        return other

    def _map(self, fn: Callable[[Tensor], Tensor], num_tasks: int | None, num_links: int) -> Adapted:
        """Returns the adaptation with `fn` applied to all of its values: state, losses, what a guard found, and outputs."""
        state = dataclasses.replace(self.state.map(fn), num_tasks=num_tasks)
        losses, *others = tree.map_leaves(fn, (self.losses, self.kept, self.final_loss, self.outputs))
        return Adapted(self._predictor, state, losses, self.fixed, num_links, *others)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        del protocol
        raise CannotBePickled(
            "an Adapted belongs to its unroll, whose programs cannot be pickled; write it with adapted.save(path), compile an unroll in "
            "the other process, and read it with unroll.load(path). adapted.state_dict() can be pickled"
        )

    @property
    def params(self) -> dict[str, Tensor]:
        """Adapted parameters by name, read-only; with a task axis [T, ...] if made by `vmap()`."""
        return self.state.params

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers by name, as the support batches left them, read-only."""
        return self.state.buffers

    @property
    def loss_buffers(self) -> dict[str, Tensor]:
        """Buffers of a loss that is a module, by their names in it, as the support batches left them, read-only."""
        return self.state.loss_buffers

    @property
    def opt_state(self) -> Tree:
        """The optimiser's state, with dicts that are read-only."""
        return self.state.opt_state

    @property
    def num_tasks(self) -> int | None:
        """T, or None without a task axis."""
        return self.state.num_tasks

    @entry_point
    def __call__(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        """Returns the adapted model's output for these arguments; differentiable outside `no_grad`.

        The call does not change any buffer, even one that the model's forward pass would update.

        Args:
          args, kwargs: as the model takes them, or one argument that is like the inputs of a batch `(inputs, target)`: a tensor, or a tuple
            or dict of the model's arguments. Every tensor has a task axis if the adaptation was made by `vmap()`.
          generator: where dropout and other random operations draw from; None for the global generator.
        Raises:
          InvalidType: some inputs are given by position and others by keyword.
        """
        if not args and not kwargs:
            raise InvalidType("an adapted model was called without inputs; there must be a tensor among them, as in adapted(x)")
        if args and kwargs:
            raise InvalidType("pass the model's inputs all by position or all by keyword")
        positional, named = ((), kwargs) if kwargs else as_call(args[0] if len(args) == 1 else args)
        return self._predictor.predict(self.state, self.fixed, named or positional, generator)

    def detach(self) -> Adapted:
        """Returns the same adaptation without its autograd history; the next of several truncated unrolls starts from it.

        Parameters that did not adapt remain the model's own, and still get gradients from predictions.
        """
        return self._map(Tensor.detach, self.num_tasks, 0)

    def replace(
        self,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        opt_state: Tree = None,
        loss_buffers: Mapping[str, Tensor] | None = None,
    ) -> Adapted:
        """Returns the adaptation with some values replaced, to predict with or to go on from with `start=`.

        What a guard has found is not passed on, and neither are outputs.

        Args:
          params, buffers, loss_buffers: by name; those not named stay. With a task axis, a value without one is given to every task.
          opt_state: all of the optimiser's state; None to leave it.
        Raises:
          InvalidArgument, InvalidType, DeviceMismatch: a name that is not there, something that is no tensor, or a shape, dtype, structure
            or device that differs.

        Example:
          >>> from adaptrt import compile_unroll, optim
          >>> unroll = compile_unroll(torch.nn.Linear(2, 1), optim.sgd(lr=0.1), k=2, backend="eager")
          >>> adapted = unroll.adapt((torch.randn(5, 2), torch.randn(5, 1)))
          >>> adapted.replace(params={"bias": torch.zeros(1)}).params["bias"]
          tensor([0.])
        """
        state = self.state.replace(params=params, buffers=buffers, opt_state=opt_state, loss_buffers=loss_buffers)
        return Adapted(self._predictor, state, self.losses, self.fixed, self._num_links)

    def __len__(self) -> int:
        """The number of tasks."""
        return self._over_tasks("len()")

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: int | slice) -> Adapted:
        """Returns the adaptation of one task, without a task axis, or with a slice that of several."""
        num_tasks = self._over_tasks("an index")
        if isinstance(index, slice):
            chosen = range(num_tasks)[index]
            if not chosen:
                raise InvalidArgument(f"the slice {index} holds none of the {num_tasks} tasks")
            places = None if chosen.step == 1 else torch.tensor(chosen, device=self.losses.device)

            def part(value: Tensor) -> Tensor:
                return value[index] if places is None else value.index_select(0, places)

            return self._map(part, len(chosen), self._num_links)
        try:
            place = operator.index(index)
        except TypeError as error:
            raise InvalidType(f"the tasks of an adaptation are indexed by an int or a slice, got {index!r}") from error
        if not -num_tasks <= place < num_tasks:
            raise IndexError(f"there are {num_tasks} tasks, none with the index {place}")
        return self._map(lambda value: value.select(0, place), None, self._num_links)

    def __iter__(self) -> Iterator[Adapted]:
        return iter(self.unbind())

    def unbind(self) -> list[Adapted]:
        """Returns the adaptation of each task, without a task axis; they share the memory of this one, as after `torch.unbind`."""
        num_tasks = self._over_tasks("unbind()")
        return Rows(self if torch.is_grad_enabled() else without_graph(self), num_tasks).taken_out(Adapted)

    def _over_tasks(self, what: str) -> int:
        if self.state.num_tasks is None:
            raise InvalidType(f"{what} needs an adaptation over tasks, made by vmap() or adaptrt.stack(); this one has no task axis")
        return self.state.num_tasks

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the whole model's state after adaptation, detached, under the names of `model.state_dict()`."""
        return self._predictor.state_dict(self.state, self.fixed)

    def save(self, target: saved.Target, *, fingerprint: Mapping[str, str] | None = None) -> None:
        """Writes the adaptation as a safetensors file, which `CompiledUnroll.load` reads: parameters, optimiser state, buffers, losses.

        What did not adapt is not written; a fingerprint of it is, by which loading notices another base. The file is written under another
        name first and then renamed, so it is whole or not there at all.

        Args:
          target: a path; or a binary file that is open, such as an `io.BytesIO`, which is written to as it is.
          fingerprint: what `CompiledUnroll.fingerprint` returned for this base. None to compute it, which reads all that did not adapt.
        Raises:
          OSError: the file cannot be written.
        """
        digests = self._predictor.fingerprint(self.fixed) if fingerprint is None else dict(fingerprint)
        saved.write(target, saved.Saved(self.state.named_tensors(), self.losses, self.num_tasks, digests))

    def clone(self) -> Adapted:
        """Returns the same adaptation in memory of its own, which `unbind()` and an index do not give; gradients flow through it.

        Parameters that did not adapt remain the model's own, so that `adaptrt.stack` takes it together with others of its unroll, which it
        does not with a deep copy.
        """
        return self._map(torch.clone, self.num_tasks, self._num_links)


def made_of(parts: Sequence[Adapted], state: State, losses: Tensor) -> Adapted:
    """Returns the adaptation that was made of others of its unroll. `state`, `losses`: its values."""
    first = parts[0]
    return Adapted(first._predictor, state, losses, first.fixed, max([part._num_links for part in parts]))


def without_graph(adapted: Adapted) -> Adapted:
    """Returns the adaptation itself if it has no autograd history, else what `detach` does."""
    return adapted.detach() if any([value.requires_grad for value in (*adapted.state.leaves, adapted.losses)]) else adapted


def are_of_one_unroll(one: Adapted, other: Adapted) -> bool:
    """Whether both are of one unroll, or of its `vmap()`, and share the parameters that did not adapt."""
    if one._predictor is not other._predictor and one._predictor.unroll is not other._predictor.unroll:
        return False
    own, others = one.fixed.params, other.fixed.params
    return not own or own is others or all(map(operator.is_, own.values(), others.values()))


def is_of_unroll_of(adapted: Adapted, predictor: Predictor) -> bool:
    """Whether an adaptation is of the unroll that a predictor is of, of its `vmap()` or of its `clone()`."""
    return adapted._predictor is predictor or adapted._predictor.unroll is predictor.unroll


def num_links_after(start: Adapted, leaves: Sequence[Tensor]) -> int:
    """Returns how many adaptations' graphs a result holds that was started from `start` and has these tensors. Warns once of many."""
    if not any([value.grad_fn is not None for value in leaves]) or not any([value.grad_fn is not None for value in start.state.leaves]):
        return 0
    if start._num_links + 1 == LONG_CHAIN:
        warnings.warn(
            f"{LONG_CHAIN} adaptations follow each other by start=, and each keeps what backward() through all of them needs. If there "
            "is no such backward(), call detach() on what start= is given, or adapt under torch.inference_mode()",
            LongChain,
            stacklevel=4,
        )
    return start._num_links + 1


def restored(predictor: Predictor, source: saved.Source, carry: Carry, fixed: Fixed, base: Mapping[str, str]) -> Adapted:
    """Returns the adaptation that `Adapted.save` wrote.

    Args:
      predictor, fixed: of the adaptation.
      source: the path of the file, or what it holds.
      carry: the state of one task that is at hand, for names, shapes, dtypes and the device.
      base: digests of what does not adapt at hand.
    Raises:
      InvalidState, OSError: as `CompiledUnroll.load` documents.
    """
    found = saved.read(source)
    path = source if isinstance(source, str | os.PathLike) else "the saved state"
    leaves, structure = tree.flatten(carry)
    names = tree.paths(carry)
    cpu, lead = torch.device("cpu"), () if found.num_tasks is None else (found.num_tasks,)
    specs = [dataclasses.replace(spec, shape=(*lead, *spec.shape), device=cpu) for spec in map(Spec.of, leaves)]
    wanted = dict(zip(names, specs, strict=True))
    if wanted != {name: Spec.of(value) for name, value in found.tensors.items()}:
        raise InvalidState(
            f"{path} holds the state of another model, selection of parameters or optimiser: {tree.difference(wanted, found.tensors)}"
        )
    other = [name for name, digest in base.items() if found.fingerprint.get(name, digest) != digest]
    if other:
        raise InvalidState(
            f"{path} was adapted from another base: {', '.join(other)} had other values then. Load the weights that the base had, and "
            "clear attributes that only cache something"
        )
    device = next(value.device for value in (*leaves, *tree.leaves(fixed)))
    leaves = [found.tensors[name].to(device) for name in names]
    state = State(tuple(leaves), tree.form_of(structure, leaves), found.num_tasks)
    return Adapted(predictor, state, found.losses.to(device), fixed)
