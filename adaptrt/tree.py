"""Converts trees of tensors (nested arguments and results) to flat lists of tensors and back.

A tree is a tensor, a `Spec`, or a dict, list, tuple, named tuple or dataclass of trees. Everything else in it (None, numbers, strings) is
static, which means that it is part of the structure and not a leaf. A `Structure` is hashable, so it can be part of a cache key.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from adaptrt.errors import CannotBeSet

Tree = Any


class ReadOnly(dict[Any, Any]):
    """A dict that refuses writes. Copies of it, and trees that are rebuilt from its structure, are plain dicts; pickles ordered ones."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise CannotBeSet(
            "the values of an adaptation are read-only; adapted.replace(params={name: value}) returns an adaptation with other values, and "
            "dict(...) a dict of your own"
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = _refuse  # pyright: ignore

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing if it would change nothing, as `torch.func.functional_call` asks for after every call; else refuses."""
        if any(key not in self or self[key] is not value for key, value in dict(*args, **kwargs).items()):
            self._refuse()

    def __copy__(self) -> dict[Any, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        del protocol
        return OrderedDict, (), None, None, iter(self.items())  # `torch.load` makes those, and no plain dicts, of weights only


def read_only(tree: Tree) -> Tree:
    """Returns the tree with `ReadOnly` in the place of each dict."""
    kind = _kind_of(type(tree))[0]
    if isinstance(tree, dict):
        return ReadOnly({key: read_only(value) for key, value in cast("dict[Any, Tree]", tree).items()})
    if kind == "named":
        return type(tree)(*map(read_only, tree))
    return type(tree)(map(read_only, tree)) if type(tree) in (tuple, list) else tree


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """The shape, dtype and device of a tensor, for which a program is compiled."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(value: Tensor | Spec) -> Spec:
        return value if isinstance(value, Spec) else Spec(tuple(value.shape), value.dtype, value.device)

    @property
    def num_bytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides of a contiguous tensor of this shape. An axis of length 1 is treated like any other."""
        strides, step = list[int](), 1
        for extent in reversed(self.shape):
            strides.append(step)
            step *= max(extent, 1)
        return tuple(reversed(strides))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Structure:
    """Everything about a tree except its leaves.

    `kind` is "leaf", "static", "mapping", "sequence", "named" or "dataclass". `payload` holds the static value or the container's type.
    `keys` holds the keys or field names of a container. For a static value it holds what must be equal besides the value, because 1, 1.0
    and True are equal in Python: its type, and the digits of a float.
    """

    kind: str
    payload: Any = None
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    @property
    def num_leaves(self) -> int:
        return 1 if self.kind == "leaf" else sum(child.num_leaves for child in self.children)


_LEAF = Structure("leaf")


def tuple_of(children: Sequence[Structure]) -> Structure:
    """Returns the structure of a tuple whose elements are trees of these structures."""
    return Structure("sequence", tuple, tuple(range(len(children))), tuple(children))


@functools.lru_cache(maxsize=1024)  # looked up for every node of every tree of a call
def _kind_of(cls: type) -> tuple[str, tuple[str, ...]]:
    """Returns the kind of node that instances of a class are, and the names of their fields if the class has some."""
    if issubclass(cls, Tensor | Spec):
        return "leaf", ()
    if dataclasses.is_dataclass(cls):
        return "dataclass", tuple([field.name for field in dataclasses.fields(cls)])
    if issubclass(cls, Mapping):
        return "mapping", ()
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return "named", tuple(cast(Any, cls)._fields)
    return ("sequence", ()) if issubclass(cls, tuple | list) else ("static", ())


def _children(value: Tree) -> tuple[str, tuple[Any, ...], Iterable[Tree]]:
    """Returns the kind, keys and children of a node. A leaf and a static value have no children."""
    kind, fields = _kind_of(type(value))
    if kind == "mapping":
        mapping = cast(Mapping[Any, Tree], value)
        return kind, tuple(mapping), mapping.values()
    if kind == "named":
        return kind, fields, cast(Sequence[Tree], value)
    if kind == "sequence":
        return kind, tuple(range(len(value))), cast(Sequence[Tree], value)
    if kind == "dataclass":
        return kind, fields, [getattr(value, field) for field in fields]
    return kind, (), ()


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """Returns the leaves of `tree`, depth first, and the structure from which `unflatten` rebuilds the tree."""
    leaves: list[Any] = []
    return leaves, _flatten_into(tree, leaves)


def _flatten_into(tree: Tree, leaves: list[Any]) -> Structure:
    kind, keys, children = _children(tree)
    if kind == "leaf":
        leaves.append(tree)
        return _LEAF
    if kind == "static":
        return Structure(kind, tree, (type(tree), repr(tree) if isinstance(tree, float) else None))
    payload: Any = dict if type(tree) is ReadOnly else type(tree)
    return Structure(kind, payload, keys, tuple([_flatten_into(child, leaves) for child in children]))


def leaves(tree: Tree) -> list[Any]:
    """Returns the leaves of `tree`, depth first."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Tree, found: list[Any]) -> None:
    kind = _kind_of(type(tree))[0]
    if kind == "leaf":
        found.append(tree)
        return
    if kind == "mapping":
        children = tree.values()
    elif kind == "named" or kind == "sequence":
        children = tree
    elif kind == "dataclass":
        children = _children(tree)[2]
    else:
        return
    for child in children:
        if isinstance(child, Tensor):
            found.append(child)
        elif type(child) is not tuple or child:  # an empty tuple stands for a tensor that an optimiser's state does not have
            _collect(child, found)


