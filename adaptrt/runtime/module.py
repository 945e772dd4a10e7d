"""The meta-loss as an `nn.Module`, for what PyTorch puts around modules: `DistributedDataParallel`, `fully_shard`, checkpoints.

`DistributedDataParallel` averages the gradients of a module's parameters over processes, and waits for every one of them. So each tensor
by which the meta-loss is differentiated has to be a parameter of this module, and each of these has to get a gradient from every call.

Known limits: what a caller passes to a call is the caller's, so the gradients of data are those of one process. A call reads all parameters
at its beginning: `fully_shard` may wrap the module, but not layers of the model as well.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from adaptrt import tree
from adaptrt.backend.entry_points import entry_point
from adaptrt.errors import InvalidArgument
from adaptrt.runtime.adapted import Adapted
from adaptrt.runtime.settings import Settings


class MetaLoss(nn.Module):
    """The meta-loss of an unroll. `CompiledUnroll.module` makes one.

    Its parameters are the very tensors that the unroll reads. So whatever sets their values changes what the unroll computes: an outer
    optimiser, `load_state_dict`, or `DistributedDataParallel`, which sends those of rank 0 to all processes. A deep copy has copies of all
    of them, and compiles programs of its own. The module cannot be pickled; save its `state_dict()`.

    Attributes:
      model: as given to `compile_unroll`.
      loss, query_loss: likewise, where they are modules.
      optimizer: the modules that the inner optimiser calls, if there are any.
      hyper: the hyperparameters that are an `nn.Parameter` of none of these, if there are any; by their names in the optimiser, with "_" in
        the place of each dot.
    """

    def __init__(self, unroll: Callable[..., Tensor], settings: Settings) -> None:
        super().__init__()
        self._unroll = unroll
        self._settings = settings
        self.model = settings.model
        self.training = settings.model.training
        for name, part in (("loss", settings.loss), ("query_loss", settings.query_loss)):
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        optimizer = settings.source.optimizer()
        if optimizer.modules:
            self.optimizer = nn.ModuleList(optimizer.modules)
        held = {id(value) for value in self.parameters()}
        own = {name: value for name, value in _learned(settings) if isinstance(value, nn.Parameter) and id(value) not in held}
        if own:
            self.hyper = _named_parameters(own)
        self._known = frozenset([name for name, _ in self.named_parameters()])
        self._require_all_held(dict(self.named_parameters()))

    @entry_point
    def forward(
        self,
        support: Any,
        query: Any,
        *,
        reduction: str = "mean",
        every_step: bool = False,
        step_weights: Tensor | None = None,
        start: Adapted | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns the meta-loss, as a call of the unroll does.

        Every parameter of the module that requires grad gets a gradient, of zeros where the meta-loss does not depend on it.

        Args:
          support, query, reduction, every_step, step_weights, start, generator: as for a call of the unroll.
        Raises:
          InvalidArgument: a hyperparameter, a buffer or `step_weights` requires grad and is no parameter of this module, so that its
            gradient would be that of one process; or layers of the model were sharded by themselves.
          AdaptrtError: whatever a call of the unroll raises.
        """
        options = {"reduction": reduction, "every_step": every_step, "step_weights": step_weights, "start": start, "generator": generator}
        named = dict(self.named_parameters())
        for name, value in named.items():
            if type(value).__name__ == "DTensor":
                raise InvalidArgument(
                    f"parameter '{name}' is still sharded while the module runs, because a layer was sharded by itself; call fully_shard "
                    "with unroll.module() alone"
                )
        if not torch.is_grad_enabled():
            return self._unroll(support, query, **options)
        self._require_all_held(named, step_weights)
        loss = self._unroll(support, query, **options)
        # Parameters of the caller's, such as step weights, need not be used; nor does everything depend on those that adapt.
        may_lack = named.keys() - self._known
        if start is not None or every_step or step_weights is not None:
            may_lack |= {f"model.{name}" for name in self._settings.adapted}
        spare = [value for name, value in named.items() if name in may_lack and value.requires_grad] if may_lack else []
        return _WithZeros.apply(loss, *spare) if spare else loss  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return repr(self._unroll)

    def _require_all_held(self, named: Mapping[str, nn.Parameter], step_weights: Tensor | None = None) -> None:
        """Checks that whatever the meta-loss is differentiated by is one of these parameters.

        Raises:
          InvalidArgument: something is not; names it.
        """
        held = {id(value) for value in named.values()}
        for name, value in _learned(self._settings):
            if id(value) not in held:
                raise InvalidArgument(f"hyperparameter '{name}' requires grad and {_ways_out(value)}")
        for name, value in self.named_buffers():
            if value.requires_grad:
                raise InvalidArgument(
                    f"buffer '{name}' requires grad, and gradients of buffers are not averaged over processes; make it an nn.Parameter"
                )
        if isinstance(step_weights, Tensor) and step_weights.requires_grad and step_weights.is_leaf and id(step_weights) not in held:
            raise InvalidArgument(
                "step_weights requires grad and is no parameter of the module, so its gradient would be that of one process; set "
                "module.step_weights = nn.Parameter(...) before the module is wrapped, and pass that"
            )


def _learned(settings: Settings) -> Iterator[tuple[str, Tensor]]:
    """Returns the hyperparameters that require grad, with their names in the optimiser."""
    for name, value in tree.named_leaves(settings.source.hyper()):
        if isinstance(value, Tensor) and value.requires_grad:
            yield name, value


def _ways_out(value: Tensor) -> str:
    if isinstance(value, nn.Parameter):
        return (
            "is another tensor than the one in the module. If it was replaced, call unroll.module() again. Under fully_shard pass "
            "ignored_params={*module.hyper.parameters()}, and average the gradients of these yourself"
        )
    if value.is_leaf:
        return "is a plain tensor, which a module cannot hold; make it an nn.Parameter"
    return (
        "is computed from other tensors, which a module cannot hold; pass a 0-dim nn.Parameter itself, and compute from it by a schedule: "
        "lr=adaptrt.optim.schedule(lambda step, log_lr: log_lr.exp(), log_lr=log_lr)"
    )


def _named_parameters(values: Mapping[str, nn.Parameter]) -> nn.Module:
    """Returns a module that has these parameters, by names without dots that mean nothing else to a module."""
    holder = nn.Module()
    for path, value in values.items():
        name = path.replace(".", "_")
        while hasattr(holder, name):
            name += "_"
        holder.register_parameter(name, value)
    return holder


class _WithZeros(Function):
    """Returns a loss, and gives parameters that it may not depend on gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *params: Tensor) -> Tensor:
        ctx.params = params
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
        return cotangent, *[torch.zeros_like(value) for value in ctx.params]
