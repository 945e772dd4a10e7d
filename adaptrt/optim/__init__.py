"""Optimisers as pure functions: what `torch.optim` computes, out of place, differentiable and traceable."""

from adaptrt.optim.adam import adam, adamw
from adaptrt.optim.base import Optimizer, Transform
from adaptrt.optim.sgd import sgd
from adaptrt.optim.transforms import chain, clip_by_global_norm, partition, scale_by_schedule

__all__ = ["Optimizer", "Transform", "adam", "adamw", "chain", "clip_by_global_norm", "partition", "scale_by_schedule", "sgd"]
