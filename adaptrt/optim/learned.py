"""A module as an optimiser. The parameters of the module are hyperparameters, so they are meta-learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from adaptrt import tree
from adaptrt.errors import InvalidArgument, InvalidType, OptimizerMismatch
from adaptrt.functional import call_stateless
from adaptrt.optim.base import Optimizer, Params, State
from adaptrt.optim.checks import check_grads


@runtime_checkable
class UpdateRule(Protocol):
    """The module that `learned` takes: it has `initial_state(param)` and `forward(grad, state)`."""

    def initial_state(self, param: Tensor) -> State:
        """Returns the state of one parameter before its first step: a tree of tensors, or `()` for none.

        It may depend on the values of `param` and on learned parameters of the module.
        """
        ...

    def __call__(self, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the step that is added to the parameter, which has the parameter's shape, and the new state."""
        ...


class _Tensors(Mapping[str, Tensor]):
    """The current parameters and buffers of a module, by name."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getitem__(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        return getattr(self._module.get_submodule(path), attribute)

    def __iter__(self) -> Iterator[str]:
        return (name for named in (self._module.named_parameters(), self._module.named_buffers()) for name, _ in named)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def learned(rule: nn.Module) -> Optimizer:
    """Makes an optimiser of a module (Andrychowicz et al. 2016, arXiv 1606.04474).

        step, state = rule(grad, state)
        p = p + step

    The rule is called with one parameter at a time, of any shape; a rule that works element by element treats all axes as a batch. Its
    parameters and buffers are the optimiser's `hyper`, by name. They are inputs of a program, which are read at every call, and
    `loss.backward()` of a compiled unroll fills `rule.parameters().grad`. To train the rule over many steps, make truncated unrolls, each
    of which starts from what the last one returned: `adapted = unroll.adapt(support, start=adapted.detach())`.

    Args:
      rule: an `UpdateRule`: a module with `initial_state(param) -> state` and `forward(grad, state) -> (step, state)`. Its train or eval
        mode is a constant of a program, and is compared before every call. It must not write to its buffers.

    Raises:
      InvalidType: `rule` is not a module, or has no `initial_state`.
      NotTraceable: from `update`: it writes to a buffer.
      InvalidArgument: it has no parameters; or, from `update`, its step does not have the parameter's shape, or its state changes shape.

    Example:
      >>> import torch
      >>> class Scaled(nn.Module):
      ...     def __init__(self) -> None:
      ...         super().__init__()
      ...         self.log_rate = nn.Parameter(torch.tensor(0.0))
      ...
      ...     def initial_state(self, param):
      ...         return torch.zeros_like(param)
      ...
      ...     def forward(self, grad, mean):
      ...         mean = 0.5 * mean + 0.5 * grad
      ...         return -self.log_rate.exp() * mean, mean
      >>> opt = learned(Scaled())
      >>> params = {"w": torch.tensor([1.0, 2.0])}
      >>> new, state = opt.update({"w": torch.tensor([2.0, 0.0])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0., 2.], grad_fn=<AddBackward0>)
    """
    if not isinstance(rule, nn.Module) or not isinstance(rule, UpdateRule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidType(f"learned takes an nn.Module with initial_state(param) and forward(grad, state), got {type(rule).__name__}.")
    if not any(True for _ in rule.parameters()):
        raise InvalidArgument(f"{type(rule).__name__} has no parameters, so there is nothing to learn. Build an Optimizer(init, update).")

    def init(params: Params) -> dict[str, State]:
        return {name: rule.initial_state(p) for name, p in params.items()}

    def update(
        grads: Params, state: Mapping[str, State], params: Params, hyper: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, State]]:
        check_grads(grads, params)
        new, after = dict(params), dict(state)
        for name, grad in grads.items():
            if name not in state:
                raise OptimizerMismatch(f"state has no entry for parameter '{name}', only for {sorted(state)}. Make it by init(params).")
            step, after[name] = call_stateless(rule, hyper, (grad, state[name]))
            if step.shape != grad.shape:
                raise InvalidArgument(
                    f"{type(rule).__name__} must return a step of the parameter's shape {list(grad.shape)} for '{name}', got "
                    f"{list(step.shape)}."
                )
            if tree.flatten(tree.specs(after[name])) != tree.flatten(tree.specs(state[name])):
                raise InvalidArgument(
                    f"{type(rule).__name__} must return a state like the one it got for '{name}': "
                    f"{tree.difference(state[name], after[name])}."
                )
            new[name] = params[name] + step.to(params[name].dtype)
        return new, after

    return Optimizer(init, update, _Tensors(rule), modules=(rule,))
