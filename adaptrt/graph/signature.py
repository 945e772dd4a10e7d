"""Defines the signature of a graph: the name, role, shape and dtype of every input and output."""

from __future__ import annotations

import dataclasses
import enum

from adaptrt.tree import Spec


class Role(enum.Enum):
    """What an input of a graph is to the unroll.

    PARAM is a parameter, BUFFER a buffer, STATE a part of the optimiser's state, HYPER a hyperparameter, NOISE a random tensor, DATA a part
    of a batch, COTANGENT a derivative with respect to an output, KEPT a value that another program kept for this one, and CONST a tensor
    that the captured function closed over.
    """

    PARAM = "param"
    BUFFER = "buffer"
    STATE = "state"
    HYPER = "hyper"
    NOISE = "noise"
    DATA = "data"
    COTANGENT = "cotangent"
    KEPT = "kept"
    CONST = "const"


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One input: its dotted name, its role, and the tensor that it takes, which is contiguous unless `own_strides` are given."""

    name: str
    role: Role
    spec: Spec
    own_strides: tuple[int, ...] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        return self.spec.strides if self.own_strides is None else self.own_strides


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """One output: its dotted name and the tensor that it gives. An output that is `kept` for another program may have any strides."""

    name: str
    spec: Spec
    kept: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Signature:
    """All inputs and outputs of a graph, in order. `str(signature)` is a table."""

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]

    def __str__(self) -> str:
        rows = [(entry.role.value, entry.name, str(entry.spec)) for entry in self.inputs]
        rows += [("output", entry.name, str(entry.spec)) for entry in self.outputs]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{role:<{widths[0]}}  {name:<{widths[1]}}  {spec}" for role, name, spec in rows)
