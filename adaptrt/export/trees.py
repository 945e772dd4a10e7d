"""Structures of trees as JSON, so that trees can be rebuilt where the classes in them are not known.

A named tuple or dataclass comes back as a named tuple with the same fields, any other mapping than a dict as a dict.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from adaptrt.errors import InvalidExport, NotExportable
from adaptrt.tree import Structure

Json = Any

_PLAIN = (type(None), bool, int, float, str)
_MAX_DEPTH = 100


def to_json(structure: Structure, what: str) -> Json:
    """Returns a structure as JSON. `what` it is of, for messages.

    Raises:
      NotExportable: it holds something other than tensors, numbers and text, or keys that are no text.
    """
    if structure.kind == "leaf":
        return "tensor"
    if structure.kind == "static":
        if type(structure.payload) not in _PLAIN:
            raise NotExportable(f"{what} holds {structure.payload!r}, and files have tensors, numbers and text only; leave it out")
        return {"value": structure.payload}
    children = [to_json(child, what) for child in structure.children]
    if structure.kind == "sequence":
        return {"list" if issubclass(structure.payload, list) else "tuple": children}
    if not all(isinstance(key, str) for key in structure.keys):
        raise NotExportable(f"{what} has keys that are no text ({structure.keys!r}); use names")
    entries = dict(zip(structure.keys, children, strict=True))
    return {"dict": entries} if structure.kind == "mapping" else {"named": entries, "class": structure.payload.__name__}


def from_json(found: Json, depth: int = 0) -> Structure:
    """Returns the structure that `to_json` has written.

    Raises:
      InvalidExport: it is none.
    """
    if found == "tensor":
        return Structure("leaf")
    if not isinstance(found, dict) or not found or depth > _MAX_DEPTH:
        raise InvalidExport(f"the manifest describes a tree by {str(found)[:80]!r}, which is none")
    kind, value = next(iter(found.items()))
    if kind == "value" and type(value) in _PLAIN:
        return Structure("static", value, (type(value), repr(value) if isinstance(value, float) else None))
    if kind in ("list", "tuple") and isinstance(value, list):
        children = tuple([from_json(child, depth + 1) for child in value])
        return Structure("sequence", list if kind == "list" else tuple, tuple(range(len(children))), children)
    if kind in ("dict", "named") and isinstance(value, dict):
        children = tuple([from_json(child, depth + 1) for child in value.values()])
        if kind == "dict":
            return Structure("mapping", dict, tuple(value), children)
        name = str(found.get("class", "Tree"))
        try:
            made: Any = namedtuple(name, tuple(value))
        except ValueError as error:
            raise InvalidExport(f"the manifest has a named tuple that cannot be made: {error}") from error
        return Structure("named", made, tuple(value), children)
    raise InvalidExport(f"the manifest describes a tree by {str(found)[:80]!r}, which is none")


def alike(one: Structure, other: Structure) -> bool:
    """Whether two structures are the same but for the classes of their containers."""
    kinds = {one.kind, other.kind}
    if len(kinds) > 1 and kinds != {"named", "dataclass"}:
        return False
    if one.kind == "static":
        return one.payload == other.payload and type(one.payload) is type(other.payload)
    same_keys = set(one.keys) == set(other.keys) if one.kind == "mapping" else one.keys == other.keys
    return same_keys and all(alike(a, b) for a, b in zip(one.children, other.children, strict=True))