def unflatten(structure: Structure, values: Iterable[Any]) -> Tree:
    """Rebuilds a tree, as the inverse of `flatten`. It takes one value for each leaf, in order, which need not be a tensor.

    >>> values, structure = flatten({"a": torch.zeros(2), "b": (torch.ones(1), None)})
    >>> unflatten(structure, ["x", "y"])
    {'a': 'x', 'b': ('y', None)}
    """
    return _build(structure, iter(values))


def _build(structure: Structure, values: Iterator[Any]) -> Tree:
    if structure.kind == "leaf":
        return next(values)
    if structure.kind == "static":
        return structure.payload
    children = [_build(child, values) for child in structure.children]
    if structure.kind == "sequence":
        return structure.payload(children)
    if structure.kind == "named":
        return structure.payload(*children)
    items = dict(zip(structure.keys, children, strict=True))
    return structure.payload(**items) if structure.kind == "dataclass" else structure.payload(items)


def leaves_by(structure: Structure) -> Callable[[Tree], list[Any]]:
    """Returns a function like `leaves` for trees of one structure, which is several times faster.

    It is generated code that reads the places of the leaves directly. It raises KeyError, IndexError, AttributeError or TypeError for a
    tree that lacks one of these places.

    >>> leaves_by(flatten({"a": torch.zeros(2), "b": (torch.ones(1), None)})[1])(
    ...     {"a": "x", "b": ("y", None)}
    ... )
    ['x', 'y']
    """
    places: list[str] = []
    constants: dict[str, Any] = {}

    def visit(node: Structure, at: str) -> None:
        if node.kind == "leaf":
            places.append(at)
        for index, child in enumerate(node.children):
            key = node.keys[index]
            if node.kind == "dataclass":
                visit(child, f"{at}.{key}")
            else:
                visit(child, f"{at}[{_constant(key, constants) if node.kind == 'mapping' else index}]")

    visit(structure, "tree")
    return eval(f"lambda tree: [{', '.join(places)}]", constants)


def unflatten_by(structure: Structure) -> Callable[[Sequence[Any]], Tree]:
    """Returns a function like `unflatten` for one structure, generated as code that is several times faster.

    >>> unflatten_by(flatten({"a": torch.zeros(2), "b": (torch.ones(1), None)})[1])(["x", "y"])
    {'a': 'x', 'b': ('y', None)}
    """
    constants: dict[str, Any] = {}
    count = itertools.count()

    def made(node: Structure) -> str:
        if node.kind == "leaf":
            return f"values[{next(count)}]"
        if node.kind == "static":
            return _constant(node.payload, constants)
        children = [made(child) for child in node.children]
        kind = _constant(node.payload, constants)
        if node.kind == "sequence":
            listed = f"[{', '.join(children)}]"
            return listed if node.payload is list else f"{kind}({listed})"
        if node.kind == "named":
            return f"{kind}({', '.join(children)})"
        if node.kind == "dataclass":
            return f"{kind}({', '.join(f'{key}={child}' for key, child in zip(node.keys, children, strict=True))})"
        items = f"{{{', '.join(f'{_constant(key, constants)}: {child}' for key, child in zip(node.keys, children, strict=True))}}}"
        return items if node.payload is dict else f"{kind}({items})"

    source = made(structure)
    return eval(f"lambda values: {source}", constants)


