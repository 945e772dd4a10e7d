"""Compiles for the vector instructions that the processor has, without Inductor's trials of them.

Before its first kernel for the CPU Inductor builds and loads a small library for each set of instructions, to find out whether compiler and
PyTorch support it. Up to four of these include PyTorch's headers, which takes seconds each, and up to seven are short. Here the programs
themselves are the trial: if one cannot be built or loaded, what was assumed is forgotten and Inductor's own trials are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adaptrt.backend.inductor.available import comes_from_outside
from adaptrt.backend.inductor.exchange import INSTRUCTIONS
from adaptrt.graph.exchange import exchanged

_trusts_the_processor = True


def trusting_the_processor(compile_once: Callable[[], Any]) -> Any:
    """What `compile_once` returns, called a second time if its code cannot be built for the processor's instructions."""
    global _trusts_the_processor
    if not _trusts_the_processor or not INSTRUCTIONS.holds or _user_has_decided():
        return compile_once()
    try:
        with exchanged(INSTRUCTIONS, lambda original: _passes):
            return compile_once()
    except Exception as error:
        if comes_from_outside(error):
            raise
        forget_instructions()
        result = compile_once()  # raises again where the instructions were not the reason
        _trusts_the_processor = False
        return result


def _user_has_decided() -> bool:
    from torch._inductor import config

    return config.cpp.vec_isa_ok is not None


def _passes(self: Any, code: str) -> bool:
    """In place of `VecISA.check_build`."""
    del self, code
    return True


def forget_instructions() -> None:
    """Lets Inductor find out anew which vector instructions can be used."""
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        for name in dir(type(isa)):
            if name.startswith(("_is_", "is_")):
                vars(isa).pop(name, None)  # what a trial has found, over the class's False
        for name in ("__bool__", "_VecISA__bool__impl", "is_avx512_bf16_supported", "is_amx_fp16_supported"):
            forget = getattr(getattr(type(isa), name, None), "cache_clear", None)
            if forget is not None:
                forget()
