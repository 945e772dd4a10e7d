"""Options of the suite, and what every report says about the machine."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from benchmarks.suite.contest import without_tf32


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=float, default=1.0, help="of the number of calls that each contestant is timed")
    parser.addoption("--entrants", help="names of contestants, separated by semicolons; left out: all")
    parser.addoption("--quantities", default="adapt;predict;meta", help="which latencies, separated by semicolons")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where models are; JAX stays away if it is elsewhere")
    parser.addoption("--threads", type=int, help="PyTorch's threads; left out: its own choice. JAX always chooses by itself")


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)
    if config.getoption("--device") == "cuda":
        without_tf32()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    on_gpu = config.getoption("--device") == "cuda"
    machine_info.update(
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        kind="cuda" if on_gpu else "cpu",
        precision=f"float32, TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'} for products and "
        f"{'on' if torch.backends.cudnn.allow_tf32 else 'off'} for convolutions"
        if on_gpu
        else "float32",
        processor=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
    )
