"""The signature of a graph: name, role and tensor of every input and output."""

from __future__ import annotations

import dataclasses
import enum

from adaptrt.tree import Spec


class Role(enum.Enum):
    """What an input of a graph is to the unroll."""

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
    """One input: its dotted name, its role and the tensor it takes, which is contiguous unless `strides` says otherwise."""

    name: str
    role: Role
    spec: Spec
    own_strides: tuple[int, ...] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        return self.spec.strides if self.own_strides is None else self.own_strides


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """One output: its dotted name and the tensor it gives; one that is `kept` for another program may have any strides."""

    name: str
    spec: Spec
    kept: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Signature:
    """Every input and output of a graph, in order. `str(signature)` is a table."""

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]

    def __str__(self) -> str:
        rows = [(entry.role.value, entry.name, str(entry.spec)) for entry in self.inputs]
        rows += [("output", entry.name, str(entry.spec)) for entry in self.outputs]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{role:<{widths[0]}}  {name:<{widths[1]}}  {spec}" for role, name, spec in rows)
