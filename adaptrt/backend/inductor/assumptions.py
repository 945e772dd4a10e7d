"""Makes generated code hold in every process that runs it: in one with more threads or fewer, and on another processor.

Generated code has buffers with a place for each thread that PyTorch used when the program was compiled. Where that number was the number
of processors, Inductor from 2.12 on leaves it to OpenMP how many threads there are, and with more of them the code writes beyond its
buffers. So the number is always given to Inductor as a setting, which also makes it part of the key on disk. At every parallel region the
code then asks OpenMP how many threads its caller may use, and takes fewer where that is less.

The C++ compiler uses all instructions of the processor that it runs on, and Inductor's keys know some of them only. So the source of each
kernel names them all: a library that was built on one processor is not loaded on another, where it might end the process.

Known limits: after `torch.set_num_threads` with a larger number, programs that exist stay on as many threads as before.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from adaptrt.backend.inductor import processor
from adaptrt.backend.inductor.exchange import ASSUMPTIONS
from adaptrt.graph.exchange import exchanged

_REGION = re.compile(r"(#pragma omp parallel num_threads)\((\d+)\)")


def number_of_threads() -> dict[str, Any]:
    """Returns the settings of Inductor with which a program is compiled for as many threads as PyTorch uses now."""
    from torch._inductor import config

    return {} if config.cpp.threads >= 1 else {"cpp.threads": torch.get_num_threads()}


def assumptions_in_the_code() -> contextlib.AbstractContextManager[None]:
    """A block in which kernels are generated that take no more threads than their caller may use, and that name their processor."""
    return exchanged(ASSUMPTIONS, functools.partial(functools.partial, _codegen))


def _codegen(original: Callable[..., str], self: Any, *args: Any, **kwargs: Any) -> str:
    """In place of `KernelGroup.codegen_group`, which returns the source of one kernel."""
    code = _REGION.sub(r"\1(std::min(\2, omp_get_max_threads()))", original(self, *args, **kwargs))
    return f"// For a processor with {processor.instruction_sets()}\n{code}" if code else code
