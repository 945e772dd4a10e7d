"""Modules that are imported within a pass, or held anywhere but in a global name: what they hold is followed, and stays whole."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_python_state import Net, assert_follows, batch, unrolled
from torch import Tensor

from adaptrt.errors import NotTraceable

SOURCE = """
import functools
import torch
SCALE = 2.0
COUNT = 0
CACHE = {}
LIMITS = {"low": 2.0}
@functools.lru_cache
def kept(size): return torch.linspace(1, 2, size, dtype=torch.float64)
def scale(): return SCALE
def table(size):
    if size not in CACHE:
        CACHE[size] = torch.linspace(1, 2, size, dtype=torch.float64)
    return CACHE[size]
NAMES = sorted(["b", "a"], key=lambda name: scale())
"""
NAME = "settings_of_a_test"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file with a module that nobody has imported yet."""
    (tmp_path / f"{NAME}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop(NAME, None)


@pytest.fixture
def module(written: None) -> ModuleType:
    return importlib.import_module(NAME)


def by_import(self: Net, x: Tensor) -> Tensor:
    import settings_of_a_test  # type: ignore[import-not-found]

    return self.linear(x) * settings_of_a_test.SCALE


def by_import_from(self: Net, x: Tensor) -> Tensor:
    from settings_of_a_test import SCALE  # type: ignore[import-not-found]

    return self.linear(x) * SCALE


def by_an_entry(self: Net, x: Tensor) -> Tensor:
    from settings_of_a_test import LIMITS  # type: ignore[import-not-found]

    return self.linear(x) * LIMITS["low"]


def by_a_function(self: Net, x: Tensor) -> Tensor:
    from settings_of_a_test import scale  # type: ignore[import-not-found]

    return self.linear(x) * scale()


def by_an_attribute(self: Net, x: Tensor) -> Tensor:
    return self.linear(x) * self.kept.SCALE


def by_an_entry_of_a_dict(self: Net, x: Tensor) -> Tensor:
    return self.linear(x) * self.table["module"].SCALE


def by_a_closure(self: Net, x: Tensor) -> Tensor:
    raise NotImplementedError


READS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "import": by_import,
    "from import": by_import_from,
    "from import of a dict": by_an_entry,
    "from import of a function": by_a_function,
    "an attribute": by_an_attribute,
    "an entry of a dict": by_an_entry_of_a_dict,
    "a closure": by_a_closure,
}


def model_of(forward: Callable[[Net, Tensor], Tensor], module: ModuleType) -> Net:
    if forward is by_a_closure:
        forward = lambda self, x: self.linear(x) * module.SCALE  # noqa: E731
    model = Net(forward)
    model.kept, model.table["module"] = module, module
    return model


@pytest.mark.parametrize("way", READS)
def test_a_value_of_a_module_is_followed(way: str, module: Any) -> None:
    model = model_of(READS[way], module)
    unroll = unrolled(model)
    assert_follows(unroll, model)
    before = unroll.adapt(batch()).params["linear.weight"]
    module.SCALE = module.LIMITS["low"] = 0.5
    assert_follows(unroll, model)
    assert not torch.equal(unroll.adapt(batch()).params["linear.weight"], before)


def counts_by_import(self: Net, x: Tensor) -> Tensor:
    import settings_of_a_test  # type: ignore[import-not-found]

    settings_of_a_test.COUNT += 1
    return self.linear(x) * settings_of_a_test.COUNT


def counts_by_an_attribute(self: Net, x: Tensor) -> Tensor:
    self.kept.COUNT += 1
    return self.linear(x) * self.kept.COUNT


def counts_by_an_entry(self: Net, x: Tensor) -> Tensor:
    self.table["module"].COUNT += 1
    return self.linear(x) * self.table["module"].COUNT


@pytest.mark.parametrize("forward", [counts_by_import, counts_by_an_attribute, counts_by_an_entry])
def test_state_of_a_module_is_refused_by_name_and_put_back(forward: Callable[[Net, Tensor], Tensor], module: Any) -> None:
    with pytest.raises(NotTraceable, match=r"COUNT.*Make it a buffer"):
        unrolled(model_of(forward, module)).adapt(batch())
    assert module.COUNT == 0


def test_state_of_a_module_that_the_pass_imports_first_is_refused_by_name(written: None) -> None:
    with pytest.raises(NotTraceable, match=r"COUNT.*Make it a buffer"):
        unrolled(Net(counts_by_import)).adapt(batch())
    assert sys.modules[NAME].COUNT == 0  # type: ignore[attr-defined]


def keeps_by_import(self: Net, x: Tensor) -> Tensor:
    from settings_of_a_test import kept  # type: ignore[import-not-found]

    return self.linear(x) * kept(3)


def keeps_in_a_table_by_import(self: Net, x: Tensor) -> Tensor:
    import settings_of_a_test  # type: ignore[import-not-found]

    return self.linear(x) * settings_of_a_test.table(3)


def keeps_in_a_module(self: Net, x: Tensor) -> Tensor:
    import settings_of_a_test  # type: ignore[import-not-found]

    if not hasattr(settings_of_a_test, "LATE"):
        settings_of_a_test.LATE = torch.linspace(1, 2, 3, dtype=torch.float64)
    return self.linear(x) * settings_of_a_test.LATE


CACHES = [keeps_by_import, keeps_in_a_table_by_import, keeps_in_a_module]


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("forward", CACHES)
def test_a_cache_of_a_module_keeps_nothing_of_a_trace(forward: Callable[[Net, Tensor], Tensor], is_known: bool, written: None) -> None:
    if is_known:
        importlib.import_module(NAME)
    model = Net(forward)
    unroll = unrolled(model)
    unroll.adapt(batch())
    assert_follows(unroll, model)


@pytest.mark.parametrize("forward", [by_import, by_import_from, by_an_entry, by_a_function])
def test_a_module_that_a_pass_imports_first_stays_whole(forward: Callable[[Net, Tensor], Tensor], written: None) -> None:
    model = Net(forward)
    unroll = unrolled(model)
    unroll.adapt(batch())
    assert vars(sys.modules[NAME]).keys() >= {"SCALE", "COUNT", "CACHE", "LIMITS", "kept", "table", "NAMES"}
    assert_follows(unroll, model)
    before = unroll.adapt(batch()).params["linear.weight"]
    module: Any = sys.modules[NAME]
    module.SCALE = module.LIMITS["low"] = 0.5
    assert_follows(unroll, model)
    assert not torch.equal(unroll.adapt(batch()).params["linear.weight"], before)


def test_a_module_that_makes_tensors_when_a_pass_imports_it_is_refused_by_name(written: None, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.py").write_text(SOURCE + "SCALE = torch.ones(3, dtype=torch.float64)")
    model = Net(by_import)
    with pytest.raises(NotTraceable, match=f"{NAME}.*Import it before"):
        unrolled(model).adapt(batch())
    importlib.import_module(NAME)
    assert_follows(unrolled(model), model)
