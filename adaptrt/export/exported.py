"""An export, read back: it adapts and predicts like the unroll that wrote it, without the model's class and without compiling."""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from adaptrt import tree
from adaptrt.backend.entry_points import entry_point
from adaptrt.errors import (
    InvalidArgument,
    InvalidExport,
    InvalidType,
)
from adaptrt.export import manifest as manifests
from adaptrt.export import trees
from adaptrt.export.calls import Call, Calls
from adaptrt.export.formats import FORMATS, Run
from adaptrt.export.manifest import Manifest
from adaptrt.export.program import Program
from adaptrt.graph.noise import restored_on_any_error
from adaptrt.inner.guard import Guards, decision
from adaptrt.inner.step import Batch, Carry, Fixed
from adaptrt.inner.unroll import batch_of_step
from adaptrt.process import lock
from adaptrt.runtime.adapted import Adapted, restored
from adaptrt.runtime.saved import Source
from adaptrt.runtime.state import State
from adaptrt.tree import Spec, Tree

_CPU = torch.device("cpu")
_NOTHING = contextlib.nullcontext()


class Prediction(NamedTuple):
    """What `Exported.adapt_predict` returns.

    Attributes:
      outputs: of the adapted model for the query inputs.
      losses: support loss before each step, (k,) or [T, k].
    """

    outputs: Any
    losses: Tensor


@entry_point
def load(
    directory: str | os.PathLike[str],
    *,
    format: str | None = None,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
) -> Exported:
    """Reads what `CompiledUnroll.export` wrote.

    The manifest and the hash of every file are checked before anything is opened. Python unpickles nothing. A pt2 package is machine code,
    and a TorchScript program is code as well: load them from sources that you trust, as you would a program.

    Args:
      directory: the folder. Each program is opened, and its file compared once more, when it is first called.
      format: which of its formats runs, None for the fastest that is there.
      weights: other weights than those of the folder, a safetensors file or tensors by the names that the manifest has.
    Raises:
      InvalidExport: the folder is damaged, of a newer format, or the format that was chosen cannot run on this machine.
      InvalidArgument: there is no such format in it, or there are no weights.
      OSError: something cannot be read.

    Example:
      >>> import tempfile
      >>> from adaptrt import compile_unroll, optim
      >>> unroll = compile_unroll(torch.nn.Linear(3, 2), optim.sgd(lr=0.1), k=2, backend="eager")
      >>> support = torch.randn(6, 3), torch.randint(2, (6,))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = unroll.export(f"{folder}/program", support, torch.randn(4, 3), formats="torchscript")
      ...     exported = load(f"{folder}/program")
      ...     exported.adapt(support)(torch.randn(4, 3)).shape
      torch.Size([4, 2])
    """
    if not isinstance(directory, str | os.PathLike):
        raise InvalidType(f"load() takes the folder of an export, got {type(directory).__name__}")
    folder = Path(directory)
    if not (folder / manifests.NAME).is_file():
        raise InvalidExport(f"{folder} has no {manifests.NAME}; load() takes the folder that unroll.export() wrote")
    found = manifests.read(folder)
    kinds = {program.kind for program in found.programs}
    there = [name for name in FORMATS if kinds == {program.kind for program in found.programs if name in program.files}]
    chosen = format if format is not None else next((name for name in there if name != "exported_program"), None)
    if chosen not in there:
        raise InvalidArgument(f"{folder} has the formats {', '.join(map(repr, there)) or 'none'}, not {format!r}; export with it")
    return Exported(folder, found, chosen, _weights(folder, found, weights))


