"""Everything that a failed call could change, noted before it and compared after it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def settings() -> dict[str, Any]:
    """Global state of PyTorch that a failed call could leave behind."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "functorch": maybe_current_level(),
        "python dispatcher": torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY),
        "global hooks": (
            len(torch.nn.modules.module._global_forward_pre_hooks),
            len(torch.nn.modules.module._global_forward_hooks),
        ),
        "python random": random.getstate(),
    }


def _copy(value: Any) -> Any:
    """A deep copy that keeps tensors' identities beside their values."""
    if type(value).__module__ == "numpy":
        return _copy(torch.from_numpy(value))[-2:]
    if isinstance(value, Tensor):
        unreadable = value.is_meta or isinstance(value, nn.parameter.UninitializedParameter)
        values = None if unreadable else value.detach().to_dense().clone()
        return (
            "tensor",
            id(value),
            value.requires_grad,
            value._version,
            id(value.grad_fn),
            values,
            _copy(value.grad) if value.is_leaf else None,
        )
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(entry) for entry in value]
    return value


def photograph(thing: Any) -> Any:
    """All that belongs to a watched module, optimiser, generator or tensor."""
    if isinstance(thing, nn.Module):
        hooks = [
            (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks), len(part._buffers))
            for part in thing.modules()
        ]
        plain = [
            {key: value for key, value in vars(part).items() if isinstance(value, Tensor | int | float | str)} for part in thing.modules()
        ]
        named = [*thing.named_parameters(remove_duplicate=False), *thing.named_buffers(remove_duplicate=False)]
        return _copy(named), [part.training for part in thing.modules()], hooks, _copy(plain)
    if isinstance(thing, torch.optim.Optimizer):
        return _copy(thing.param_groups), [(id(key), _copy(value)) for key, value in thing.state.items()]
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    return _copy(thing)


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.dtype == after.dtype and torch.equal(torch.nan_to_num(before, 7.0), torch.nan_to_num(after, 7.0))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(value, after[key]) for key, value in before.items())
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(before == after)


class Untouched:
    """Photographs what a case could touch, and compares."""

    def __init__(self, watched: tuple[Any, ...]) -> None:
        self.watched = watched
        self.photos = [photograph(thing) for thing in watched]
        self.random = torch.get_rng_state()
        self.settings = settings()

    def check(self) -> None:
        assert settings() == self.settings
        assert torch.equal(torch.get_rng_state(), self.random), "the global random state changed"
        for thing, photo in zip(self.watched, self.photos, strict=True):
            assert same(photo, photograph(thing)), f"{type(thing).__name__} changed"
