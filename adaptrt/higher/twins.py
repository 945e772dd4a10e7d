"""The twins of a handle's modules: copies that hold one version of the fast weights, and run in place of the handle.

Because a forward pass runs on twins, whatever looks at its modules later finds the weights of its own time, as checkpointing does when it
computes activations again. What a forward pass leaves in attributes is handed over to the handle afterwards.
"""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from adaptrt.functional import refers, remapped
from adaptrt.higher.places import Places, hold

_CONTAINERS = frozenset({list, dict, set, collections.OrderedDict, collections.deque})
_SIMPLE = frozenset({bool, int, float, str, type(None)})
_APART = frozenset({"_parameters", "_modules", "_adaptrt_fast", "_adaptrt_number", "_adaptrt_only_shows"})
"""Attributes of a handle's module that its twin does not share."""
_MISSING = object()


class Links(NamedTuple):
    """Which attributes of one module of a handle are more than values.

    Attributes:
      names: the names of those that refer to modules of the handle.
      containers: the names of those that are containers.
      containers_of: a function from the module's attributes to these containers.
    """

    names: list[str]
    containers: list[str]
    containers_of: Callable[[dict[str, Any]], tuple[Any, ...]]


def links_of(places: Places) -> list[Links]:
    """Returns the links of each module of a handle, which hold until an attribute of the handle is set."""
    parts = places.parts()
    known = {id(part): part for part in parts if part is not None}
    return [_links({} if part is None else vars(part), known) for part in parts]


def _links(own: Mapping[str, Any], parts: Mapping[int, nn.Module]) -> Links:
    links: list[str] = []
    containers: list[str] = []
    for name, value in own.items():
        kind = type(value)
        if kind in _SIMPLE or name in _APART:
            continue
        if kind in _CONTAINERS:
            containers.append(name)
            if not value:
                continue
        if refers(value, parts):
            links.append(name)
    if len(containers) < 2:  # of which itemgetter makes no tuple
        return Links(links, containers, lambda own: tuple([own[name] for name in containers]))
    return Links(links, containers, operator.itemgetter(*containers))


class Twins(NamedTuple):
    """The twins of a handle's modules with one version of the fast weights, and what a forward pass may change of them.

    All are lists with an entry for each module of the handle.

    Attributes:
      modules: the twins.
      attributes: their attributes, as they are now.
      given: their attributes, as they were when the twins were made.
      links: which attributes refer to modules, and which are containers.
      containers: the containers.
      children: their submodules, as they are now.
      submodules: their submodules, as they were when the twins were made.
    """

    modules: list[nn.Module]
    attributes: list[dict[str, Any]]
    given: list[dict[str, Any]]
    links: list[Links]
    containers: list[tuple[Any, ...]]
    children: list[dict[str, nn.Module | None]]
    submodules: list[dict[str, nn.Module | None]]

    def untouched(self) -> bool:
        """Tells whether a forward pass certainly left nothing behind.

        It nearly never does, so this is asked at once for all modules.
        """
        return (
            list(map(len, self.attributes)) == list(map(len, self.given))
            and all(map(operator.is_, _values(self.attributes), _values(self.given)))
            and self.children == self.submodules
            and not any(map(any, self.containers))
        )

    def hand_over(self, parts: Sequence[nn.Module | None]) -> bool:
        """Changes the handle's modules as a forward pass has changed the twins: attributes set or deleted, containers written to.

        Args:
          parts: the handle's modules, with None for one that is no more.
        Returns:
          Whether there was anything to change.
        """
        of_twin = {id(twin): part for part, twin in zip(parts, self.modules, strict=True) if part is not None}
        changed = False
        for part, now, given, links, containers, modules in zip(
            parts, self.attributes, self.given, self.links, self.containers, self.submodules, strict=True
        ):
            if part is None:
                continue
            own = vars(part)
            for name, value in zip(links.containers, containers, strict=True):  # which may have been written to
                if value and refers(value, of_twin) and own.get(name) is value:
                    own[name], changed = remapped(value, of_twin), True
            if len(now) == len(given) and all(map(operator.is_, now.values(), given.values())) and now["_modules"] == modules:
                continue
            for name, value in now.items():
                if name not in _APART and given.get(name, _MISSING) is not value:
                    own[name] = remapped(value, of_twin) if refers(value, of_twin) else value
                    given[name], changed = value, True
            for name in [name for name in given if name not in now]:
                own.pop(name, None)
                del given[name]
                changed = True
            if now["_modules"] != modules:
                _hand_over_submodules(part, now["_modules"], modules, of_twin)
                changed = True
        return changed


def _hand_over_submodules(
    part: nn.Module, now: dict[str, nn.Module | None], before: dict[str, nn.Module | None], of_twin: Mapping[int, nn.Module]
) -> None:
    """Gives `part` the submodules that its twin has now, and makes `before` equal to `now`."""
    for name in {**before, **now}:
        if name not in now:
            part._modules.pop(name, None)
        elif now[name] is not before.get(name, _MISSING):
            child = now[name]
            part._modules[name] = child if child is None else of_twin.get(id(child), child)
    before.clear()
    before.update(now)


def _values(mappings: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, mappings))


def make_twins(places: Places, links: list[Links], values: Sequence[Tensor]) -> Twins:
    """Makes the twins of a handle's modules.

    Args:
      places: the handle's modules, and where the fast weights go.
      links: `links_of(places)`.
      values: the fast weights that the twins hold.
    """
    twins: list[nn.Module] = [object.__new__(kind) for kind in places.classes]
    parts = places.parts()
    of_part = {id(part): twin for part, twin in zip(parts, twins, strict=True) if part is not None}
    attributes = list(map(vars, twins))
    for part, own, links_of_part in zip(parts, attributes, links, strict=True):
        if part is None:
            continue
        own.update(vars(part))
        del own["_adaptrt_fast"], own["_adaptrt_number"]
        own.pop("_adaptrt_only_shows", None)
        own["_parameters"] = own["_parameters"].copy()
        own["_modules"] = {name: None if child is None else of_part.get(id(child), child) for name, child in part._modules.items()}
        for name in links_of_part.names:
            own[name] = remapped(own[name], of_part)
    for number in places.owners:
        if parts[number] is not None:
            hold(twins[number], places.of_module[number], values)
    containers = [links_of_part.containers_of(own) for own, links_of_part in zip(attributes, links, strict=True)]
    children = [own.get("_modules", {}) for own in attributes]
    given, submodules = [own.copy() for own in attributes], [held.copy() for held in children]
    return Twins(twins, attributes, given, links, containers, children, submodules)
