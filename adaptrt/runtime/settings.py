"""The arguments of `compile_unroll`, checked and resolved, as one value."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from adaptrt import tree
from adaptrt.adjoint import Adjoint
from adaptrt.backend import Backend
from adaptrt.inner import check
from adaptrt.inner.reader import Selection
from adaptrt.inner.step import Batch, LossFunction
from adaptrt.optim import Optimizer
from adaptrt.optim.source import Source, source


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Holds what `compile_unroll` was asked for.

    Attributes:
      model, loss, query_loss, k, per_step, cache_size: as given.
      adapted: names of the parameters that adapt.
      opt: the optimiser as given, None if buffers alone adapt.
      source: reads it at every call.
      adjoint: None to choose one for each shape of data.
      backend: what runs the programs.
      must_be_warm: whether data of a shape that `warmup` has not seen is refused.
      check_finite: whether data with NaN or infinity is refused.
      device: where the model was when the unroll was made.
      dtype: of the autocast that a step runs in, None if it runs in none.
      weighted: whether batches have weights of examples, and the losses return one value for each.
      selection: what decided which parameters adapt.
    """

    model: nn.Module
    loss: LossFunction
    query_loss: LossFunction
    adapted: frozenset[str]
    opt: Optimizer | torch.optim.Optimizer | None
    source: Source
    k: int
    adjoint: Adjoint | None
    backend: Backend
    per_step: bool
    must_be_warm: bool
    cache_size: int
    check_finite: bool
    device: torch.device
    dtype: torch.dtype | None
    weighted: bool
    selection: Selection

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the losses that are modules; plain tensor attributes are looked up in these."""
        return [part for part in (self.model, self.loss, self.query_loss) if isinstance(part, nn.Module)]

    def batch(self, name: str, value: Any) -> Batch:
        """Returns what the user gave as a batch, after the checks of `check.as_batch`."""
        return check.as_batch(name, value, self.device, self.weighted)

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        """Returns the settings for copies of model, loss and optimiser."""
        for value in tree.leaves(self.source.hyper()):
            if not value.is_leaf:  # what it was computed from is the caller's
                memo[id(value)] = value
        model, loss, query_loss, opt = copy.deepcopy((self.model, self.loss, self.query_loss, self.opt), memo)
        params = {name: param for name, param in model.named_parameters() if name in self.adapted}
        return dataclasses.replace(self, model=model, loss=loss, query_loss=query_loss, opt=opt, source=source(opt, params))
