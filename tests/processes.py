"""Runs a script in a process of its own, for tests of what a process does to itself: forks, signals, its end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parent.parent

PRELUDE = """
import os, queue, signal, sys, threading, time, warnings
import torch, torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
import adaptrt

torch.set_num_threads(int(os.environ.get("THREADS", "1")))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored


class Net(nn.Module):
    '''Calls `happens` once while it is captured. That is behind a queue, where a capture does not look for state.'''

    def __init__(self, happens=None):
        super().__init__()
        self.first, self.second = nn.Linear(2, 8), nn.Linear(8, 3)
        self.happens = queue.SimpleQueue()
        if happens is not None:
            self.happens.put(happens)

    def forward(self, x):
        if isinstance(x, FakeTensor) and not self.happens.empty():
            self.happens.get()()
        return self.second(torch.tanh(self.first(x)))


def data(size):
    return torch.randn(size, 2, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64)


def make(backend, happens=None):
    torch.manual_seed(0)
    model = Net(happens).double()
    return model, adaptrt.compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), k=2, loss=F.mse_loss, backend=backend)


def check(model, unroll, size):
    '''Adaptation and meta-gradient against a loop over autograd.'''
    support, query = data(size), data(size + 1)
    named = dict(model.named_parameters())
    params = named
    for _ in range(2):
        loss = F.mse_loss(torch.func.functional_call(model, params, support[0]), support[1])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: value - 0.1 * grad for (name, value), grad in zip(params.items(), grads)}
    loss = F.mse_loss(torch.func.functional_call(model, params, query[0]), query[1])
    wanted = torch.autograd.grad(loss, list(named.values()))
    with torch.no_grad():
        adapted = unroll.adapt(support)
    for name, value in adapted.params.items():
        torch.testing.assert_close(value, params[name].detach(), rtol=1e-10, atol=1e-12)
    found = unroll(support, query)
    torch.testing.assert_close(found, loss, rtol=1e-10, atol=1e-12)
    for value, expected in zip(torch.autograd.grad(found, list(named.values())), wanted):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def state():
    '''What a capture changes in the process for a time.'''
    import gc
    from torch.fx import _symbolic_trace
    from torch.utils import _python_dispatch, checkpoint
    from torch.nn.modules import module
    names = "_get_cudnn_enabled _get_mkldnn_enabled _get_flash_sdp_enabled _get_math_sdp_enabled _set_sdp_use_flash".split()
    return {
        "gc": (gc.isenabled(), gc.get_threshold()),
        "flags": [torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()]
        + [getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in ("math", "flash", "mem_efficient")],
        "functions": [getattr(torch._C, name) for name in names] + [torch.is_grad_enabled, torch.is_inference_mode_enabled],
        "modes": [torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack(), torch.is_grad_enabled()],
        "tracing": [bool(_symbolic_trace.is_fx_symbolic_tracing()), _python_dispatch._is_in_torch_dispatch_mode],
        "checkpoint": [vars(checkpoint.CheckpointFunction).get("apply")],
        "hooks": [len(module._global_forward_hooks), len(module._global_forward_pre_hooks)],
        "warnings": warnings.filters[:],
        "profile": [sys.getprofile()],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "inductor": inductor(),
    }


def inductor():
    if "torch._inductor.async_compile" not in sys.modules:
        return None
    from adaptrt.backend.inductor.exchange import TABLE
    owners = [target.owner() for entry in TABLE for target in entry.exchanged]
    return [vars(owner).get(name) for owner, name in owners]


def in_child(fn, seconds=100):
    '''Runs `fn` in a forked child, and returns how that ended.'''
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        signal.alarm(seconds)
        code = 1
        try:
            fn()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

INTERRUPTED = """
class Stop(BaseException):
    '''Raised by a signal handler.'''

def handler(number, frame):
    raise Stop

signal.signal(signal.SIGUSR1, handler)

def interrupted(fn, at, counts):
    '''Calls `fn`, and the handler where the interpreter may call it: at the beginning of the function call number `at`.'''
    num_calls = 0

    def trace(frame, event, arg):
        nonlocal num_calls
        if event == "call" and counts(frame.f_code) and not is_of_own_block(frame):
            num_calls += 1
            if num_calls == at:
                sys.settrace(None)
                signal.getsignal(signal.SIGUSR1)(signal.SIGUSR1, frame)

    sys.settrace(trace)
    try:
        fn()
    except Stop:
        pass
    finally:
        sys.settrace(None)
    return num_calls

def is_of_own_block(frame):
    '''Whether PyTorch enters or leaves a `no_grad` of this script's own. It does not bear a signal there, whoever uses it.'''
    outer = frame
    while outer.f_code.co_filename.endswith("grad_mode.py"):
        outer = outer.f_back
    return outer is not frame and outer.f_code.co_filename == "<string>"

def enters_or_leaves(code):
    return code.co_name in ("__enter__", "__exit__", "undo", "close", "release", "hold", "_undo_all_but")

def anything(code):
    return True

def use(size):
    '''All that is captured for data of a new size.'''
    support = data(size)
    with torch.no_grad():
        unroll.adapt(support)
    torch.autograd.grad(unroll(support, support), list(model.parameters()))

def at_random_moments(fn, counts, number):
    import random
    draws = random.Random(0)
    total = interrupted(lambda: fn(50), -1, counts)
    assert total > 100
    before = state()
    for index in range(number):
        at = draws.randrange(1, total + 1)
        interrupted(lambda: fn(100 + index), at, counts)
        assert state() == before, (index, at, state(), before)
        fn(100 + index)
        if index % 10 == 0:
            check(model, unroll, 200 + index)
    check(model, unroll, 99)
"""
"""For scripts: calls a function, and a handler of a signal somewhere in it."""


def run_script(script: str, timeout_s: float = 150, **environment: str) -> str:
    """Runs the prelude and `script`; returns what they printed.

    Raises:
      AssertionError: it failed or took too long.
    """
    process = start(script, environment)
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"it hangs:\n{output}\n{errors}") from None
    assert process.returncode == 0, f"{process.returncode}\n{output}\n{errors}"
    return output


def start(script: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Starts the prelude and `script`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def leave_group() -> None:
    """Ends the process group.

    Waits until gloo's threads have let go of what they hold under Python's lock. They abort a process that ends meanwhile, one in twenty
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    dist.barrier()
    time.sleep(0.2)
    dist.destroy_process_group()
