"""Optimisers as pure functions. They compute what `torch.optim` computes, but out of place, so they can be differentiated and traced."""

from adaptrt.optim.adadelta import adadelta
from adaptrt.optim.adafactor import adafactor
from adaptrt.optim.adagrad import adagrad
from adaptrt.optim.adam import adam, adamw
from adaptrt.optim.adamax import adamax
from adaptrt.optim.asgd import asgd
from adaptrt.optim.base import Optimizer, PerTask, Schedule, Transform
from adaptrt.optim.lbfgs import lbfgs
from adaptrt.optim.learned import learned
from adaptrt.optim.muon import muon
from adaptrt.optim.nadam import nadam
from adaptrt.optim.radam import radam
from adaptrt.optim.rmsprop import rmsprop
from adaptrt.optim.rprop import rprop
from adaptrt.optim.schedule import per_step, per_task, schedule, scheduled
from adaptrt.optim.sgd import sgd
from adaptrt.optim.transforms import chain, clip_by_global_norm, partition, scale_by_schedule
from adaptrt.optim.wrappers import ema, proximal, sharpness_aware, skip_not_finite

__all__ = [
    "Optimizer",
    "PerTask",
    "Schedule",
    "Transform",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "chain",
    "clip_by_global_norm",
    "ema",
    "lbfgs",
    "learned",
    "muon",
    "nadam",
    "partition",
    "per_step",
    "per_task",
    "proximal",
    "radam",
    "rmsprop",
    "rprop",
    "scale_by_schedule",
    "schedule",
    "scheduled",
    "sgd",
    "sharpness_aware",
    "skip_not_finite",
]
