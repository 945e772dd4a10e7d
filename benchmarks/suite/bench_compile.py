"""Seconds from a fresh process's first call to its first meta-gradient, with empty caches on disk and with those that it left.

A process of its own for each measurement; importing PyTorch and Inductor is not counted, as a server does it once. The cache directory is
empty at first, but for what PyTorch keeps elsewhere (precompiled headers).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.suite.playback import CLOCK, play_back

_PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
import torch._inductor.compile_fx
from adaptrt import Replay, Unrolled
from benchmarks.suite.contestants import ours
from benchmarks.suite.workloads import WORKLOADS

workload, adjoint, device = sys.argv[1:]
adjoints = {"Replay()": Replay, "Unrolled()": Unrolled}
calls = ours(WORKLOADS[workload]._replace(device=device), torch.float32, adjoint=adjoints[adjoint]())
began = time.perf_counter()
calls["meta"]()
if device == "cuda":
    torch.cuda.synchronize()
print(json.dumps(time.perf_counter() - began))
"""


def first_call_s(workload: str, adjoint: str, cache: str, device: str = "cpu") -> float:
    """Of the meta-gradient, in a process with this cache directory."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    root = Path(__file__).parents[2]
    output = subprocess.check_output([sys.executable, "-c", _PROGRAM, workload, adjoint, device], env=environment, cwd=root, text=True)
    return json.loads(output.splitlines()[-1])


@functools.cache
def seconds(workload: str, adjoint: str, device: str) -> dict[str, float]:
    """By what is on disk."""
    with tempfile.TemporaryDirectory() as cache:
        return {state: first_call_s(workload, adjoint, cache, device) for state in ("empty", "warm")}


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False, group="compilation")
@pytest.mark.parametrize("cache", ["empty", "warm"])
@pytest.mark.parametrize(
    "workload, adjoint", [("sine", "Replay()"), ("sine", "Unrolled()"), ("conv4-5shot", "Replay()"), ("transformer", "Replay()")]
)
def test_compile_time(workload: str, adjoint: str, cache: str, benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    benchmark.extra_info.update(workload=workload, adjoint=adjoint, cache=cache)
    play_back(benchmark, [seconds(workload, adjoint, pytestconfig.getoption("--device"))[cache]])
