"""The public face of an unroll: its arguments and results, documented. `Execution` runs its calls."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.backend.entry_points import entry_point
from adaptrt.backend.tiered import TieredRunner, call_ended
from adaptrt.errors import CannotBePickled, CannotBeSet, InvalidArgument
from adaptrt.graph.ir import Graph
from adaptrt.inner import check
from adaptrt.inner.guard import Moment
from adaptrt.runtime.adapted import Adapted
from adaptrt.runtime.execution import Execution, Result
from adaptrt.runtime.explain import Explanation, explain
from adaptrt.runtime.module import MetaLoss
from adaptrt.runtime.saved import Source
from adaptrt.runtime.settings import Settings

Keep = str | Callable[[Moment, Moment], Tensor] | None
"""The name of a guard, or a function; None for no guard."""


FORMATS_OF_EXPORT = ("pt2", "onnx", "torchscript", "exported_program")


def _silent(message: str) -> None:
    del message


class CompiledUnroll:
    """k inner steps and their meta-gradient, as programs. Made by `compile_unroll`; safe to call from several threads.

    A deep copy has copies of model, loss and optimiser, and compiles programs of its own. An unroll cannot be pickled.
    """

    _settings: Settings
    _execution: Execution

    def __init__(self, settings: Settings, task_axis: bool = False) -> None:
        held = self.__dict__  # attributes cannot be set
        held["_settings"] = settings
        held["_execution"] = Execution(settings, task_axis)

    def __setattr__(self, name: str, value: object = None) -> NoReturn:
        del value
        raise CannotBeSet(
            f"an unroll has no attribute '{name}' that can be set; call compile_unroll for other settings. Weights, buffers, modes and "
            "hyperparameters are read from model and optimiser at every call"
        )

    __delattr__ = __setattr__  # pyright: ignore

    def __copy__(self) -> CompiledUnroll:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledUnroll:
        return CompiledUnroll(copy.deepcopy(self._settings, memo), self._execution.task_axis)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        del protocol
        raise CannotBePickled(
            "an unroll holds compiled programs and cannot be pickled; save model.state_dict(), or send it to a process that was started "
            "with the method 'spawn', and call compile_unroll there"
        )

    def __repr__(self) -> str:
        tasks = ", over tasks" if self._execution.task_axis else ""
        return f"CompiledUnroll({type(self._settings.model).__name__}, k={self._settings.k}, backend={self._settings.backend.name}{tasks})"

    @property
    def k(self) -> int:
        """The number of inner steps."""
        return self._settings.k

    @property
    def device(self) -> torch.device:
        """Where the model was when the unroll was made, and where data has to be."""
        return self._settings.device

    @property
    def examples(self) -> str:
        """What `compile_unroll` was given: "equal", or "weighted" if batches end with weights of their examples."""
        return "weighted" if self._settings.weighted else "equal"

    @property
    def per_step(self) -> bool:
        """Whether support data has an axis of length k, one batch for each step."""
        return self._settings.per_step

    @property
    def has_task_axis(self) -> bool:
        """Whether data has a leading axis of tasks, as after `vmap()`."""
        return self._execution.task_axis

    @entry_point
    def adapt(
        self,
        support: Any,
        *,
        steps: int | None = None,
        keep: Keep = None,
        outputs: str | None = None,
        start: Adapted | None = None,
        generator: torch.Generator | None = None,
    ) -> Adapted:
        """Adapts the model to a support batch.

        Differentiable outside `no_grad`: parameters, hyperparameters, support data and `start` that require grad get gradients from
        whatever is computed from the result.

        Args:
          support: `(inputs, target)` or `(inputs,)`; inputs a tensor, tuple or dict. Axes [S, ...] = support examples first, behind steps k
            with `per_step` and tasks T with `vmap`: [T, k, S, ...].
          steps: how many steps to make, None for k. Adjoints whose programs are those of one step take any number without compiling again.
          keep: a guard, which decides by task whether the result is kept: "finite" if all losses and all numbers of the state are;
            "not_worse" if they are and the support loss is at most what it was; or a function of (before, after), two
            `adaptrt.inner.guard.Moment`, that returns a bool tensor of shape []. It is captured, as the loss is. Where it is false the
            result has the state that the call started from, bit for bit, optimiser and buffers included. `Adapted.kept` says what was
            decided. It takes one more evaluation of the support loss, `Adapted.final_loss`; with `per_step`, on the last step's batch.
            A gradient through steps that overflowed is NaN even where they were not kept.
          outputs: "first" to have `Adapted.outputs`, what the model returned for the support inputs in the first step, that is before it;
            a prediction for them then needs no second forward pass. The first step becomes a program of its own.
          start: go on from an earlier result, its optimiser state included, or from what `start()` returned, instead of from the present
            values of model and optimiser. With a task axis each task goes on from its own; a start without one is that of every task.
          generator: where random operations draw from; None for the global generator.
        Raises:
          InvalidBatch, LabelOutOfRange, NonFiniteInput, DeviceMismatch, ShapeChanged, InvalidLoss, NothingToAdapt,
          DataDependentControlFlow, NotDifferentiable: see `adaptrt.errors`.
        """
        with self._execution.planner.call():
            k = None if steps is None else check.positive_int("steps", steps)
            if outputs is not None:
                check.one_of("outputs", outputs, ("first",))
            return self._execution.adapt(support, start, generator, keep=keep, k=k, outputs=outputs)

    @entry_point
    def start(
        self,
        *,
        params: Mapping[str, Tensor] | None = None,
        opt_state: Any = None,
        buffers: Mapping[str, Tensor] | None = None,
        num_tasks: int | None = None,
    ) -> Adapted:
        """Returns the adaptation of zero steps, for `start=`: the values that model and optimiser have now, or others.

        Values that are not given are copied, so that later changes of the model do not show; gradients flow to the model's parameters, and
        to what is given.

        Args:
          params, buffers: values by name, in the place of the model's own; parameters of those that adapt.
          opt_state: all of the optimiser's state. None: its present state, or the initial one of an optimiser of `adaptrt.optim`, which
            is computed from the parameters given if it depends on them.
          num_tasks: T, for a start that has a task axis. Values then have one, [T, ...], or are given to every task.
        Raises:
          InvalidArgument, InvalidType, DeviceMismatch: a name that is not there, something that is no tensor, or a shape, dtype, structure
            or device that does not fit.

        Example:
          >>> from adaptrt import compile_unroll, optim
          >>> unroll = compile_unroll(torch.nn.Linear(3, 2), optim.sgd(lr=0.1), k=2, backend="eager")
          >>> prototypes = torch.randn(2, 3)
          >>> start = unroll.start(params={"weight": prototypes})
          >>> unroll.adapt((torch.randn(6, 3), torch.randint(2, (6,))), start=start).params["weight"].shape
          torch.Size([2, 3])
        """
        return self._execution.first(params, opt_state, buffers, num_tasks)

    @entry_point
    def load(self, source: Source, *, fingerprint: Mapping[str, str] | None = None) -> Adapted:
        """Reads what `Adapted.save` wrote, in this process or another, for a model with the same weights where it did not adapt.

        Nothing is unpickled or run. The tensors come to the model's device, without autograd history.

        Args:
          source: the path of the file, or the bytes that it holds.
          fingerprint: what `fingerprint()` returned since the model was last changed; None to compute it, which reads all of the base.
        Raises:
          InvalidState: the file is damaged or of a newer format, or the state belongs to another model, optimiser or base.
          OSError: it cannot be read.

        Example:
          >>> import tempfile
          >>> from adaptrt import compile_unroll, optim
          >>> unroll = compile_unroll(torch.nn.Linear(3, 2), optim.sgd(lr=0.1), k=2, backend="eager")
          >>> adapted = unroll.adapt((torch.randn(6, 3), torch.randint(2, (6,))))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     adapted.save(f"{folder}/user-17.safetensors")
          ...     loaded = unroll.load(f"{folder}/user-17.safetensors")
          >>> torch.equal(loaded.params["weight"], adapted.params["weight"])
          True
        """
        return self._execution.load(source, fingerprint)

    @entry_point
    def fingerprint(self) -> dict[str, str]:
        """Returns digests of what does not adapt, by the names of its parts: the base that a saved state belongs to.

        Computing them reads all parameters that do not adapt. Where many states are saved or loaded, compute them once and pass them on.
        """
        return self._execution.fingerprint()

    @entry_point
    def __call__(
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
        """The meta-loss: the loss of the adapted model on the query batch, a scalar; the mean over tasks with `vmap()`.

        With gradients enabled, loss and meta-gradient are computed together, and `backward()` only scales them. Losses by task or by step
        are differentiated at `backward()`, in programs of their own.

        Args:
          support, start, generator: as for `adapt`.
          query: like support, without the axis of steps.
          reduction: over tasks, "mean" or "none".
          every_step: evaluate the query after each step. The result has an axis of steps, (k,) or [T, k], the last step last.
          step_weights: (k,), a tensor, which may require grad; evaluates the query after each step and returns the sum of the losses times
            these weights, as the multi-step loss of MAML++ (Antoniou et al. 2019).
        Returns:
          [] or (k,) with "mean", [T] or [T, k] with "none".
        Raises:
          As `adapt`; InvalidArgument, InvalidType, DeviceMismatch for weights that do not fit.
        """
        with self._execution.planner.call():
            if reduction == "mean" and not every_step and step_weights is None:
                return self._execution.meta_loss(support, query, start, generator)
            check.one_of("reduction", reduction, ("mean", "none"))
            if step_weights is not None:
                check.step_weights(step_weights, self.k, self.device)
            if every_step or step_weights is not None:
                losses = self._execution.losses_of_steps(support, query, start, generator)
                if step_weights is not None:
                    losses = (losses * step_weights).sum(-1)
            else:
                losses = self._execution.evaluate(support, query, start, generator).losses
            return losses.mean(0) if reduction == "mean" and self._execution.task_axis else losses

    @entry_point
    def evaluate(self, support: Any, query: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None) -> Result:
        """Adapts once, and returns the meta-loss together with what it was computed from.

        Everything in it is differentiable outside `no_grad`, as for `adapt`.

        Args:
          support, query, start, generator: as for a call.
        Returns:
          `Result(loss, adapted, outputs, losses)`: the meta-loss, the adaptation, the outputs for the query, and the loss of each task.
        Raises:
          As `adapt`.

        Example:
          >>> from adaptrt import compile_unroll, optim
          >>> unroll = compile_unroll(torch.nn.Linear(3, 2), optim.sgd(lr=0.1), k=2, backend="eager")
          >>> batch = torch.randn(6, 3), torch.randint(2, (6,))
          >>> result = unroll.evaluate(batch, batch)
          >>> result.outputs.shape, torch.equal(result.loss, result.losses)
          (torch.Size([6, 2]), True)
        """
        with self._execution.planner.call():
            return self._execution.evaluate(support, query, start, generator)

    @entry_point
    def export(
        self,
        directory: str | os.PathLike[str],
        support: Any,
        query: Any,
        *,
        formats: Sequence[str] | str = FORMATS_OF_EXPORT,
        weights: bool = True,
        overwrite: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Path:
        """Writes the whole adaptation as files, which run without this Python code: in C++, ONNX Runtime, a browser, or `adaptrt.load`.

        The programs are `adapt`, `adapt_predict`, `predict`, and `loss`, which guards need, for data of the shapes of these examples; their
        values do not matter. Parameters, optimiser state, hyperparameters and noise are inputs of each, so the files serve other weights,
        too. They are captured without compiling or calling the unroll. `manifest.json` says everything about them (docs/export.md).

        Args:
          directory: the folder to write. It is written under another name and renamed when it is whole.
          support: a batch, as for `adapt`; or a list of batches of several shapes.
          query: inputs of a prediction, as one argument of an adapted model; or a list of as many.
          formats: "pt2" (machine code for this kind of machine, from AOTInductor), "onnx", "torchscript" or "exported_program"; or several
            of these.
          weights: whether to write the present weights, too.
          overwrite: whether to replace what is there.
          progress: called with what is done next, in words.
        Returns:
          The folder.
        Raises:
          InvalidArgument: a format that there is not or whose package is not installed, or the folder exists.
          NotExportable: something cannot be written in a format; names it. Nothing is written then.
          AdaptrtError: whatever `adapt` raises for this data.
        """
        from adaptrt.export.write import write

        run = self._execution
        with run.planner.call():
            return write(directory, run.exporter, self._settings, support, query, formats, weights, overwrite, progress or _silent)

    @entry_point
    def check_export(self, support: Any, query: Any, *, formats: Sequence[str] | str = FORMATS_OF_EXPORT) -> None:
        """Raises what `export` would raise about the programs, and writes nothing. Arguments are as there."""
        from adaptrt.export.write import capture

        run = self._execution
        with run.planner.call():
            capture(run.exporter, self._settings, support, query, formats, _silent)

    @entry_point
    def predict(self, query: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None) -> Any:
        """Returns what the model, or an adaptation of it, computes for inputs, as `start(query)` does, with the programs of this unroll.

        Args:
          query: inputs as one argument: a tensor, or a tuple or dict of the model's arguments.
          start: of this unroll, its `vmap()` or its `clone()`. None for the model's present parameters.
          generator: as for a call of an adaptation.
        Raises:
          OptimizerMismatch: start is of another unroll.
          InvalidType: start is no adaptation.
        """
        return self._execution.predict_from(start, query, generator)

    def vmap(self, *, cache_size: int | None = None, on_new_shape: str | None = None) -> CompiledUnroll:
        """The same unroll over tasks: a leading task axis on support, query and results; the meta-loss is the mean over tasks.

        Each task starts from the same parameters and has noise of its own. Name and meaning as in `torch.func`. On the CPU large tasks are
        done one after the other, which `explain()` shows as `EachTask(...)` around the adjoint; results differ by rounding.

        Args:
          cache_size, on_new_shape: as for `compile_unroll`; None for what this unroll has.
        """
        if self._execution.task_axis:
            raise InvalidArgument("vmap() was called on an unroll that has a task axis already")
        return CompiledUnroll(self._changed(cache_size, on_new_shape), task_axis=True)

    def clone(self, *, cache_size: int | None = None, on_new_shape: str | None = None) -> CompiledUnroll:
        """The same unroll with programs of its own, which calls of this one neither push out of the cache nor add to.

        Args:
          cache_size, on_new_shape: as for `compile_unroll`; None for what this unroll has.
        """
        return CompiledUnroll(self._changed(cache_size, on_new_shape), task_axis=self._execution.task_axis)

    def _changed(self, cache_size: int | None, on_new_shape: str | None) -> Settings:
        settings = self._settings
        if cache_size is not None:
            settings = dataclasses.replace(settings, cache_size=check.positive_int("cache_size", cache_size))
        if on_new_shape is not None:
            check.one_of("on_new_shape", on_new_shape, ("compile", "error"))
            settings = dataclasses.replace(settings, must_be_warm=on_new_shape == "error")
        return settings

    def module(self) -> MetaLoss:
        """Returns an `nn.Module` whose call is the meta-loss, for `DistributedDataParallel`, `fully_shard` and checkpoints.

        Its parameters are those of the model, of losses and inner optimisers that are modules, and the hyperparameters that require grad.
        docs/distributed.md shows how to train it over several processes.

        Raises:
          InvalidArgument: a hyperparameter that requires grad is no `nn.Parameter`, or a buffer requires grad.

        Example:
          >>> from adaptrt import compile_unroll, optim
          >>> lr = torch.nn.Parameter(torch.tensor(0.1))
          >>> unroll = compile_unroll(torch.nn.Linear(3, 2), optim.sgd(lr=lr), k=2, backend="eager")
          >>> meta_loss = unroll.module()
          >>> [name for name, _ in meta_loss.named_parameters()]
          ['model.weight', 'model.bias', 'hyper.lr']
          >>> batch = torch.randn(6, 3), torch.randint(2, (6,))
          >>> torch.equal(meta_loss(batch, batch), unroll(batch, batch))
          True
        """
        return MetaLoss(self, self._settings)

    @entry_point
    def warmup(
        self,
        support: Any,
        query: Any = None,
        *,
        start: bool | Adapted = False,
        evaluate: bool = False,
        steps: int | None = None,
        keep: Keep = None,
        outputs: str | None = None,
        inputs: Any = None,
    ) -> CompiledUnroll:
        """Compiles for data of these shapes ahead of time; returns the unroll itself.

        That is what `adapt` needs without gradients; with `query` also prediction on its inputs, and the meta-loss, with its gradient
        if gradients are enabled here. The global random state does not change.

        Args:
          support, query: as for `adapt` and for a call.
          start: also compile for calls with `start=`. With a task axis these need programs of their own, because each task then starts from
            values of its own. Without one, `adapt` needs none. Or an adaptation, to compile for calls with `start=` alone.
          evaluate: also compile for `evaluate`, and for losses by task (`reduction="none"`) and by step; with their gradients if these are
            enabled here. It needs `query`.
          keep, steps, outputs: also compile for calls of `adapt` with these; with a guard each number of steps needs a program of its own.
          inputs: also compile for predictions on these inputs, given as one argument of an adapted model, without target and meta-loss.
        """
        if evaluate and query is None:
            raise InvalidArgument("warmup(evaluate=True) needs a query batch; pass warmup(support, query, evaluate=True)")
        run, generator = self._execution, torch.Generator(self._settings.device)
        k = None if steps is None else check.positive_int("steps", steps)
        with torch.no_grad():
            first = start if isinstance(start, Adapted) else None
            adapted = run.adapt(support, first, generator, warm=True, keep=keep, k=k)
            begins = (None, adapted) if start is True else (first,)
            for begin in begins:
                if begin is adapted:
                    run.adapt(support, begin, generator, warm=True, keep=keep, k=k)
                if outputs is not None:
                    run.adapt(support, begin, generator, warm=True, keep=keep, k=k, outputs=outputs)
            if query is not None:
                run.predict(adapted, query, generator, warm=True)
            if inputs is not None:
                run.warm_for_inputs(adapted, inputs, generator)
        if query is not None:
            for begin in begins:
                run.meta_loss(support, query, begin, generator, warm=True)
                if evaluate:
                    self._warm(run.evaluate(support, query, begin, generator, warm=True).losses)
                    if run.differentiates_steps:
                        self._warm(run.losses_of_steps(support, query, begin, generator, warm=True))
        call_ended()
        for _, program in run.programs():
            if isinstance(program.run, TieredRunner):
                program.run.wait()
        return self

    def _warm(self, losses: Tensor) -> None:
        """Has the gradient of losses compiled, if they have one."""
        if losses.requires_grad:
            inputs = [value for part in self._settings.modules for value in part.parameters() if value.requires_grad]
            inputs += [value for value in tree.leaves(self._settings.source.hyper()) if value.requires_grad and value.is_leaf]
            torch.autograd.grad(losses.sum(), inputs, allow_unused=True)

    def explain(self) -> Explanation:
        """Which adjoint was chosen and why, and each program's size before and after each pass, FLOPs, bytes and compile time."""
        return explain(self._settings.k, self._settings.backend, *self._execution.plans())

    def graphs(self) -> dict[str, Graph]:
        """The graphs compiled so far by program name; a number is added where several shapes have a program of that name."""
        found: dict[str, Graph] = {}
        for name, program in self._execution.programs():
            count = sum(known == name or known.startswith(f"{name} #") for known in found)
            found[f"{name} #{count + 1}" if count else name] = program.graph
        return found
