"""One inner step as a pure function.

    carry, loss = step(carry, fixed, batch, noise)

The carry is what a step changes, `fixed` what all steps share, and the noise what the model's random operations return. The model is never
changed: its parameters and buffers, too, are arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from adaptrt import tree
from adaptrt.errors import InvalidArgument, InvalidBatch, InvalidLoss, NothingToAdapt, UnsupportedParameter
from adaptrt.functional import call_module
from adaptrt.graph.gradient_mode import GradientMode
from adaptrt.graph.passes.lift_noise import lift_noise
from adaptrt.optim import Optimizer
from adaptrt.optim.tasks import of_one_task
from adaptrt.tree import Tree

LossFunction = Callable[..., Any] | nn.Module | None


class Carry(NamedTuple):
    """What a step changes: adapted parameters by name, optimiser state, buffers by name (those of a loss module behind "loss:")."""

    params: dict[str, Tensor]
    opt_state: Tree
    buffers: dict[str, Tensor]


class Fixed(NamedTuple):
    """What all steps share: parameters that do not adapt, the loss module's parameters, hyperparameters; and what the query loss holds.

    `query_loss` has parameters and buffers of a module that is the query loss alone. No step and no query changes those buffers.
    """

    params: dict[str, Tensor]
    loss_params: dict[str, Tensor]
    hyper: Tree
    query_loss: dict[str, Tensor]


class Batch(NamedTuple):
    """Inputs of the model (a tensor, a tuple or a dict), the target, and the weight of each example.

    `target` is None for a loss without labels. `weights`, [S], is None unless the loss returns one value for each example: their mean by
    these weights is then the loss, and an example of weight 0 is padding.
    """

    inputs: Tree
    target: Tree
    weights: Tensor | None = None


class Evaluation(NamedTuple):
    """What model and loss compute on a batch: the loss (0-dim), the model's output, all buffers as they are left, and whether to update.

    `update` is a bool tensor (0-dim), or None if the loss does not say: then the step is made.
    """

    loss: Tensor
    output: Tree
    buffers: dict[str, Tensor]
    update: Tensor | None


LOSS_BUFFER = "loss:"


def of_model(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the buffers of a carry without those of a loss module."""
    return {name: value for name, value in buffers.items() if not name.startswith(LOSS_BUFFER)}


