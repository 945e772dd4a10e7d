"""L-BFGS, with the arithmetic of `torch.optim.LBFGS` without line search and without stopping early.

Known limits: there is no line search. How often a strong Wolfe search evaluates the loss, and which of its points it takes, depends on
values, so it is not a fixed graph. Its step length also jumps where it takes another point, so the derivative would be that of one branch
only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import OptimizerMismatch
from adaptrt.optim.arithmetic import fit, larger, read
from adaptrt.optim.base import Number, Optimizer, Params, Value, check_count
from adaptrt.optim.checks import check_flags, check_grads, checked
from adaptrt.optim.schedule import scheduled

MIN_CURVATURE = 1e-10
"""A pair is kept only if y.s is larger than this, as in PyTorch."""


class LBFGSState(NamedTuple):
    """The state of all parameters together, as one vector of P elements in their order. H = history_size."""

    n_iter: Tensor
    """0-dim int64: the number of updates so far."""
    prev_flat_grad: Tensor
    """[P]: the gradient of the last update."""
    prev_step: Tensor
    """[P]: the step of the last update."""
    old_dirs: Tensor
    """[H, P]: differences of gradients, the newest last, with rows of zeros where there are none yet."""
    old_stps: Tensor
    """[H, P]: the steps that belong to them."""


def lbfgs(
    lr: Value = 1.0,
    max_iter: int = 20,
    history_size: int = 10,
    maximize: bool = False,
) -> Optimizer:
    """L-BFGS: a fixed number of quasi-Newton updates, from the last changes of the gradient (Liu & Nocedal 1989).

    One step of the unroll is `max_iter` updates on one batch, each with its own gradient; so is one `torch.optim.LBFGS.step(closure)`. All
    parameters together are one vector p with gradient g. (y_i, s_i) are the pairs that are kept, where i = 1 is the oldest:

        y = g - previous g; s = previous step               # if maximize, g is negated first
        append (y, s) if y.s > 1e-10; keep the last history_size pairs; h = y.s / y.y of the last (1 without any)
        q = -g
        for i from last to first:  a_i = s_i.q / y_i.s_i;  q = q - a_i * y_i
        d = h * q
        for i from first to last:  d = d + (a_i - y_i.d / y_i.s_i) * s_i
        p = p + lr * d                                      # lr / max(1, sum(|g|)) at the very first update

    The two loops are solved as triangular systems, so the graph does not grow with `history_size`. The memory does: each pair is two rows
    of P numbers in every state that an adjoint keeps. An unroll that starts without history cannot use more than `max_iter * k` pairs.

    Meta-gradients are exact, but they are useful only for a few updates on a well-conditioned loss. The longer the iteration, the more
    sharply its result depends on the start. The derivatives then grow until they no longer say anything about larger changes, and in
    float32 they are not accurate either. There are kinks where a pair is just kept or just left out; where sum(|g|) = 1 at the first update
    (the derivative is that of the sum); and where an element of g is 0 at the first update (|g| has derivative 0). `torch.optim.LBFGS` may
    stop early; with `tolerance_grad` and `tolerance_change` at 0 it computes the same as this.

    Args:
      lr: step size, >= 0; a number, a schedule, or a mapping by parameter name as in `sgd`.
      max_iter: number of updates in a step, >= 1.
      history_size: number of pairs that are kept, >= 1. The default is smaller than PyTorch's 100.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = lbfgs(lr=1.0)
      >>> params = {"w": torch.tensor([1.0, 2.0])}
      >>> state = opt.init(params)
      >>> for _ in range(opt.updates_per_step):
      ...     grads = {"w": torch.tensor([1.0, 10.0]) * params["w"]}
      ...     params, state = opt.update(grads, state, params, opt.hyper)
      >>> params["w"].abs().max() < 1e-4
      tensor(True)
    """
    check_count("max_iter", max_iter)
    check_count("history_size", history_size)
    check_flags(maximize=maximize)

    def init(params: Params) -> LBFGSState:
        flat = torch.zeros_like(_flat(params, params))
        rows = flat.expand(history_size, -1)
        return LBFGSState(
            torch.zeros((), dtype=torch.int64, device=flat.device), flat, flat.clone(), torch.zeros_like(rows), torch.zeros_like(rows)
        )

    def update(grads: Params, state: LBFGSState, params: Params, hyper: Mapping[str, Value]) -> tuple[dict[str, Tensor], LBFGSState]:
        check_grads(grads, params)
        if not grads:
            return dict(params), state
        g = _flat(grads, params)
        fits = isinstance(state, LBFGSState) and state.prev_flat_grad.shape == g.shape  # pyright: ignore[reportUnnecessaryIsInstance]
        if not fits or state.old_dirs.shape != (history_size, *g.shape):
            raise OptimizerMismatch(
                f"The state ({tree.describe(state)}) does not fit parameters of {g.numel()} elements and history_size={history_size}. Make "
                "it by init(params)."
            )
        g = -g if maximize else g
        # A zero gradient ends PyTorch's step before it looks at anything else.
        moves = torch.any(g != 0)
        y, s = g - state.prev_flat_grad, state.prev_step
        dirs, steps = state.old_dirs, state.old_stps
        keeps = moves & (torch.dot(y, s) > MIN_CURVATURE)
        dirs = torch.where(keeps, torch.cat([dirs[1:], y.unsqueeze(0)]), dirs)
        steps = torch.where(keeps, torch.cat([steps[1:], s.unsqueeze(0)]), steps)
        d = _direction(g, dirs, steps)
        lr = _rate(hyper, params, g)
        step = d * torch.where(state.n_iter == 0, lr / larger(g.abs().sum(), 1.0), lr)
        new = {name: p + part.to(p.dtype) for (name, p), part in zip(params.items(), _split(step, params), strict=True)}
        state = LBFGSState(
            state.n_iter + moves, torch.where(moves, g, state.prev_flat_grad), torch.where(moves, step, state.prev_step), dirs, steps
        )
        return {name: p if name in grads else params[name] for name, p in new.items()}, state

    return scheduled(Optimizer(init, update, {"lr": checked("lr", lr)}, max_iter, remembers_step=True, init_is_constant=True))


def _direction(g: Tensor, dirs: Tensor, steps: Tensor) -> Tensor:
    """The approximate inverse Hessian times -g: the two loops of the docstring.

    With R_ij = s_i.y_j and U its upper triangle, the first loop solves U a = S q and the second U^T c = diag(U) a - Y d, where c_i is the
    factor of s_i. Rows without a pair are zero; a one on the diagonal keeps them so.
    """
    curvature = torch.sum(steps * dirs, -1)
    known = curvature > 0
    row = torch.arange(len(known), device=g.device)
    upper = torch.where((row.unsqueeze(1) == row) & ~known, 1.0, torch.triu(steps @ dirs.T))
    a = _solve_triangular(upper, steps @ -g, upper=True)
    # The newest pair is the last, if there is any.
    scale = torch.where(known[-1], curvature[-1] / torch.where(known[-1], torch.dot(dirs[-1], dirs[-1]), 1.0), 1.0)
    d = (-g - a @ dirs) * scale
    c = _solve_triangular(upper.T, curvature * a - dirs @ d, upper=False)
    return d + c @ steps


def _solve_triangular(matrix: Tensor, vector: Tensor, upper: bool) -> Tensor:
    column = cast("Tensor", torch.linalg.solve_triangular(matrix, vector.unsqueeze(1), upper=upper))  # pyright: ignore[reportUnknownMemberType]
    return column.squeeze(1)


def _flat(tensors: Params, params: Params) -> Tensor:
    """One vector in the order of `params`, with zeros for those not in `tensors`; in float32 or wider, as triangular systems need it."""
    flat = torch.cat([tensors.get(name, torch.zeros_like(p)).reshape(-1) for name, p in params.items()])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _split(flat: Tensor, params: Params) -> list[Tensor]:
    parts = torch.split(flat, [p.numel() for p in params.values()])
    return [part.reshape(p.shape) for part, p in zip(parts, params.values(), strict=True)]


def _rate(hyper: Mapping[str, Value], params: Params, flat: Tensor) -> Any:
    """The rate of every element, or one for all."""
    if not isinstance(hyper.get("lr"), Mapping):
        name, p = next(iter(params.items()))
        return fit(read(hyper, "lr", name, p), flat)
    rates: list[Tensor] = []
    for name, p in params.items():
        rate: Number = read(hyper, "lr", name, p)
        rates.append((torch.ones_like(p) * fit(rate, p)).reshape(-1))
    return torch.cat(rates)
