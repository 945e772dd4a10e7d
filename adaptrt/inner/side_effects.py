"""What a traced pass writes outside of its own tensors: noticed, judged, and undone.

A program computes what the Python code of model, loss and optimiser did while it was traced, and that code does not run again. So a pass
must not leave anything behind on which the next pass depends: a counter, a running mean in an attribute, a list that grows.

Real models do leave things behind, though: attention maps for whoever wants to look at them, or masks that are built once for each length.
To tell the two apart, a pass that has written anything is traced again, twice in a row on different inputs, and the second time it finds
what the first has left. If both compute the same function of their inputs, and the second leaves everything as it found it but for tensors
that are set anew, then no program depends on it: it is a cache, or a record that nobody reads. Otherwise it is refused by name.

A number that is only counted up, and that no code that ran reads, is no state either. Code that asks a clock or the operating system for
random numbers is judged in the same way, whether it writes anything or not.

What was written to objects outside of the model is undone after every trace, as it may hold tensors of the trace (`snapshot.py`).

Known limits: state behind C code, such as an open file, is not seen, except for `functools.lru_cache`, which is emptied, and iterators of
which the position can be told. What an iterator has given cannot be taken back. What two passes in succession see alike, such as today's
date, passes for a constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaptrt.errors import NotTraceable
from adaptrt.graph.ir import Graph
from adaptrt.inner.bytecode import line_of
from adaptrt.inner.executed import Executed
from adaptrt.inner.reachable import MISSING, TABLES
from adaptrt.inner.snapshot import Write, is_same

_MAX_LITERAL = 4096
"""Elements of a constant that may have been written as numbers in the code of a pass."""


def attribute_writes(base: nn.Module, twin: nn.Module, executed: Executed) -> list[Write]:
    """What a call has changed in the attributes of `twin`, which was a shadow of `base`.

    Args:
      base, twin: the modules.
      executed: the code that ran. What it does not write is what another thread has meanwhile done to `base`.
    """
    names = {id(part): name for name, part in base.named_modules(prefix="model")}
    is_alone = executed.is_alone()
    pairs = list(zip(base.modules(), _modules_of(base, twin), strict=False))
    parts = {id(part): copied for part, copied in pairs}
    found: list[Write] = []
    for part, copied in pairs:
        before, after = vars(part), vars(copied)
        for name in {**before, **after}:
            old, new = before.get(name, MISSING), after.get(name, MISSING)
            if name in TABLES:  # tensors are carried from step to step; what counts is what was added or replaced
                for key in {**old, **new}:
                    one, other = old.get(key, MISSING), new.get(key, MISSING)
                    if (one is MISSING or other is MISSING or name == "_modules") and not is_same(one, other, parts):
                        found.append(Write(f"{names[id(part)]}.{key}", one, other))
            elif not is_same(old, new, parts) and (is_alone or executed.may_set(name) or executed.may_write_into([name])):
                found.append(Write(f"{names[id(part)]}.{name}", old, new))
    return found


def _modules_of(base: nn.Module, twin: nn.Module) -> list[nn.Module]:
    """The copies of `base`'s modules in their order, whatever was added to the copies."""
    found: dict[int, nn.Module] = {}

    def walk(part: nn.Module, copied: nn.Module) -> None:
        if id(part) in found:
            return
        found[id(part)] = copied
        for name, child in part._modules.items():
            other = copied._modules.get(name)
            if child is not None and other is not None:
                walk(child, other)

    walk(base, twin)
    return [found[id(part)] for part in base.modules() if id(part) in found]


def computes_the_same(graph: Graph, num_inputs: int, num_outputs: int) -> bool:
    """Whether the two passes in a graph are one function, each of its own inputs.

    Args:
      graph: of two passes. Its inputs are those of the first pass, those of the second, and constants; its outputs likewise.
      num_inputs, num_outputs: of one pass.
    """
    outputs: Sequence[Any] = graph.module.graph.output_node().args[0]  # type: ignore[assignment]
    first = _numbered(graph, list(range(num_inputs)), list(outputs[:num_outputs]))
    second = _numbered(graph, list(range(num_inputs, 2 * num_inputs)), list(outputs[num_outputs : 2 * num_outputs]))
    return first == second