def of_loss(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the buffers of a loss module in a carry, by their names in it."""
    return {name.removeprefix(LOSS_BUFFER): value for name, value in buffers.items() if name.startswith(LOSS_BUFFER)}


def as_data(value: Tree) -> Batch:
    """Returns a batch as it is, and the inputs of a model as a batch without target."""
    return value if isinstance(value, Batch) else Batch(value, None)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One inner step of `optimizer` on `loss(model(inputs), target)`.

    Attributes:
      model: called as a function and never changed. Its train or eval mode is the one it has when the step is captured.
      loss: a function or module of (output, target), or of (output) for batches without target; None for `default_loss`. It returns a
        scalar, or (scalar, update) with a bool tensor: where that is false the step changes nothing.
      optimizer: `update(grads, state, params, hyper)`. Where no parameters adapt, a step is a forward pass that updates buffers.
      detach_gradient: treat the gradient as a constant, as first-order MAML does.
      as_differentiable: with `detach_gradient`, gradients that users wrote in Python are computed as if they were to be differentiated
        again, which such code can ask for.
      dtype: model and loss run under autocast to it, whatever the caller's autocast is. Parameters, their gradients, the optimiser's state
        and the loss keep their dtypes. None: without autocast.
      mode: the gradient mode in which `query` and `predict` run. The inner steps always have gradients.
      query_loss: the loss of query batches, None for `loss`.
      guard: decides whether the state after the last step is kept (`adaptrt.inner.guard`).
    """

    model: nn.Module
    loss: LossFunction
    optimizer: Optimizer
    detach_gradient: bool = False
    as_differentiable: bool = False
    dtype: torch.dtype | None = None
    mode: GradientMode = GradientMode.GRAD
    query_loss: LossFunction = None
    guard: Callable[..., Any] | None = None

    def __call__(self, carry: Carry, fixed: Fixed, batch: Batch, noise: Sequence[Tensor]) -> tuple[Carry, Tensor]:
        """Returns the carry after the step, and the loss before it (0-dim)."""
        return self.with_output(carry, fixed, batch, noise)[:2]

    def with_output(self, carry: Carry, fixed: Fixed, batch: Batch, noise: Sequence[Tensor]) -> tuple[Carry, Tensor, Tree]:
        """Does the same, and returns the model's output, too, of which the loss was computed."""
        params = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in carry.params.items()}
        with lift_noise(noise):
            loss, output, buffers, update = self.evaluate(params, carry.buffers, fixed, batch)
        grads = self.gradient(loss, params)
        new_params, opt_state = self.update(grads, carry.opt_state, params, fixed.hyper)
        after = Carry(new_params, opt_state, buffers)
        _require_same_specs(carry, after)
        return after if update is None else tree.where(update, after, carry), loss, output

    def update(self, grads: Mapping[str, Tensor], state: Tree, params: Mapping[str, Tensor], hyper: Tree) -> tuple[dict[str, Tensor], Tree]:
        """Returns the parameters and the optimiser's state after its update."""
        result = self.optimizer.update(grads, state, params, of_one_task(hyper))
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Mapping):
            raise InvalidArgument(f"an optimiser's update must return (params, state), got {type(result).__name__}")
        new, state = result
        if set(new) != set(params):
            raise InvalidArgument(f"an optimiser's update must return all parameters, {sorted(params)}, and no others, got {sorted(new)}")
        return {name: new[name] for name in params}, state

    def query(self, carry: Carry, fixed: Fixed, batch: Batch, noise: Sequence[Tensor]) -> Tensor:
        """Returns the query loss of the adapted model (0-dim)."""
        return self.query_and_output(carry, fixed, batch, noise)[0]

    def query_and_output(self, carry: Carry, fixed: Fixed, batch: Batch, noise: Sequence[Tensor]) -> tuple[Tensor, Tree]:
        """Returns the query loss of the adapted model (0-dim), and the model's output."""
        with lift_noise(noise), self.mode.within():
            return self.evaluate(carry.params, carry.buffers, fixed, batch, of_query=True)[:2]

    def predict(self, carry: Carry, fixed: Fixed, inputs: Tree, noise: Sequence[Tensor]) -> Tree:
        """Returns the adapted model's output for `inputs`."""
        with lift_noise(noise), self.mode.within():
            return self.apply(carry.params, carry.buffers, fixed, inputs)[0]

    def gradient(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the loss's gradient by parameter name. Parameters that the loss does not use have no entry."""
        if not params:  # buffers alone adapt
            return {}
        if not loss.requires_grad:
            raise NothingToAdapt(
                "the support loss does not depend on the adapted parameters: check `params=`, and that the model neither detaches its "
                "output nor rounds it to integers"
            )
        grads = self._gradient(loss, params)
        if not grads:
            raise NothingToAdapt(
                f"the support loss does not depend on any adapted parameter ({', '.join(params)}): check `params=`, and that the model "
                "reaches its parts by attributes; a function that was put in the place of forward may hold the model itself"
            )
        return {name: grad.detach() for name, grad in grads.items()} if self.detach_gradient else grads

    def _gradient(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        create_graph = not self.detach_gradient or (self.as_differentiable and _has_gradients_in_python(loss))

        def grad(values: list[Tensor]) -> Sequence[Tensor | None]:
            return torch.autograd.grad(loss, values, create_graph=create_graph, retain_graph=True, allow_unused=True)

        try:
            found = grad(list(params.values()))
        except NotImplementedError as error:
            # PyTorch 2.15 cannot even trace a sparse gradient; ask for one at a time to name the parameter.
            if "Sparse" not in str(error):
                raise
            for name, value in params.items():
                try:
                    grad([value])
                except NotImplementedError:
                    raise _sparse(name) from error
            raise
        for name, value in zip(params, found, strict=True):
            if value is not None and value.layout is not torch.strided:
                raise _sparse(name)
        return {name: value for name, value in zip(params, found, strict=True) if value is not None}

    def evaluate(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], fixed: Fixed, batch: Batch, *, of_query: bool = False
    ) -> Evaluation:
        """Runs model and loss. The caller decides what random operations return (`lift_noise`)."""
        loss, output, updated, update = self._evaluate(params, buffers, fixed, batch, of_query)
        loss = _require_scalar(loss) if batch.weights is None else _weighted_mean(loss, batch.weights)
        return Evaluation(loss if self.dtype is None else loss.to(any_of(params, fixed, buffers).dtype), output, updated, update)

    def losses_of_examples(
        self, carry: Carry, fixed: Fixed, batch: Batch, noise: Sequence[Tensor], *, of_query: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of each example of a batch that has weights, [S], and all buffers as model and loss leave them.

        Raises:
          InvalidLoss: the loss says whether to update, which padding would decide as well.
        """
        with lift_noise(noise):
            losses, _, buffers, update = self._evaluate(carry.params, carry.buffers, fixed, batch, of_query)
        if update is not None:
            raise InvalidLoss(
                "with examples='weighted' the loss must return the losses alone, without update: that would be computed from padding, too. "
                "Give examples that are not to count the weight 0"
            )
        return losses, buffers

    def _evaluate(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], fixed: Fixed, batch: Batch, of_query: bool
    ) -> tuple[Any, Tree, dict[str, Tensor], Tensor | None]:
        """Returns what the loss returned, the model's output, all buffers, and whether to update."""
        with self._precision(params, fixed, buffers):
            output, updated = self.apply(params, buffers, fixed, batch.inputs)
            target = () if batch.target is None else (batch.target,)
            if of_query and self.query_loss is not None:
                loss = self._query_loss(output, target, batch.weights, fixed)
            elif self.loss is None and not (of_query or params or target):  # buffers adapt, for which no loss is needed
                example = any_of(params, fixed, buffers)
                dtype = example.dtype if example.is_floating_point() else torch.get_default_dtype()
                loss = example.new_zeros(() if batch.weights is None else batch.weights.shape, dtype=dtype)
            else:
                loss, updated = self._loss(output, target, batch.weights, fixed, updated)
        loss, update = _as_update(loss)
        return loss, output, updated, update

    def _precision(
        self, params: Mapping[str, Tensor], fixed: Fixed, buffers: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        # Without the cache of casts: it would hand tensors of one capture to the next.
        return torch.autocast(any_of(params, fixed, buffers).device.type, self.dtype, cache_enabled=False)

    def _loss(
        self, output: Tree, target: tuple[Tree, ...], weights: Tensor | None, fixed: Fixed, updated: dict[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Returns the support loss, and all buffers as the loss left them."""
        if not isinstance(self.loss, nn.Module):
            return _value_of(self.loss, output, target, weights), updated
        loss, own = call_module(self.loss, fixed.loss_params, of_loss(updated), (output, *target), {})
        return loss, updated | {LOSS_BUFFER + name: value for name, value in own.items()}

    def _query_loss(self, output: Tree, target: tuple[Tree, ...], weights: Tensor | None, fixed: Fixed) -> Any:
        if not isinstance(self.query_loss, nn.Module):
            return _value_of(self.query_loss, output, target, weights)
        names = {name for name, _ in self.query_loss.named_parameters()}
        params = {name: value for name, value in fixed.query_loss.items() if name in names}
        buffers = {name: value for name, value in fixed.query_loss.items() if name not in names}
        return call_module(self.query_loss, params, buffers, (output, *target), {})[0]

    def apply(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], fixed: Fixed, inputs: Tree
    ) -> tuple[Tree, dict[str, Tensor]]:
        """Returns the model's output, and all buffers as the model left them."""
        args, kwargs = as_call(inputs)
        with self._precision(params, fixed, buffers):
            output, own = call_module(self.model, {**fixed.params, **params}, of_model(buffers), args, kwargs)
        return output, {**buffers, **own}


def any_of(params: Mapping[str, Tensor], fixed: Fixed, buffers: Mapping[str, Tensor]) -> Tensor:
    """Returns a parameter of the model, or a buffer if it has none, of a floating-point dtype if there is any: that of its losses."""
    values = [*params.values(), *fixed.params.values(), *buffers.values()]
    return next((value for value in values if value.is_floating_point()), values[0])


def _value_of(loss: Callable[..., Any] | None, output: Tree, target: tuple[Tree, ...], weights: Tensor | None) -> Any:
    if loss is None:
        return default_loss(output, *target, of_each=weights is not None)
    if not target and not _takes_output_alone(loss):
        raise InvalidBatch("the loss takes (output, target), but the batch has no target; pass (inputs, target), or a loss of (output)")
    return loss(output, *target)


def _sparse(name: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"parameter '{name}' has a sparse gradient; build its embedding with sparse=False")


def as_call(inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments by which a model is called with a batch's inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    return (inputs,), {}


def default_loss(output: Any, target: Tensor | None = None, *, of_each: bool = False) -> Tensor:
    """Computes the output's own loss if it has one, else cross-entropy for integer targets or mean squared error for floating ones.

    `of_each`: of each example, the mean over all axes but the first, of cross-entropy over the labels that are not -100.

    Raises:
      InvalidLoss: none of these applies.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    if not isinstance(output, Tensor):
        raise InvalidLoss(f"loss=None needs a model that returns a tensor or has a `.loss`, got {type(output).__name__}; pass loss=")
    if output.dim() == (1 if of_each and target is None else 0):
        return output
    if target is None:
        raise InvalidLoss(
            f"the batch has no target and the output ({tree.describe(output)}) is not a scalar loss; pass (inputs, target) or loss="
        )
    if target.is_floating_point():
        if target.shape != output.shape:
            raise InvalidBatch(
                f"mean squared error of output {tree.describe(output)} against target {tree.describe(target)}: the shapes must be equal. "
                "For cross-entropy pass class labels as integers, by .long()"
            )
        if of_each:
            return F.mse_loss(output, target, reduction="none").reshape(len(target), -1).mean(1)
        return F.mse_loss(output, target)
    if target.dtype is torch.bool or target.is_complex():
        raise InvalidLoss(f"no default loss for a target of {target.dtype}; pass loss=")
    if of_each:
        target = target.long()
        counts = (target != -100).reshape(len(target), -1).sum(1)
        return F.cross_entropy(output, target, reduction="none").reshape(len(target), -1).sum(1) / counts.clamp(min=1)
    return F.cross_entropy(output, target.long())


def _takes_output_alone(loss: Callable[..., Any]) -> bool:
    try:
        inspect.signature(loss).bind(None)
    except TypeError:
        return False
    except ValueError:  # a built-in function without signature
        return True
    return True


def _as_update(loss: Any) -> tuple[Any, Tensor | None]:
    """Returns the loss, and whether to update if the loss says so by returning (loss, update)."""
    if type(loss) is not tuple or len(loss) != 2:
        return loss, None
    loss, update = loss
    if not isinstance(update, Tensor) or update.dim() != 0 or update.dtype is not torch.bool:
        found = tree.describe(update) if isinstance(update, Tensor) else type(update).__name__
        raise InvalidLoss(
            f"the loss must return a tensor, or (loss, update) with a bool tensor of shape [] as update; got a tuple with {found} as second"
        )
    return loss, update


def _require_scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise InvalidLoss(f"the loss must return a tensor, got {type(loss).__name__}")
    if loss.dim() != 0 or not loss.is_floating_point():
        raise InvalidLoss(
            f"the loss must be a floating-point scalar (shape []), got {tree.describe(loss)}; reduce it, for example with .mean()"
        )
    return loss


def _weighted_mean(losses: Any, weights: Tensor) -> Tensor:
    """Returns sum(w l) / sum(w) over the examples of a batch."""
    if not isinstance(losses, Tensor):
        raise InvalidLoss(f"the loss must return a tensor, got {type(losses).__name__}")
    if losses.shape != weights.shape or not losses.is_floating_point():
        raise InvalidLoss(
            f"with examples='weighted' the loss must return one floating-point value for each example, got {tree.describe(losses)} for "
            f"weights {tree.describe(weights)}; leave out its mean, for example by reduction='none'"
        )
    # Not in the losses' dtype, in which weights or their sum may be 0 or infinite.
    dtype = torch.promote_types(losses.dtype, torch.float32)
    dtype = torch.promote_types(dtype, weights.dtype) if weights.is_floating_point() else dtype
    weights = weights.to(dtype)
    return ((losses.to(dtype) * weights).sum() / weights.sum()).to(losses.dtype)


def _require_same_specs(before: Carry, after: Carry) -> None:
    if tree.flatten(tree.specs(before)) == tree.flatten(tree.specs(after)):
        return
    for name, value in before.buffers.items():
        if tree.Spec.of(value) != tree.Spec.of(after.buffers[name]):
            raise InvalidArgument(
                f"buffer '{name}' is {tree.Spec.of(value)} when a step begins, and {tree.Spec.of(after.buffers[name])} when it ends. If it "
                "gets its shape when the model is first called, call the model once, under no_grad, on a batch of this shape; otherwise "
                "let it keep its shape and dtype"
            )
    raise InvalidArgument(f"a step must keep the structure, shapes and dtypes of what it updates; {tree.difference(before, after)}")


def _has_gradients_in_python(loss: Tensor) -> bool:
    """Whether the gradient of a tensor goes through a `torch.autograd.Function`."""
    seen: set[Any] = set()
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            return True
        seen.add(node)
        left += [following for following, _ in node.next_functions]
    return False
