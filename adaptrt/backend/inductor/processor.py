"""Which kind of processor this is, which instructions it has, and which rewrites are for some kinds only.

A rewrite that helps one processor can hurt another. What a program computes must not depend on how busy the machine was, so nothing is
timed here: decisions are made by the processor's name and instruction sets. The measurements behind them are `benchmarks/rewrites.py`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch


def capabilities() -> Mapping[str, Any]:
    """The name, the instruction sets and the sizes of caches, as PyTorch knows them; empty where its version does not say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


@functools.cache
def instruction_sets() -> str:
    """All instruction sets that the processor has, in alphabetical order; empty where PyTorch does not say."""
    return " ".join(sorted(name for name, has in capabilities().items() if has is True))


@functools.cache
def mkl_is_slow() -> bool:
    """Whether products are MKL's, the processor has AVX-512, and it is not Intel's. An unknown one is taken for Intel's."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    found = capabilities()
    return bool(found.get("avx512_f")) and "intel" not in str(found.get("cpu_name", "intel")).lower()