def _numbered(graph: Graph, own: list[int], outputs: list[Any]) -> list[Any]:
    """The outputs as nested expressions of their own inputs, in a form in which equal expressions are equal."""
    place = {position: index for index, position in enumerate(own)}
    known: dict[fx.Node, Any] = {}
    table: dict[Any, tuple[str, int]] = {}

    def of(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return known[value]
        if isinstance(value, list | tuple):
            return tuple(of(entry) for entry in value)
        return type(value).__name__, repr(value)

    first_constant = len(graph.signature.inputs) - len(graph.constants)
    literals = _numbered_by_value(graph.constants)
    position = 0
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            known[node] = ("own", place[position]) if position in place else ("other", position)
            if graph.signature.inputs[position].role.value == "const":
                known[node] = ("const", literals[position - first_constant])
            position += 1
        elif node.op != "output":
            key = str(node.target), of(node.args), tuple((name, of(value)) for name, value in node.kwargs.items())
            known[node] = table.setdefault(key, ("node", hash(key)))
    return [of(value) for value in outputs]


def _numbered_by_value(constants: Sequence[Tensor]) -> list[int]:
    """The index of the first constant that is the same; small ones are compared by value, as code may make one in every pass."""
    first: dict[Any, int] = {}

    def key(value: Tensor) -> Any:
        if value.numel() > _MAX_LITERAL or value.device.type != "cpu":
            return id(value)
        return value.dtype, value.shape, value.requires_grad, value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return [first.setdefault(key(value), index) for index, value in enumerate(constants)]


def is_unread_counter(write: Write, executed: Executed) -> bool:
    """Whether a number was counted up that nothing reads. It is noted, because another pass may read it."""
    name = write.path.rpartition(".")[2]
    is_number = type(write.before) is type(write.after) and type(write.after) in (int, float)
    if is_number and name.isidentifier() and executed.only_counts(name):
        executed.counters.add(name)
        return True
    return False


def require_unread(counters: Iterable[str], executed: Executed) -> None:
    """Checks that code does not read what other passes, in another mode for example, count up.

    Raises:
      NotTraceable: it does; names the counter.
    """
    for name in sorted(counters):
        if not executed.only_counts(name):
            raise NotTraceable(
                f"a pass of the model, the loss or the optimiser counts up '{name}', and another pass, in another mode for "
                "example, reads it. A program would go on with the value of the first pass. Make it a buffer of the model "
                "(register_buffer), which is carried from step to step, or adapt with adaptrt.higher, whose steps run its Python code"
            )


def refuse(writes: Sequence[Write], executed: Executed, *, again: bool) -> None:
    """Raises for what a pass has written and later passes depend on, or for the clock that it has asked.

    Raises:
      NotTraceable: names it.
    """
    if not writes:
        raise NotTraceable(
            f"what the model, the loss or the optimiser computes depends on {' and '.join(sorted(executed.sources))}, which gives "
            "another value each time. A program would go on with the value of the first pass. Ask it outside, and pass the value in as a "
            "part of the batch or as a buffer; for random numbers use torch.rand"
        )
    shown = sorted(writes, key=lambda write: isinstance(write.before, Tensor) or isinstance(write.after, Tensor))[:3]
    line = next((found for write in shown if (found := _line_of(write.path, executed))), None)
    raise NotTraceable(
        f"a pass of the model, the loss or the optimiser changes {', '.join(map(str, shown))}, and "
        f"{'every pass changes it again' if again else 'what a later pass computes depends on it'}"
        f"{f' ({line})' if line else ''}. A program would go on with the value of the first pass. Make it a buffer of the model "
        "(register_buffer), which is carried from step to step, or adapt with adaptrt.higher, whose steps run the model's Python code"
    )


def _line_of(path: str, executed: Executed) -> str | None:
    """Where code that ran sets an attribute or a name like the last one of a path."""
    name = path.rsplit(".", 1)[-1].strip("'").split("'")[0]
    return next((f"{code.co_filename}:{line}" for code, _ in executed.codes.values() if (line := line_of(code, name))), None)
