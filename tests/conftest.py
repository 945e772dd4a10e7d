"""What all tests share: their seed, fixtures, and `--full`, which runs whole products of tables."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the full products of models, optimisers, adjoints and backends (hours)")


def pytest_configure(config: pytest.Config) -> None:
    # Two workers on two cores: teams of threads would wait for each other at every kernel of these tiny models.
    torch.set_num_threads(1)
    # What is imported here is hundreds of thousands of objects, and a full collection goes through all of them: a tenth of the time.
    gc.set_threshold(gc.get_threshold()[0], gc.get_threshold()[1], 100)
    config.addinivalue_line("markers", "full: a cell of a full product; left out without --full")


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:  # pyright: ignore[reportUnusedFunction]
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """New floating-point tensors are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def empty_cache() -> Iterator[None]:
    """A cache of compiled graphs on disk that is the file's own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from torch._inductor.utils import fresh_cache
    with fresh_cache():
        yield


@pytest.fixture(params=["alone", "beside another thread"])
def company(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whether another thread of Python's exists, which may write, too."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    if request.param != "alone":
        other.start()
    yield
    done.set()
    if request.param != "alone":
        other.join()


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The C++ code of each library that is asked for."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    from adaptrt.backend.inductor import few_libraries

    found: list[str] = []

    def noting(original: Any) -> Any:
        def noted(source: str, *args: Any, **kwargs: Any) -> Any:
            found.append(source)
            return original(source, *args, **kwargs)

        return noted

    monkeypatch.setattr(few_libraries, "open_later", noting(few_libraries.open_later))
    # What Inductor builds by itself, where nothing is exchanged in it.
    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", noting(CppPythonBindingsCodeCache.load_async))
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
