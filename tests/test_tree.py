"""Trees: what is taken apart comes back as it was, and equal structures are equal values."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptrt import tree
from adaptrt.tree import Spec

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


class Pair(NamedTuple):
    first: Any
    second: Any


class OtherPair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Output:
    logits: Any
    loss: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slim:
    logits: Any
    loss: Any = None


class Counts(dict[str, Any]):
    """A mapping of another type than dict."""


# Names may hold dots, as those of parameters do; of two keys of one mapping none may be made of the other and a further name.
NAMES = st.sampled_from(["weight", "bias", "layer.0", "x", "y", "z"])
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TENSORS = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, st.sampled_from(DTYPES))
SPECS = st.builds(lambda shape, dtype: Spec(shape, dtype, torch.device("cpu")), SHAPES, st.sampled_from(DTYPES))
STATIC = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.just(torch.float32))


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(NAMES, children, max_size=3)
    return st.one_of(
        mappings,
        mappings.map(OrderedDict),
        mappings.map(Counts),
        st.dictionaries(st.integers(0, 5), children, max_size=2),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        *(st.builds(kind, children, children) for kind in (Pair, OtherPair, Output, Slim)),
    )


TREES = st.recursive(st.one_of(TENSORS, SPECS, STATIC), containers, max_leaves=12)
quick = settings(deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the very same leaves in equal containers of the same types; written without adaptrt.tree."""
    if isinstance(a, Tensor | Spec):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return a == b


