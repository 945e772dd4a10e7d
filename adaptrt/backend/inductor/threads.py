"""Decides how many threads a program runs on: at most as many as it was compiled for, and at most as many as the calling thread may use.

Generated code has buffers with a place for each thread that PyTorch used when the program was compiled. Where that number was the number
of processors, Inductor from 2.12 on leaves it to OpenMP how many threads there are, and with more of them the code writes beyond its
buffers. So the number is always given to Inductor as a setting, which also makes it part of the key on disk. At every parallel region the
code then asks OpenMP how many threads the caller wants, and takes fewer where that is less.

Known limits: after `torch.set_num_threads` with a larger number, programs that exist stay on as many threads as before.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from adaptrt.backend.inductor.exchange import CALLERS_THREADS
from adaptrt.graph.exchange import exchanged

_REGION = re.compile(r"(#pragma omp parallel num_threads)\((\d+)\)")


def number_of_threads() -> dict[str, Any]:
    """Returns the settings of Inductor with which a program is compiled for as many threads as PyTorch uses now."""
    from torch._inductor import config

    return {} if config.cpp.threads >= 1 else {"cpp.threads": torch.get_num_threads()}


def threads_of_the_caller() -> contextlib.AbstractContextManager[None]:
    """A block in which the generated regions take no more threads than their caller may use."""
    return exchanged(CALLERS_THREADS, functools.partial(functools.partial, _codegen))


def _codegen(original: Callable[..., str], self: Any, *args: Any, **kwargs: Any) -> str:
    """In place of `KernelGroup.codegen_group`, which returns the source of one kernel."""
    return _REGION.sub(r"\1(std::min(\2, omp_get_max_threads()))", original(self, *args, **kwargs))