class Form:
    """One structure of trees and the dtypes of their leaves, with fast functions from such trees to their leaves and back.

    `form_of` makes it.

    Attributes:
      structure: of the trees.
      dtypes: of the leaves.
      leaves: from a tree to its leaves, as `leaves_by`.
      tree: from leaves to a tree, as `unflatten_by`.
    """

    __slots__ = ("dtypes", "leaves", "structure", "tree")

    def __init__(self, structure: Structure, dtypes: tuple[torch.dtype, ...]) -> None:
        self.structure = structure
        self.dtypes = dtypes
        self.leaves = leaves_by(structure)
        self.tree = unflatten_by(structure)


_form = functools.lru_cache(maxsize=1024)(Form)


def form_of(structure: Structure, values: Iterable[Tensor]) -> Form:
    """Returns the `Form` of trees of this structure with such leaves; the same one for equal structures and dtypes.

    So forms can be compared by identity; forms that differ may still be equal, if many were made in between.
    """
    return _form(structure, tuple([value.dtype for value in values]))


def _constant(value: Any, constants: dict[str, Any]) -> str:
    """Returns a Python expression for `value`."""
    if type(value) in (str, int):
        return repr(value)
    name = f"c{len(constants)}"
    constants[name] = value
    return name


def map_leaves(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies `fn` to each leaf of `tree`, and to the corresponding leaves of the trees in `rest`, which must have as many."""
    values, structure = flatten(tree)
    return unflatten(structure, [fn(*group) for group in zip(values, *(leaves(other) for other in rest), strict=True)])


def where(condition: Tensor, one: Tree, other: Tree) -> Tree:
    """Returns one tree or the other, which is decided by a value (0-dim). What both share is returned as it is."""
    return map_leaves(lambda a, b: a if a is b else torch.where(condition, a, b), one, other)


def paths(tree: Tree, root: str = "") -> list[str]:
    """Returns a dotted name for each leaf, in the order of `flatten`.

    >>> paths({"weight": torch.zeros(2), "moments": [torch.zeros(1)]}, root="state")
    ['state.weight', 'state.moments.0']
    """
    kind, keys, children = _children(tree)
    if kind == "leaf":
        return [root or "value"]
    join = f"{root}." if root else ""
    return [path for key, child in zip(keys, children, strict=True) for path in paths(child, f"{join}{key}")]


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Returns each leaf with its dotted name, in the order of `flatten`."""
    return list(zip(paths(tree), leaves(tree), strict=True))


def specs(tree: Tree) -> Tree:
    """Returns the tree with every tensor replaced by its `Spec`."""
    return map_leaves(Spec.of, tree)


def describe(tree: Tree) -> str:
    """Returns the specs of a tree's leaves as one line, for error messages."""
    return ", ".join(str(Spec.of(leaf)) for leaf in leaves(tree)) or "no tensors"


def difference(expected: Tree, got: Tree) -> str:
    """Says which leaves of two trees differ in name, shape or dtype, for error messages.

    >>> difference({"weight": torch.zeros(2)}, {"weight": torch.zeros(3)})
    'weight: float32[2] expected, got float32[3]'
    """
    old = dict(zip(paths(expected), [str(Spec.of(leaf)) for leaf in leaves(expected)], strict=True))
    new = dict(zip(paths(got), [str(Spec.of(leaf)) for leaf in leaves(got)], strict=True))
    changed = [
        f"{name}: {old.get(name, 'nothing')} expected, got {new.get(name, 'nothing')}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    return "; ".join(changed) or "the containers differ"