def shape_of(value: Any) -> Any:
    """What of a tree is structure, as plain data; written without adaptrt.tree."""
    if isinstance(value, Tensor | Spec):
        return "leaf"
    if isinstance(value, dict):
        return type(value), [(key, shape_of(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape_of(entry) for entry in value]
    if dataclasses.is_dataclass(value):
        return type(value), [shape_of(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return type(value), value


def tensors(value: Any) -> list[Any]:
    """The leaves, depth first; written without adaptrt.tree."""
    if isinstance(value, Tensor | Spec):
        return [value]
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in tensors(entry)]
    if isinstance(value, list | tuple):
        return [leaf for entry in value for leaf in tensors(entry)]
    if dataclasses.is_dataclass(value):
        return [leaf for field in dataclasses.fields(value) for leaf in tensors(getattr(value, field.name))]
    return []


@quick
@given(TREES)
def test_flatten_and_unflatten_are_inverse(value: Any) -> None:
    leaves, structure = tree.flatten(value)
    assert same(value, tree.unflatten(structure, leaves))


@quick
@given(TREES)
def test_leaves_come_depth_first(value: Any) -> None:
    leaves, structure = tree.flatten(value)
    expected = tensors(value)
    assert len(leaves) == len(expected) == structure.num_leaves
    assert all(map(same, leaves, expected))
    assert all(map(same, tree.leaves(value), expected))


@quick
@given(TREES)
def test_code_for_a_structure_does_the_same(value: Any) -> None:
    found, structure = tree.flatten(value)
    assert list(map(id, tree.leaves_by(structure)(value))) == list(map(id, found))
    assert same(value, tree.unflatten_by(structure)(found))


def test_code_for_a_structure_goes_by_keys_and_misses_none() -> None:
    a, b = torch.zeros(1), torch.ones(2)
    leaves_of = tree.leaves_by(tree.flatten({"a": a, 1.5: (b, None)})[1])
    assert leaves_of({1.5: (b, None), "a": a}) == [a, b]
    for wrong in ({"a": a}, {"a": a, 1.5: ()}, [a, b], None):
        with pytest.raises((KeyError, IndexError, TypeError)):
            leaves_of(wrong)


@quick
@given(TREES)
def test_paths_are_one_a_leaf_and_unique(value: Any) -> None:
    for root in ("", "root"):
        paths = tree.paths(value, root)
        assert len(paths) == len(tensors(value))
        assert len(set(paths)) == len(paths)
        assert all(path == root or path.startswith(f"{root}.") for path in paths if root)


@quick
@given(TREES, TREES)
def test_structures_are_equal_if_and_only_if_the_trees_are(a: Any, b: Any) -> None:
    first, second = tree.flatten(a)[1], tree.flatten(b)[1]
    assert (first == second) == (shape_of(a) == shape_of(b))
    if first == second:
        assert hash(first) == hash(second)


@quick
@given(TREES)
def test_a_copy_has_an_equal_structure(value: Any) -> None:
    """Other tensors in containers of their own: what a second call of an unroll brings."""
    first, second = tree.flatten(value)[1], tree.flatten(copy.deepcopy(value))[1]
    assert first == second
    assert hash(first) == hash(second)


@quick
@given(TREES)
def test_map_leaves_keeps_the_structure(value: Any) -> None:
    numbers = iter(range(100))
    mapped = tree.map_leaves(lambda leaf: torch.tensor(next(numbers)), value)
    assert tree.flatten(mapped)[1] == tree.flatten(value)[1]
    assert [int(leaf) for leaf in tree.leaves(mapped)] == list(range(len(tensors(value))))
    pairs: list[tuple[Any, int]] = []
    tree.map_leaves(lambda leaf, number: pairs.append((leaf, int(number))), value, mapped)
    assert [number for _, number in pairs] == list(range(len(tensors(value))))


@quick
@given(TREES)
def test_specs_describe_the_leaves(value: Any) -> None:
    specs = tree.specs(value)
    assert tree.flatten(specs)[1] == tree.flatten(value)[1]
    for spec, leaf in zip(tree.leaves(specs), tensors(value), strict=True):
        assert isinstance(spec, Spec)
        assert (spec.shape, spec.dtype, spec.device) == (tuple(leaf.shape), leaf.dtype, leaf.device)
        assert spec.num_bytes == leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else True
    assert tree.leaves(tree.specs(specs)) == tree.leaves(specs)


LEAF = torch.zeros(2)
DIFFERENT: list[tuple[str, Any, Any]] = [
    ("list and tuple", [LEAF], (LEAF,)),
    ("dict and OrderedDict", {"a": LEAF}, OrderedDict(a=LEAF)),
    ("two named tuples", Pair(LEAF, None), OtherPair(LEAF, None)),
    ("named tuple and tuple", Pair(LEAF, LEAF), (LEAF, LEAF)),
    ("two dataclasses", Output(LEAF), Slim(LEAF)),
    ("two keys", {"a": LEAF}, {"b": LEAF}),
    ("order of keys", {"a": LEAF, "b": None}, {"b": None, "a": LEAF}),
    ("two static values", (LEAF, 1), (LEAF, 2)),
    ("static value and leaf", (LEAF, 1), (LEAF, LEAF)),
    ("None and nothing", (LEAF, None), (LEAF,)),
    ("nesting", [[LEAF, LEAF]], [[LEAF], [LEAF]]),
    ("a number and a boolean", (LEAF, 1), (LEAF, True)),
    ("an integer and a float", (LEAF, 1), (LEAF, 1.0)),
    ("two zeros", (LEAF, 0.0), (LEAF, -0.0)),
]


@pytest.mark.parametrize(("a", "b"), [(a, b) for _, a, b in DIFFERENT], ids=[name for name, _, _ in DIFFERENT])
def test_what_differs_is_no_equal_structure(a: Any, b: Any) -> None:
    """A structure is part of the key under which programs are kept: what a model could tell apart must be two keys."""
    assert tree.flatten(a)[1] != tree.flatten(b)[1]


def test_unflatten_takes_any_values_and_exactly_enough() -> None:
    _, structure = tree.flatten({"a": LEAF, "b": [LEAF, "static"]})
    assert tree.unflatten(structure, [1, 2]) == {"a": 1, "b": [2, "static"]}
    with pytest.raises((StopIteration, RuntimeError, ValueError)):
        tree.unflatten(structure, [1])


def test_map_leaves_wants_as_many_leaves_everywhere() -> None:
    with pytest.raises(ValueError, match="zip"):
        tree.map_leaves(torch.add, [LEAF, LEAF], [LEAF])


def test_a_dataclass_type_is_static() -> None:
    leaves, structure = tree.flatten((Output, LEAF))
    assert len(leaves) == 1
    assert tree.unflatten(structure, leaves)[0] is Output


def test_names_and_descriptions() -> None:
    value = {"layer.0": LEAF, "pair": Pair(LEAF.long(), [Output(LEAF.double(), None)])}
    assert tree.paths(value) == ["layer.0", "pair.first", "pair.second.0.logits"]
    assert tree.paths(value, "x")[0] == "x.layer.0"
    assert tree.paths(LEAF) == ["value"]
    assert tree.paths(LEAF, "x") == ["x"]
    assert tree.paths(None) == []
    assert tree.describe(value) == "float32[2], int64[2], float64[2]"
    assert tree.describe(None) == "no tensors"
    assert str(Spec((), torch.bfloat16, torch.device("cpu"))) == "bfloat16[]"
    assert Spec((2, 3), torch.bfloat16, torch.device("cpu")).num_bytes == 12
