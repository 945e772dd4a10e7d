"""A process that has imported everything and compiled nothing. It forks a child for each scenario, which saves the time of imports.

What a child does is `scenario`; the rest is for the tests to say in a request: environment variables, a limit of file sizes, a moment at
which the child is killed. Run as a program, it reads requests from its input, one in a line, and writes answers to its output.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TIME_LIMIT_S = 100.0


class Zygote:
    """The process, from the side of the tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def run(self, **request: Any) -> dict[str, Any]:
        """Forks a child for a request, waits for it, and returns its answer, or under "status" how it ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def data(num_support: int, num_features: int = 2) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A model, support and query of a scenario, in float64."""
    generator = torch.Generator().manual_seed(num_support)
    torch.manual_seed(num_features)
    model = nn.Sequential(nn.Linear(num_features, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def batch(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, num_features, dtype=torch.float64, generator=generator)
        return x, torch.randn(size, 3, dtype=torch.float64, generator=generator)

    return model, batch(num_support), batch(3)


def mean_of_squares(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of a scenario."""
    return (prediction - target).square().mean()


def scenario(sizes: list[int], then: str | None = None) -> list[list[float]]:
    """For each size of the support the meta-loss and its gradient, compiled in this process. `then` removes a folder before the last."""
    import adaptrt

    found: list[list[float]] = []
    for place, size in enumerate(sizes):
        if then is not None and place == len(sizes) - 1:
            shutil.rmtree(then)
        model, support, query = data(size)
        unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 2, loss=mean_of_squares, adjoint=adaptrt.Unrolled())
        loss = unroll(support, query)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([float(x) for value in (loss, *gradients) for x in value.detach().flatten()])
    return found


def _give_up_powers() -> None:
    """Permissions of files hold for root, too, from now on."""
    version_3, libc = 0x20080522, ctypes.CDLL(None)
    if sys.platform == "linux":
        libc.capset((ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)())


def _child(request: dict[str, Any], answer: int) -> None:
    import resource

    from adaptrt.backend.inductor import library

    for name, value in request.get("environment", {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if request.get("powerless"):
        _give_up_powers()
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found: dict[str, Any] = {"numbers": scenario(request["sizes"], request.get("then"))}
        except Exception as error:
            found = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    ours = [str(entry.message) for entry in caught if entry.category.__module__ == "adaptrt.errors"]
    os.write(answer, json.dumps({**found, "warnings": ours, "libraries": len(library._open)}).encode())  # pyright: ignore[reportPrivateUsage]


def _fork(request: dict[str, Any]) -> tuple[int, int]:
    """Starts a child. Returns it, and where its answer is read."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            os.setsid()
            _child(request, write)
        finally:
            os._exit(0)
    os.close(write)
    return child, read


def _collect(child: int, read: int, limit_s: float) -> dict[str, Any]:
    text = b""
    deadline_s = time.monotonic() + limit_s
    while select.select([read], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
        part = os.read(read, 1 << 16)
        if not part:
            break
        text += part
    else:
        os.kill(child, signal.SIGKILL)  # and not what it has started, which goes on, as it would elsewhere
    os.close(read)
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"status": os.waitstatus_to_exitcode(status)}


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    children = [_fork(request) for _ in range(request.get("children", 1))]
    answers = [_collect(*child, request.get("kill_after_s", TIME_LIMIT_S)) for child in children]
    return {**answers[0], "others": answers[1:]}


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._inductor.async_compile
        import torch._inductor.compile_fx
        import torch._inductor.lowering

        import adaptrt.backend.inductor.compile  # noqa: F401
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)
