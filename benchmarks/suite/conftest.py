"""Options of the suite, and what every report says about the machine."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=float, default=1.0, help="of the number of calls that each contestant is timed")
    parser.addoption("--entrants", help="names of contestants, separated by semicolons; left out: all")
    parser.addoption("--threads", type=int, help="PyTorch's threads; left out: its own choice. JAX always chooses by itself")


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    del config
    machine_info.update(
        torch=torch.__version__, device="CPU", processor=platform.processor() or platform.machine(), threads=torch.get_num_threads()
    )
