"""An adjoint: the strategy by which the meta-gradient returns through the k steps.

Notation: phi is the inner state (`Carry`), lambda its cotangent, eta what all steps share (`Fixed`). A pullback is a vector-Jacobian
product: from cotangents of a function's results to gradients of its arguments. An adjoint decides which programs are compiled and in which
order they run. It is given the step, and asks `Programs` for compiled functions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.inner.diagnose import refuse_once_differentiable
from adaptrt.inner.step import Batch, Carry, Fixed, Step

Noise = tuple[Tensor, ...]


class Programs(Protocol):
    """Compiles functions, and finds them again by name. Each is captured and compiled at its first call, from the arguments of that call.

    `arguments` says what each argument is: "start" (the first carry), "carry" (a later one), "fixed", "support" (all of it), "batch" (one
    step's), "query", "noise" or "cotangent". Under a task axis all but "start" and "fixed" have one, and "start" has one when it comes from
    an earlier adaptation. The function itself is always that of one task. With `loop`, the calls of what is returned are taken for
    those of one loop.
    """

    def program(self, name: str, fn: Callable[..., Any], arguments: Sequence[str], loop: Loop | None = None) -> Callable[..., Any]: ...

    def report(self, name: str, value: Tensor, limit: float, advice: str) -> None:
        """Keeps a number of the last call, [] or [T], for `explain()`; warns where it is above the limit, if looking costs little."""
        ...

    def stashed(
        self, name: str, fn: Callable[..., Any], arguments: Sequence[str], wrt: Wrt, loop: Loop | None
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Returns (*args) -> (outputs, stash) and (*args, stash, cotangents) -> gradients.

        They do what `program` and `pullback` do, and nothing expensive twice: the stash holds what the second needs of the first.
        """
        ...

    def pullback(
        self,
        name: str,
        fn: Callable[..., Any],
        arguments: Sequence[str],
        wrt: Wrt,
        value: bool = False,
        loop: Loop | None = None,
    ) -> Callable[..., Any]:
        """Returns (*args, cotangents) -> gradients, or -> (outputs, gradients) if `value`.

        Gradients of what tasks share are summed over the tasks.
        """
        ...


@dataclasses.dataclass(slots=True)
class Loop:
    """The calls of a loop over one function, which takes a carry and returns the next one and a loss.

    Some arguments are the same in all calls, and so is every part of the carry that the function returns unchanged.

    Attributes:
      same: for each argument whether it is the same in all calls.
      shared: results that depend on nothing else and are worth keeping; the first call computes them.
    """

    same: tuple[bool, ...]
    shared: list[Tensor] | None = None


class Wrt(NamedTuple):
    """Which leaves of each argument get a gradient (None: none of them), and which leaves of the result have a cotangent."""

    args: tuple[Sequence[bool] | None, ...]
    result: Sequence[bool]


class Differentiated(NamedTuple):
    """For each leaf of a call's arguments whether the caller wants its gradient."""

    start: tuple[bool, ...]
    fixed: tuple[bool, ...]
    support: tuple[bool, ...]
    query: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """What is the same for all calls of one shape.

    Attributes:
      step, k, per_step, updates_per_step: the inner loop.
      differentiated: which leaves of the arguments get a gradient.
      carry: for each leaf of the carry whether a gradient can flow through it from step to step.
      task_axis: whether data and results have a leading axis of tasks.
      start_has_task_axis: whether the first carry has one already, because it comes from an earlier adaptation.
      in_loop: whether steps are programs that leave out what all steps share; None for whenever there are several.
    """

    step: Step
    k: int
    per_step: bool
    differentiated: Differentiated
    carry: tuple[bool, ...]
    task_axis: bool = False
    start_has_task_axis: bool = False
    updates_per_step: int = 1
    in_loop: bool | None = None

    @property
    def key(self) -> Hashable:
        """Everything in which the problems of one plan differ."""
        return self.differentiated, self.start_has_task_axis, self.k


class Task(NamedTuple):
    """The arguments of one call: where to start, what is shared, the support data, and each update's noise."""

    start: Carry
    fixed: Fixed
    support: Batch
    noise: tuple[Noise, ...]


class Query(NamedTuple):
    """The query data, and the noise of the query loss."""

    batch: Batch
    noise: Noise


class Gradients(NamedTuple):
    """Gradients of the leaves that `Problem.differentiated` marks, in their order."""

    start: Sequence[Tensor]
    fixed: Sequence[Tensor]
    support: Sequence[Tensor]
    query: Sequence[Tensor]


class Adaptation(NamedTuple):
    """The carry after k steps, the losses before each, (k,) or [T, k] with tasks, and what the adjoint kept for its pullback."""

    carry: Carry
    losses: Tensor
    kept: Any


class Adjoint(abc.ABC):
    """A strategy for the meta-gradient: how the k steps run, and how a cotangent of their result returns through them.

    `adapt` and `adapt_pullback` are the strategy. The meta-loss and its gradient follow from them by the query loss; a strategy overrides
    these two where it has a better way. Instances are immutable and hold no tensors.
    """

    takes_any_k: bool = True
    """Whether its programs are those of one step, so that another number of steps needs no others."""
    needs_fixed_point: bool = False
    """Whether it is right only where the steps have converged, so that what has no fixed point is refused."""
    detach_gradient: bool = False
    """Whether the inner gradients are constants to it."""
    sees_all_data: bool = False
    """Whether each of its programs, pullbacks of `adapt` aside, is given all of a call's data, and so can check it."""

    def num_constant_steps(self, k: int) -> int:
        """Returns through how many of the first of k steps nothing is differentiated."""
        del k
        return 0

    @abc.abstractmethod
    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        """Runs the k steps.

        Args:
          programs: compiles functions.
          problem: what all calls of this shape share.
          task: the arguments.
          keep: whether to keep what `adapt_pullback` needs.
        """

    @abc.abstractmethod
    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        """Returns the gradients of what `problem.differentiated` marks in start, fixed and support; none of the query.

        Args:
          programs, problem, task: as `adapt` got them.
          kept: what `adapt` kept.
          carry, losses: cotangents of the last carry (of the leaves in `problem.carry`), and of the losses.
        """

    def meta_loss(self, programs: Programs, problem: Problem, task: Task, query: Query) -> Tensor:
        """Returns the query loss after adaptation, one for each task."""
        carry = self.adapt(programs, problem, task, keep=False).carry
        return programs.program("query", problem.step.query, _QUERY)(carry, task.fixed, *query)

    def meta_loss_and_gradients(
        self, programs: Programs, problem: Problem, task: Task, query: Query, cotangent: Tensor
    ) -> tuple[Tensor, Gradients]:
        """Returns the query loss, and its gradients times `cotangent`."""
        adapted = self.adapt(programs, problem, task, keep=True)
        wrt = Wrt((problem.carry, problem.differentiated.fixed, problem.differentiated.query, None), (True,))
        pullback = programs.pullback("query pullback", problem.step.query, _QUERY, wrt, value=True)
        loss, (carry, fixed, batch, _) = pullback(adapted.carry, task.fixed, *query, [cotangent])
        # No cotangent reaches the support losses; zeros keep one pullback program for this call and for that of `adapt`.
        zeros = torch.zeros_like(adapted.losses)
        found = self.adapt_pullback(programs, problem, task, adapted.kept, carry, zeros)
        of_fixed = [of_query + of_steps for of_query, of_steps in zip(fixed, found.fixed, strict=True)]
        return loss, found._replace(fixed=of_fixed, query=batch)

    def adapt_program(self, programs: Programs, problem: Problem) -> Callable[..., Any] | None:
        """Returns the one program that is the whole of `adapt`, None if it takes several.

        It takes (start, fixed, support, noise) and returns (carry, losses).
        """
        del programs, problem
        return None

    def meta_gradient_program(self, programs: Programs, problem: Problem) -> Callable[..., Any] | None:
        """Returns the one program that is the whole of `meta_loss_and_gradients`, None if it takes several.

        It takes (start, fixed, support, noise, query, query noise, [cotangent]) and returns the loss and the gradients of each argument.
        """
        del programs, problem
        return None


_QUERY = ("carry", "fixed", "query", "noise")


def pull_back(fn: Callable[..., Any], wrt: Wrt, value: bool) -> Callable[..., Any]:
    """Returns the vector-Jacobian product of `fn`, as a function to capture: (*args, cotangents) -> gradients.

    Gradients come as one list for each argument; a leaf on which no result depends gets zeros.

    Args:
      fn: a pure function of trees of tensors.
      wrt: which leaves to differentiate, and which results have cotangents.
      value: return (fn(*args), gradients) instead.
    """

    def run(*args_and_cotangents: Any) -> Any:
        *args, cotangents = args_and_cotangents
        live: list[list[Tensor]] = []
        rebuilt: list[Any] = []
        for arg, flags in zip(args, wrt.args, strict=True):
            values, structure = tree.flatten(arg)
            flags = flags or [False] * len(values)
            values = [v.detach().requires_grad_() if flag else v for v, flag in zip(values, flags, strict=True)]
            live.append([v for v, flag in zip(values, flags, strict=True) if flag])
            rebuilt.append(tree.unflatten(structure, values))
        result = fn(*rebuilt)
        marked = [leaf for leaf, flag in zip(tree.leaves(result), wrt.result, strict=True) if flag]
        refuse_once_differentiable(marked)
        pairs = [(leaf, cotangent) for leaf, cotangent in zip(marked, cotangents, strict=True) if leaf.requires_grad]
        inputs = [leaf for group in live for leaf in group]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if pairs and inputs:
            found = torch.autograd.grad([leaf for leaf, _ in pairs], inputs, [cotangent for _, cotangent in pairs], allow_unused=True)
        grads = iter([torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(inputs, found, strict=True)])
        gradients = tuple([next(grads) for _ in group] for group in live)
        return (result, gradients) if value else gradients

    return run