def _weights(folder: Path, manifest: Manifest, given: str | os.PathLike[str] | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns all weights, after checking that they are those of the manifest."""
    if given is None:
        if manifests.WEIGHTS not in manifest.files:
            raise InvalidArgument(f"{folder} was exported with weights=False; pass weights=, a safetensors file or tensors by name")
        given = folder / manifests.WEIGHTS
    if isinstance(given, Mapping):
        values = dict(given)
    else:
        try:
            values = load_bytes(Path(given).read_bytes())
        except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
            raise InvalidExport(f"{given} is damaged, or is no safetensors file: {error}") from error
    wanted = {**manifest.state, **manifest.fixed, **manifest.constants}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise InvalidType(f"weights['{name}'] must be a tensor, got {type(value).__name__}")
    if wanted != {name: Spec.of(value) for name, value in values.items()}:
        raise InvalidExport(f"the weights are not those that the programs take: {tree.difference(wanted, values)}")
    return {name: value.detach().contiguous() for name, value in values.items()}


class Exported:
    """An export, ready to run on the CPU. It is safe to call from several threads. `load` makes one.

    Results have no autograd history: exported programs have no gradient.

    Attributes:
      manifest: what the folder says about itself.
      format: which of its formats runs.
      folder: where the files are.
      weights: all tensors that programs take besides data and noise, by the names that the manifest has.
    """

    def __init__(self, folder: Path, manifest: Manifest, format: str, weights: Mapping[str, Tensor]) -> None:
        self.manifest = manifest
        self.format = format
        self.folder = folder
        self.weights = weights
        self._runs: dict[str, Run] = {}
        self._lock = lock()
        self._programs = {entry.name: Program(entry) for entry in manifest.programs if format in entry.files}
        self._constants = {name: weights[name] for name in manifest.constants}
        self._guards = Guards()
        structure = trees.from_json(manifest.opt_state)
        names = list(manifest.state)
        opt = [name for name in names if name.startswith("state.opt_state")]
        if structure.num_leaves != len(opt):
            raise InvalidExport(
                f"{folder}: the manifest has {len(opt)} tensors of the optimiser's state in a tree of {structure.num_leaves}"
            )
        params, buffers = (_by_name(weights, names, prefix) for prefix in ("state.params.", "state.buffers."))
        self._carry = Carry(params, tree.unflatten(structure, [weights[name] for name in opt]), buffers)
        of_model, of_loss, hyper = (_by_name(weights, manifest.fixed, f"fixed.{part}.") for part in ("params", "loss_params", "hyper"))
        self._fixed = Fixed(of_model, of_loss, hyper, {})
        self._fixed_leaves = [weights[name] for name in manifest.fixed]
        self._predictor = _Predictor(self)
        self._base = State.of(self._carry)
        self._calls = Calls(manifest, list(self._programs.values()), self._base, self._fixed_leaves, list(of_model.values()))
        for program in self._programs.values():
            program.require(self._base, self._fixed, self._constants, folder)

    def __repr__(self) -> str:
        shapes = [program.in_words() for program in self._programs.values() if program.entry.kind == "adapt"]
        return f"Exported({str(self.folder)!r}, k={self.manifest.k}, format={self.format!r}, support {'; '.join(shapes)})"

    @property
    def k(self) -> int:
        """The number of inner steps."""
        return self.manifest.k

    @entry_point
    def start(
        self, *, params: Mapping[str, Tensor] | None = None, opt_state: Any = None, buffers: Mapping[str, Tensor] | None = None
    ) -> Adapted:
        """Returns the adaptation of zero steps: the exported weights, or others, as `CompiledUnroll.start` does."""
        state = self._base.replace(params=params, opt_state=opt_state, buffers=buffers)
        return Adapted(self._predictor, state, self._no_losses(), self._fixed)

    def example(self) -> tuple[Any, Any]:
        """Returns `(support, inputs)` of zeros, one task of the first shapes that were exported; without weights of examples."""
        (batch,), (inputs,) = (self._zeros(kind) for kind in ("adapt", "predict"))
        support = (batch.inputs,) if batch.target is None else (batch.inputs, batch.target)
        return support, inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs

    def num_examples(self, kind: str) -> tuple[int, ...]:
        """Returns the numbers of examples that programs of a kind, such as "adapt" or "predict", were exported for."""
        lead = 0 if self.manifest.num_tasks is None else 1
        of_kind = [entry for entry in self.manifest.programs if entry.kind == kind]
        first = [next(found.spec for found in entry.inputs if found.role == "data") for entry in of_kind]
        return tuple(sorted({spec.shape[lead] for spec in first}))

    def _zeros(self, kind: str) -> list[Any]:
        entry = next(entry for entry in self.manifest.programs if entry.kind == kind)
        lead = 0 if self.manifest.num_tasks is None else 1
        specs = [found.spec for found in entry.inputs if found.role == "data"]
        values = [torch.zeros(spec.shape[lead:], dtype=spec.dtype) for spec in specs]
        return tree.unflatten(trees.from_json({"list": list(entry.data)}), values)

    @entry_point
    def load(self, source: Source, *, fingerprint: Mapping[str, str] | None = None) -> Adapted:
        """Reads the state of a user, which `Adapted.save` wrote here or where the unroll is, as `CompiledUnroll.load` does."""
        return restored(self._predictor, source, self._carry, self._fixed, fingerprint or self.manifest.fingerprint)

    def fingerprint(self) -> dict[str, str]:
        """Returns digests of what does not adapt, as `CompiledUnroll.fingerprint` does; they are in the manifest."""
        return dict(self.manifest.fingerprint)

    @entry_point
    def adapt(self, support: Any, *, keep: Any = None, start: Adapted | None = None, generator: torch.Generator | None = None) -> Adapted:
        """Adapts the model to a support batch.

        Args:
          support: as for `CompiledUnroll.adapt`, of a shape that was exported.
          keep: a guard, as there. A function is called on tensors, task by task.
          start: go on from an earlier result, from `start()` or from `load()`, instead of from the exported weights.
          generator: where noise is drawn from, None for the global generator.
        Raises:
          ShapeChanged: no program was exported for this shape.
          InvalidBatch, InvalidType, LabelOutOfRange, NonFiniteInput, OptimizerMismatch: see `adaptrt.errors`.
          NotDifferentiable: gradients are on, and the data or the start requires grad.
        """
        guard = None if keep is None else self._guard(keep)
        call = self._calls.with_support("adapt", support, None, start)
        program, begin, (batch,) = call.program, call.begin, call.data
        program.check([("support", batch)], self.manifest.check_finite)
        with torch.no_grad(), self._restored(program, generator, guard is not None):
            found = self._run_call(call, generator)
            state = State(tuple(found[: len(begin.leaves)]), begin.form, begin.num_tasks)
            losses = found[len(begin.leaves)]
            if guard is None:
                return Adapted(self._predictor, state, losses, self._fixed)
            axis = self.manifest.num_tasks is not None
            last = batch_of_step(batch, self.k - 1, per_step=self.manifest.per_step, task_axis=axis)
            final_loss = self._loss(state, last, generator)
            kept, state = _kept(guard, begin, state, losses, final_loss)
        return Adapted(self._predictor, state, losses, self._fixed, kept=kept, final_loss=final_loss)

    @entry_point
    def adapt_predict(
        self, support: Any, query: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None
    ) -> Prediction:
        """Adapts to a support batch and predicts for the inputs of a query, in one program that keeps nothing.

        Args:
          support, start, generator: as for `adapt`.
          query: inputs, as one argument of an adapted model.
        Raises:
          As `adapt`.
        """
        call = self._calls.with_support("adapt_predict", support, (query,), start)
        program, (batch, inputs) = call.program, call.data
        program.check([("support", batch), ("query", Batch(inputs, None))], self.manifest.check_finite)
        with torch.no_grad(), self._restored(program, generator):
            found = self._run_call(call, generator)
        return Prediction(*program.result(found))

    @entry_point
    def predict(self, query: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None) -> Any:
        """Returns what the exported model, or an adaptation of it, computes for inputs, given as one argument of it."""
        return self._predict(self._calls.begin(start), (query,) if isinstance(query, Tensor) else query, generator)

    def _predict(self, state: State, inputs: Tree, generator: torch.Generator | None) -> Any:
        call = self._calls.of_prediction(state, inputs)
        call.program.check([("input", Batch(call.data[0], None))], self.manifest.check_finite)
        with torch.no_grad(), self._restored(call.program, generator):
            return call.program.result(self._run_call(call, generator))

    def _restored(
        self, program: Program, generator: torch.Generator | None, is_guarded: bool = False
    ) -> contextlib.AbstractContextManager[object]:
        """Returns a context that takes back what is drawn in it if it raises."""
        return restored_on_any_error(_CPU, generator) if program.entry.noise or is_guarded else _NOTHING

    def _guard(self, keep: Any) -> Any:
        if keep == "not_worse" and self.manifest.per_step:
            raise InvalidArgument("keep='not_worse' compares losses on one batch, and here each step has another; give a function")
        return self._guards.find(keep).decide

    def _loss(self, state: State, batch: Batch, generator: torch.Generator | None) -> Tensor:
        program = self._calls.find("loss", [batch])
        values = _in_order(program, state.leaves, self._fixed_leaves, [batch], program.draw(generator))
        (loss,) = self._runner(program)(program.as_taken(values))
        return loss

    def _run_call(self, call: Call, generator: torch.Generator | None) -> Sequence[Tensor]:
        program = call.program
        values = _in_order(program, call.held, call.fixed, call.data, program.draw(generator))
        if call.is_known:
            return self._runner(program)(values)
        taken = program.as_taken(values)
        if all(map(operator.is_, taken, values)):
            self._calls.keep(call)
        return self._runner(program)(taken)

    def _runner(self, program: Program) -> Run:
        name = program.entry.name
        run = self._runs.get(name)
        if run is None:
            with self._lock:
                if name not in self._runs:
                    path = self.folder / program.entry.files[self.format]
                    if manifests.digest_of(path) != dict(self.manifest.files[path.name]):
                        raise InvalidExport(f"{path} was changed after the export was loaded; export again")
                    self._runs[name] = FORMATS[self.format].open(self.manifest, program.entry, path)
            run = self._runs[name]
        return run

    def _no_losses(self) -> Tensor:
        (loss,) = next(entry.outputs for entry in self.manifest.programs if entry.kind == "loss")
        return torch.empty((0,), dtype=loss.spec.dtype)


class _Predictor:
    """The `Predictor` of the adaptations that an export returns."""

    def __init__(self, exported: Exported) -> None:
        self.unroll = exported

    def predict(self, state: State, fixed: Fixed, inputs: Tree, generator: torch.Generator | None) -> Any:
        del fixed
        return self.unroll._predict(state, inputs, generator)

    def state_dict(self, state: State, fixed: Fixed) -> dict[str, Tensor]:
        values = {
            **{f"state.{name}": value for name, value in state.named_tensors().items()},
            **{f"fixed.params.{name}": value for name, value in fixed.params.items()},
        }
        return {name: values[place] for name, place in self.unroll.manifest.state_dict.items()}

    def fingerprint(self, fixed: Fixed) -> dict[str, str]:
        del fixed
        return dict(self.unroll.manifest.fingerprint)


def _in_order(
    program: Program, held: Sequence[Tensor], fixed: Sequence[Tensor], data: Sequence[Tree], noise: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Returns all that a program takes. Noise of the steps comes before the inputs of a prediction, and the prediction's after them."""
    parts = [part for pair in zip(data, noise, strict=False) for part in pair]
    return [*held, *fixed, *[value for part in parts for value in tree.leaves(part)], *program.constants]


def _kept(decide: Any, begin: State, state: State, losses: Tensor, final_loss: Tensor) -> tuple[Tensor, State]:
    """Returns what a guard decides, by task if there is a task axis, and the state that remains."""
    if state.num_tasks is None:
        kept = decision(decide, begin.carry, state.carry, losses, final_loss)
    else:
        rows = zip(_rows(begin), _rows(state), losses, final_loss, strict=True)
        kept = torch.stack([decision(decide, *row) for row in rows])
    axes = kept.dim()

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(kept.reshape((*kept.shape, *[1] * (new.dim() - axes))), new, old)

    return kept, State(tuple(map(choose, state.leaves, begin.leaves)), state.form, state.num_tasks)


def _rows(state: State) -> list[Carry]:
    return [state.form.tree(row) for row in zip(*[value.unbind(0) for value in state.leaves], strict=True)]


def _by_name(weights: Mapping[str, Tensor], names: Iterable[str], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weights[name] for name in names if name.startswith(prefix)}
