"""What all tests share: `--full`, which runs products of tables that the default run only covers in part."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the full products of models, optimisers, adjoints and backends (hours)")


def pytest_configure(config: pytest.Config) -> None:
    # Two workers on two cores: teams of threads would wait for each other at every kernel of these tiny models.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "full: a cell of a full product; left out without --full")


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:  # pyright: ignore[reportUnusedFunction]
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
