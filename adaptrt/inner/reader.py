"""Reads the model and the optimiser at every call: parameters, buffers, train or eval mode, hyperparameters and optimiser state."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.errors import DeviceMismatch, InvalidArgument, InvalidType, ModelChanged, NothingToAdapt, OptimizerMismatch
from adaptrt.functional import canonical_names
from adaptrt.graph.defaults import NAMES, SETTINGS
from adaptrt.graph.surroundings import refuse_recorders
from adaptrt.inner import check
from adaptrt.inner.model_tree import ModelTree
from adaptrt.inner.python_state import PythonState
from adaptrt.inner.step import LOSS_BUFFER, Carry, Fixed, LossFunction, Step
from adaptrt.optim import PerTask, Schedule
from adaptrt.optim.source import Reading, Source


class Start(NamedTuple):
    """What a call starts from.

    Attributes:
      held: the carry, or the form that makes it of its leaves; most calls need its leaves alone.
      fixed: what steps share.
      carry_leaves, fixed_leaves: the tensors in carry and `fixed`, in order.
      structure: everything besides the shapes of its arguments that makes another step: modes, and the form of the optimiser.
      has_tasks: whether the carry has a task axis already, because it comes from an earlier adaptation.
    """

    held: Carry | tree.Form
    fixed: Fixed
    carry_leaves: Sequence[Tensor]
    fixed_leaves: Sequence[Tensor]
    structure: Hashable
    has_tasks: bool = False

    @property
    def carry(self) -> Carry:
        """What steps change."""
        return self.held if isinstance(self.held, Carry) else self.held.tree(self.carry_leaves)


class Reader:
    """Reads what every program takes from the model and the optimiser.

    Args:
      model: its modules are looked up once, their tensors are read at every call.
      loss, query_loss: if they are modules, their parameters and buffers are read in the same way.
      adapted: names of the parameters that adapt.
      source: the optimiser.
      device: of the model.
      dtype: of the autocast that a step runs in, None if it runs in none.
      selection: finds the parameters that adapt again, to see whether they are still the same.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        query_loss: LossFunction,
        adapted: frozenset[str],
        source: Source,
        device: torch.device,
        dtype: torch.dtype | None = None,
        selection: Callable[[], frozenset[str]] | None = None,
    ) -> None:
        self._model = model
        self._loss = loss
        self._query_loss = query_loss
        self._source = source
        self._device = device
        self._dtype = dtype
        self._selection = selection
        self._flags = self._read_flags()
        parameters = _places(model, dict(model.named_parameters()))
        self._adapted = {name: place for name, place in parameters.items() if name in adapted}
        self._frozen = {name: place for name, place in parameters.items() if name not in adapted}
        self._buffers = _places(model, dict(model.named_buffers()), "_buffers")
        self._modules = list(model.modules())
        self._loss_params: dict[str, _Place] = {}
        if isinstance(loss, nn.Module):
            self._loss_params = _places(loss, dict(loss.named_parameters()))
            self._buffers |= {LOSS_BUFFER + name: place for name, place in _places(loss, dict(loss.named_buffers()), "_buffers").items()}
            self._modules += list(loss.modules())
        of_query_loss: dict[str, _Place] = {}
        if isinstance(query_loss, nn.Module):
            of_query_loss = _places(query_loss, dict(query_loss.named_parameters()))
            of_query_loss |= _places(query_loss, dict(query_loss.named_buffers()), "_buffers")
            self._modules += list(query_loss.modules())
        self._read_tensors = _all_by(self._adapted, self._buffers, self._frozen, self._loss_params, of_query_loss)
        self._num_tensors = len({id(value) for part in self._read_tensors() for value in part.values()})
        self._read_modes = _modes_by(self._modules)
        losses = {"loss": loss, "query_loss": query_loss}
        self._tree = ModelTree({"model": model, **{name: part for name, part in losses.items() if isinstance(part, nn.Module)}})
        self.python = PythonState({"model": model, **losses, "the optimiser's update": source.optimizer().update})
        self._numbers: dict[float, Tensor] = {}
        self._hyper: tuple[Reading | None, Any, list[Tensor]] = None, None, []
        self._state: tuple[Any, list[Tensor]] = None, []

    def read(self) -> Start:
        """Reads the values that model and optimiser have now, from which an adaptation starts."""
        self._tree.require_unchanged()
        reading = self._source.read()
        known, hyper, hyper_leaves = self._hyper
        if known is not reading:
            hyper = self._tensors(reading.hyper)
            hyper_leaves = tree.leaves(hyper)
            # What another device was given a copy of may change in place.
            if all(value.device == self._device for value in tree.leaves(reading.hyper)):
                self._hyper = reading, hyper, hyper_leaves
        state, state_leaves = self._state
        if state is not reading.state:  # most often it is one that never changes
            state, state_leaves = self._state = reading.state, tree.leaves(reading.state)
        params, buffers, frozen, loss_params, of_query_loss = self._read_tensors()
        if self._source.starts_from_values:
            state = self._source.state_for(params)
            state_leaves = tree.leaves(state)
        return Start(
            Carry(params, state, buffers),
            Fixed(frozen, loss_params, hyper, of_query_loss),
            [*params.values(), *state_leaves, *buffers.values()],
            [*frozen.values(), *loss_params.values(), *hyper_leaves, *of_query_loss.values()],
            (self._read_modes(), reading.structure, self.python.number()),
        )

    def opt_state_for(self, params: Mapping[str, Tensor], has_tasks: bool) -> Any:
        """Returns the optimiser's state to start from with these values of the adapted parameters, None if they do not matter.

        Args:
          params: by name.
          has_tasks: whether each value has a task axis, and so the state.
        """
        state_for = self._source.state_for
        if not has_tasks:
            return state_for(params)
        if state_for({name: value[0] for name, value in params.items()}) is None:
            return None
        return torch.func.vmap(state_for)(dict(params))

    def plain_tensors(self) -> list[tuple[str, Tensor]]:
        """Returns the tensors that modules hold as plain attributes, with their names."""
        roots = {"model": self._model, "loss": self._loss, "query_loss": self._query_loss}
        return [
            (".".join(part for part in (root, path, name) if part), value)
            for root, module in roots.items()
            if isinstance(module, nn.Module)
            for path, part_of in module.named_modules()
            for name, value in vars(part_of).items()
            if isinstance(value, Tensor)
        ]

    def state_dict(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the model's state dict, detached, with `values` in the place of its own parameters and buffers.

        Args:
          values: by name. A tensor that the model knows by several names is given by the first.
        """
        first = self.state_dict_names()
        return {
            name: values[first[name]].detach() if first.get(name) in values else held for name, held in self._model.state_dict().items()
        }

    def state_dict_names(self) -> dict[str, str]:
        """Returns for each tensor of the model's state dict that is a parameter or buffer the first name of it."""
        named = [*self._model.named_parameters(remove_duplicate=False), *self._model.named_buffers(remove_duplicate=False)]
        first = canonical_names(named)
        return {name: first[name] for name in self._model.state_dict() if name in first}

    def mode(self) -> Hashable:
        """Returns what is a constant of a program: train or eval mode of every module, settings of PyTorch's, and Python values."""
        self._tree.require_unchanged()
        return self._read_modes(), self.python.number()

    def require_same_selection(self) -> None:
        """Checks that the parameters that adapt are still those that `compile_unroll` found.

        Raises:
          ModelChanged: `requires_grad` was changed, and `compile_unroll` would now find others; or two tensors were made one, or the model
            was moved to another device. Names the first.
          UnsupportedParameter, DeviceMismatch: a parameter is now of a kind that cannot be adapted.
        """
        if len({id(value) for part in self._read_tensors() for value in part.values()}) != self._num_tensors:
            self._tree.require_same_tensors()
        flags = self._read_flags()
        if flags == self._flags or self._selection is None:
            return
        device = check.model_device(self._model, may_lack_parameters=not self._adapted)
        if device != self._device:
            raise ModelChanged(
                f"the model was moved from {self._device} to {device} after compile_unroll; make a new unroll, or move it back"
            )
        try:
            now = self._selection()
        except NothingToAdapt:
            now = frozenset[str]()
        for name in sorted(now ^ self._adapted.keys()):
            raise ModelChanged(
                f"requires_grad of parameter '{name}' was changed after compile_unroll, which decided that it "
                f"{'adapts' if name in self._adapted else 'does not adapt'} (peft's set_adapter and "
                "disable_adapter change it, too); make a new unroll, or say which parameters adapt by params="
            )
        self._flags = flags

    def changed_specs(self) -> str:
        """Says in words which parameter or buffer has another shape, dtype or device than at first; empty if none has."""
        return self._tree.changed_specs()

    def _read_flags(self) -> Sequence[Hashable]:
        return [(param.requires_grad, param.layout, param.device) for param in self._model.parameters()]

    def step(self, detach_gradient: bool) -> Step:
        """Returns the inner step for the optimiser's present form."""
        return Step(self._model, self._loss, self._source.optimizer(), detach_gradient, dtype=self._dtype, query_loss=self._query_loss)

    def _tensors(self, hyper: Any, name: str = "") -> Any:
        if isinstance(hyper, Tensor):
            if hyper.device == self._device:
                return hyper
            if hyper.dim() or hyper.device.type != "cpu":
                raise DeviceMismatch(
                    f"the optimiser's {name} is on {hyper.device}, the model on {self._device}; call .to('{self._device}') on it"
                )
            return hyper.to(self._device)
        if isinstance(hyper, PerTask):
            return PerTask(self._tensors(hyper.values, name))
        if isinstance(hyper, Schedule):
            return Schedule(hyper.fn, self._tensors(hyper.numbers, name))
        if isinstance(hyper, Mapping):
            return {key: self._tensors(value, f"{name}.{key}".lstrip(".")) for key, value in hyper.items()}
        if isinstance(hyper, tuple | list):
            return tuple([self._tensors(value, name) for value in hyper])
        number = self._numbers.get(hyper)
        if number is None:
            if len(self._numbers) >= _MAX_NUMBERS:
                self._numbers = {}
            refuse_recorders()  # the tensor would be of that mode for ever
            # In double precision, as Python numbers are; kept for later calls, so not an inference tensor.
            with torch.inference_mode(False):
                number = self._numbers[hyper] = torch.tensor(hyper, dtype=torch.float64, device=self._device)
        return number


_Place = tuple[nn.Module, str, str]
"""Module, the table of it that holds the tensor (`_parameters` or `_buffers`), and the name there."""

_MAX_NUMBERS = 256


def _places(root: nn.Module, named: Mapping[str, Tensor], table: str = "_parameters") -> dict[str, _Place]:
    """Returns for each tensor the place that holds it."""
    found: dict[str, _Place] = {}
    for name in named:
        path, _, attribute = name.rpartition(".")
        found[name] = root.get_submodule(path), table, attribute
    return found


def _all_by(*groups: Mapping[str, _Place]) -> Callable[[], Sequence[dict[str, Tensor]]]:
    """Returns a function that reads the tensors of all groups, generated for exactly these places."""
    constants: dict[str, Any] = {}
    parts: list[str] = []
    for places in groups:
        items: list[str] = []
        for name, (module, table, attribute) in places.items():
            constants[f"m{len(constants)}"] = module
            items.append(f"{name!r}: m{len(constants) - 1}.{table}[{attribute!r}]")
        parts.append(f"{{{', '.join(items)}}}")
    at_once = eval(f"lambda: ({', '.join(parts)})", constants)

    def read() -> Sequence[dict[str, Tensor]]:
        try:
            return at_once()
        except KeyError:
            return [_read(places) for places in groups]

    return read


def _modes_by(modules: Sequence[nn.Module]) -> Callable[[], Hashable]:
    constants: dict[str, Any] = {f"m{index}": module for index, module in enumerate(modules)}
    constants |= NAMES
    return eval(f"lambda: ({SETTINGS}, {', '.join(f'm{index}.training' for index in range(len(modules)))})", constants)


def _read(places: Mapping[str, _Place]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (module, table, attribute) in places.items():
        held = getattr(module, table).get(attribute)
        found[name] = getattr(module, attribute) if held is None else held  # it was moved, as a parametrization does
    return found


Select = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


class Selection(NamedTuple):
    """What decides which parameters adapt; called, it returns their names, as `adapted_names` does."""

    model: nn.Module
    opt: Any
    select: Select
    loss: object = None

    def __call__(self) -> frozenset[str]:
        return adapted_names(self.model, self.opt, self.select, self.loss)


def adapted_names(model: nn.Module, opt: Any, select: Select, loss: object = None) -> frozenset[str]:
    """Returns the names of the parameters that adapt, by the rules that `compile_unroll` documents.

    Raises:
      OptimizerMismatch: the optimiser holds parameters that are not the model's, or lacks one that `select` asks for.
      InvalidArgument: `select` asks for parameters although there is no optimiser.
      NothingToAdapt: there is none, or without an optimiser no buffer.
    """
    named = dict(model.named_parameters())
    if opt is None:
        if select is not None:
            raise InvalidArgument(
                f"params={select!r} selects parameters, and without an optimiser only buffers adapt; leave one of them out"
            )
        if not any(dict(part.named_buffers()) for part in (model, loss) if isinstance(part, nn.Module)):
            raise NothingToAdapt(f"without an optimiser only buffers adapt, and {type(model).__name__} has none")
        return frozenset()
    held = {id(param) for group in opt.param_groups for param in group["params"]} if isinstance(opt, torch.optim.Optimizer) else None
    own = {id(param) for param in named.values()}
    foreign = [param for group in opt.param_groups for param in group["params"] if id(param) not in own] if held is not None else []
    if foreign:
        raise OptimizerMismatch(
            f"opt holds {len(foreign)} parameters that the model does not have (the first of shape {list(foreign[0].shape)}); build it "
            "from this model's parameters()"
        )
    if select is None:
        chosen = {name for name, param in named.items() if param.requires_grad and (held is None or id(param) in held)}
        reason = "none requires grad" if held is None else "none that requires grad is in opt"
    else:
        every = dict(model.named_parameters(remove_duplicate=False))
        first = canonical_names(every.items())
        chosen = {first[name] for name, param in every.items() if _selects(select, name, param)}
        reason = f"params={select!r} matches none of {', '.join(named)}"
        missing = [name for name in chosen if held is not None and id(named[name]) not in held]
        if missing:
            raise OptimizerMismatch(
                f"params= asks for {', '.join(sorted(missing))}, which opt does not hold; add them to a parameter group"
            )
    if not chosen:
        raise NothingToAdapt(f"no parameter to adapt: {reason}")
    return frozenset(chosen)


def _selects(select: Select, name: str, param: nn.Parameter) -> bool:
    if isinstance(select, str):
        return fnmatch.fnmatchcase(name, select)
    if isinstance(select, Sequence) and all(isinstance(pattern, str) for pattern in select):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in select)
    if callable(select):
        return bool(select(name, param))
    raise InvalidType(f"params must be a glob, a list of globs or a predicate of (name, parameter), got {select!r}")
