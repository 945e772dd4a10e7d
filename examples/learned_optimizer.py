"""Trains a learned optimiser: an LSTM that receives gradients and returns steps (Andrychowicz et al. 2016, arXiv 1606.04474).

    python examples/learned_optimizer.py [--iterations 800] [--backend eager] [--adjoint replay] [--seed 0] [--tasks 60]

`adaptrt.optim.learned(rule)` makes an optimiser of the module, and one unroll of `WINDOW` steps trains it. An episode is a new sine task
and a network with new weights, which is optimised for `HORIZON` steps, one window after another. Each window starts from
`adapted.detach()`. Its loss is the mean of the support losses within it, and `backward()` fills `rule.parameters().grad`. This is
truncated backpropagation through the optimisation. Before the training, the meta-gradient is compared with that of a plain eager loop in
float64.

In the end the rule is measured on tasks and weights that it has never seen, up to `HORIZON` steps and beyond, against SGD, SGD with
momentum and Adam. Each of these is given the best learning rate of a grid, chosen on training tasks for each number of steps anew. The
rule has no such choice, and is the same in all columns. All of them minimise the mean squared error on a task's ten support points. That
is the loss that is reported; other points of the curve are not measured.

The meta-gradient is exact by default. The paper drops the derivative of the gradients that the rule receives, as `--adjoint first_order`
does.

What came out of eleven runs with the defaults, seeds 0 to 2 with the eager backend and 0 to 7 with inductor: the mean loss of the rule is
0.28 to 0.97 of that of Adam after 20 steps, and 0.07 to 0.46 after 60. The difference exceeds its 95% confidence interval in all runs but
one, seed 5, where it does not. After 200 steps, beyond the horizon, the results vary more: 0.09 to 8.4 of Adam's loss, clearly smaller in
six runs and clearly larger in one. The same seed on another backend trains another rule, as rounding is amplified on the way. One run
with `--adjoint first_order`, seed 0, gave 0.30 after 20 steps and 0.06 after 60, so these numbers do not favour the exact meta-gradient.

Known limits: the LSTM is small, and is trained for half a minute on one kind of task. Nothing bounds what it does beyond its horizon: by
1000 steps it has stopped improving, with a median loss 20 to 400 times that of Adam. It need not work at all on other networks or losses.
The default backend is eager, which needs no compiler. The command took about 100 s on two busy cores with it, 84 s with inductor, and
54 s with programs that an earlier run had cached.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt.optim import Optimizer, adam, learned, sgd

WINDOW = 10  # k, the steps of one unroll
HORIZON = 60  # steps of a training episode
SUPPORT = 10  # points of a task
HIDDEN = 16  # of the LSTM
STEP_SIZE = 0.03  # scale of the LSTM's output
OUTER_LR = 1e-2
OUTER_CLIP = 0.1
"""The norm to which larger meta-gradients are clipped, which most are. In a few windows an optimisation diverges, and their gradients are a
thousand times as large as the others. They must not count more."""

REPORTED_STEPS = (20, HORIZON, 100, 200)
TUNING_TASKS = 20
HELD_OUT_TASKS = 60

TOLERANCE = 1e-10
"""Largest relative error of the meta-gradient in float64."""
CHECKED_SEED = 4
"""The seed of the check, which always uses the same, well-conditioned problem. The logarithm in the rule's input amplifies the rounding of
a small gradient by up to exp(10) at each step: in ten seeds, weights changed by 2e-16 changed the eager loop's own meta-gradient by 3e-16
to 7e-11."""

ADJOINTS: dict[str, Callable[[], adaptrt.Adjoint]] = {"replay": adaptrt.Replay, "first_order": adaptrt.FirstOrder}

State = tuple[Tensor, Tensor]


class CoordinatewiseLSTM(nn.Module):
    """One small LSTM for every coordinate of every parameter. Coordinates share its weights, and each has a state of its own.

    As in the paper's appendix, the LSTM receives a gradient g by magnitude and sign, because gradients of all sizes matter:
    (log|g| / p, sign g) if |g| >= exp(-p), else (-1, exp(p) g), with p = 10.
    """

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2, hidden)
        self.out = nn.Linear(hidden, 1)
        # An untrained rule makes no steps. A random one would move steadily on most coordinates, and training would first have to stop it.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def initial_state(self, param: Tensor) -> State:
        """Returns zeros for every coordinate, twice [N, hidden]. N = coordinates."""
        zeros = param.new_zeros(param.numel(), self.cell.hidden_size)
        return zeros, zeros.clone()

    def forward(self, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the step, which has the gradient's shape, and the new state."""
        state = self.cell(_preprocess(grad.reshape(-1)), state)
        return STEP_SIZE * self.out(state[0]).reshape(grad.shape), state


def _preprocess(grad: Tensor, p: float = 10.0) -> Tensor:
    size, smallest = grad.abs(), math.exp(-p)
    # Clamped, because the branch that is not taken is differentiated too, and log'(0) * 0 is NaN.
    magnitude = torch.where(size >= smallest, size.clamp(min=smallest).log() / p, -1.0)
    return torch.stack([magnitude, torch.where(size >= smallest, grad.sign(), grad / smallest)], dim=-1)  # [N, 2]


class Points(NamedTuple):
    """Points on a task's curve. S = support points."""

    x: Tensor  # [S, 1]
    y: Tensor  # [S, 1]


class Episode(NamedTuple):
    """A task, and the weights to start from, by name."""

    weights: dict[str, Tensor]
    task: Points


def build_model() -> nn.Sequential:
    """Builds two hidden layers of 40, 1,761 parameters. They need no grad: each episode has weights of its own, and none is learned."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return model.requires_grad_(False)


def build_rule(seed: int) -> CoordinatewiseLSTM:
    """Builds an untrained rule. Leaves the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoordinatewiseLSTM()


def build_unroll(model: nn.Module, opt: Optimizer, backend: str, adjoint: str = "replay") -> adaptrt.CompiledUnroll:
    """Compiles a window of `WINDOW` steps on the mean squared error of the support points."""
    return adaptrt.compile_unroll(model, opt, k=WINDOW, loss=F.mse_loss, params="*", adjoint=ADJOINTS[adjoint](), backend=backend)


def draw_episode(model: nn.Module, generator: torch.Generator) -> Episode:
    """Weights as PyTorch initialises linear layers, and a curve y = A sin(x - b) with A in [0.1, 5], b in [0, pi], x in [-5, 5]."""
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            for part, param in layer.named_parameters():
                weights[f"{name}.{part}"] = torch.empty_like(param).uniform_(-bound, bound, generator=generator)
    like = next(model.parameters())
    amplitude, phase = 0.1 + 4.9 * torch.rand((), generator=generator), math.pi * torch.rand((), generator=generator)
    x = 10 * torch.rand(SUPPORT, 1, generator=generator) - 5
    return Episode(weights, Points(x.to(like.dtype), (amplitude * torch.sin(x - phase)).to(like.dtype)))


# --- the meta-gradient, and the same by hand


def eager_window(
    model: nn.Module, rule: CoordinatewiseLSTM, params: Mapping[str, Tensor], state: Mapping[str, State], task: Points, exact: bool
) -> tuple[dict[str, Tensor], dict[str, State], Tensor]:
    """What `unroll.adapt(task, start=...)` computes, in plain PyTorch: parameters, the rule's state, the loss before each step."""
    params, state, losses = {name: value.requires_grad_() for name, value in params.items()}, dict(state), []
    for _ in range(WINDOW):
        loss = F.mse_loss(torch.func.functional_call(model, params, (task.x,)), task.y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for name, grad in zip(list(params), grads, strict=True):
            step, state[name] = rule(grad if exact else grad.detach(), state[name])
            params[name] = params[name] + step
        losses.append(loss)
    return params, state, torch.stack(losses)


def meta_gradient_error(backend: str, adjoint: str, seed: int = CHECKED_SEED) -> float:
    """How far the compiled meta-gradient of the rule is from that of the eager loop, in float64: largest relative error of a parameter.

    Two windows, the second of which starts in the middle of an optimisation, from the first one detached.
    """
    model, rule, generator = build_model().double(), build_rule(seed).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():  # the LSTM itself has no gradient while what reads it is zero
        rule.out.weight.normal_(generator=generator)
    episode = draw_episode(model, generator)
    model.load_state_dict(episode.weights)
    unroll = build_unroll(model, learned(rule), backend, adjoint)

    def gradients(losses: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(losses.mean(), list(rule.parameters())))

    errors: list[float] = []
    adapted: adaptrt.Adapted | None = None
    params = {name: value.clone() for name, value in episode.weights.items()}
    state = {name: rule.initial_state(value) for name, value in params.items()}
    for _ in range(2):
        adapted = unroll.adapt(episode.task, start=None if adapted is None else adapted.detach())
        params, state, losses = eager_window(model, rule, params, state, episode.task, exact=adjoint == "replay")
        for found, expected in zip(gradients(adapted.losses), gradients(losses), strict=True):
            errors.append(((found - expected).norm() / expected.norm()).item())
        params = {name: value.detach() for name, value in params.items()}
        state = {name: (hidden.detach(), cell.detach()) for name, (hidden, cell) in state.items()}
    return torch.tensor(errors, dtype=torch.float64).max().item()  # NaN if one is


def check(error: float) -> None:
    """Raises unless the compiled meta-gradient is that of the eager loop.

    Raises:
      RuntimeError: `error` is more than `TOLERANCE`, or NaN.
    """
    if not error <= TOLERANCE:
        raise RuntimeError(f"the meta-gradient of the rule differs from the eager loop's by {error:.1e}, more than {TOLERANCE:.0e}")


# --- training


class Training(NamedTuple):
    """How training went.

    Attributes:
      final_losses: the loss before the last step of every episode that was completed.
      seconds: time of every iteration.
      num_skipped: iterations whose meta-gradient was not finite, and was not used.
    """

    final_losses: list[float]
    seconds: list[float]
    num_skipped: int


def train(model: nn.Module, rule: nn.Module, unroll: adaptrt.CompiledUnroll, iterations: int, seed: int) -> Training:
    """Meta-trains the rule that `unroll` was made of: Adam on the mean loss of one window an iteration."""
    outer = torch.optim.Adam(rule.parameters())
    generator = torch.Generator().manual_seed(seed)
    num_windows = HORIZON // WINDOW
    final_losses: list[float] = []
    seconds: list[float] = []
    num_skipped = 0
    episode = draw_episode(model, generator)
    start: adaptrt.Adapted | None = None
    for iteration in range(iterations):
        started = time.perf_counter()
        if start is None:
            model.load_state_dict(episode.weights)  # an unroll reads the parameters at every call, so nothing is compiled again
        adapted = unroll.adapt(episode.task, start=start)
        outer.zero_grad()
        adapted.losses.mean().backward()
        norm = nn.utils.clip_grad_norm_(rule.parameters(), OUTER_CLIP)
        if norm.isfinite():
            outer.param_groups[0]["lr"] = OUTER_LR * (1 + math.cos(math.pi * iteration / iterations)) / 2
            outer.step()
        else:
            num_skipped += 1
        start = adapted.detach()
        if (iteration + 1) % num_windows == 0:
            final_losses.append(adapted.losses[-1].item())
            episode, start = draw_episode(model, generator), None
        seconds.append(time.perf_counter() - started)
    return Training(final_losses, seconds, num_skipped)


# --- measuring


class Rival(NamedTuple):
    """A hand-designed optimiser, and the learning rates that it may choose from."""

    label: str
    make: Callable[[Tensor], Optimizer]
    rates: tuple[float, ...]


RIVALS = (
    Rival("SGD", lambda lr: sgd(lr=lr), (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)),
    Rival("SGD, momentum 0.9", lambda lr: sgd(lr=lr, momentum=0.9), (0.001, 0.002, 0.003, 0.005, 0.01, 0.02)),
    Rival("Adam", lambda lr: adam(lr=lr), (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)),
)


class Measured(NamedTuple):
    """The loss of every held-out task after each of `REPORTED_STEPS`; and the learning rate used for that column, if there was a choice."""

    label: str
    losses: Tensor  # [E, R]
    rates: tuple[float, ...] = ()


def draw_episodes(model: nn.Module, seed: int, count: int) -> list[Episode]:
    """The first episodes of a stream; `seed` is that of `train` for those that training sees first."""
    generator = torch.Generator().manual_seed(seed)
    return [draw_episode(model, generator) for _ in range(count)]


def losses_after(model: nn.Module, unroll: adaptrt.CompiledUnroll, episodes: Sequence[Episode], steps: Sequence[int]) -> Tensor:
    """The support loss after each number of steps, in every episode; infinite where an optimisation left the finite numbers.

    Returns:
      [E, R]. E = episodes, R = reported numbers of steps.
    """
    rows: list[Tensor] = []
    for episode in episodes:
        model.load_state_dict(episode.weights)
        adapted: adaptrt.Adapted | None = None
        losses: list[Tensor] = []
        with torch.no_grad():
            for _ in range(max(steps) // WINDOW + 1):  # losses[N] is the loss before step N, counted from 0: that after N steps
                adapted = unroll.adapt(episode.task, start=adapted)
                losses.append(adapted.losses)
        rows.append(torch.cat(losses)[list(steps)])
    return torch.stack(rows).nan_to_num(nan=math.inf)


def measure_rival(model: nn.Module, rival: Rival, backend: str, tuning: Sequence[Episode], held_out: Sequence[Episode]) -> Measured:
    """Each column of the rival with the learning rate that has the smallest mean loss there on `tuning`, run on `held_out`."""
    rate = torch.tensor(0.0, dtype=torch.float64)
    unroll = build_unroll(model, rival.make(rate), backend)

    def run(value: float, episodes: Sequence[Episode], steps: Sequence[int]) -> Tensor:
        rate.fill_(value)  # an input of the program, like any hyperparameter
        return losses_after(model, unroll, episodes, steps)

    tuned = torch.stack([run(value, tuning, REPORTED_STEPS).mean(0) for value in rival.rates])  # [rates, R]
    chosen = [rival.rates[int(index)] for index in tuned.argmin(0)]
    losses = tuned.new_empty(len(held_out), len(chosen))
    for value in set(chosen):
        columns = [column for column, best in enumerate(chosen) if best == value]
        losses[:, columns] = run(value, held_out, [REPORTED_STEPS[column] for column in columns])
    return Measured(rival.label, losses, tuple(chosen))


def report(found: Sequence[Measured]) -> list[str]:
    """The table, and every rival's loss minus that of the learned rule, task by task. The learned rule comes first in `found`."""
    ours, *rivals = found

    def row(label: str, losses: Tensor, notes: Sequence[str]) -> str:
        half_width = 1.96 * losses.std(0) / math.sqrt(len(losses))
        cells = [f"{mean:.3f} ± {half:.3f}" for mean, half in zip(losses.mean(0).tolist(), half_width.tolist(), strict=True)]
        return f"{label:<18}" + "".join(f"{f'{cell} {note}':>27}" for cell, note in zip(cells, notes, strict=True))

    blank = [""] * len(REPORTED_STEPS)
    lines = ["steps" + " " * 13 + "".join(f"{steps:>26d} " for steps in REPORTED_STEPS)]
    lines += [row(each.label, each.losses, [f"(lr {rate:g})" for rate in each.rates] or blank) for each in found]
    lines.append("the same tasks, loss minus that of the learned rule; above zero, the learned rule is better")
    lines += [row(each.label, each.losses - ours.losses, blank) for each in rivals]
    return lines


def report_training(training: Training) -> list[str]:
    """Describes the learning curve in words."""
    losses = training.final_losses
    lines = [f"episodes   loss before step {HORIZON}   (median since the line before)"]
    marks = sorted({max(1, len(losses) * part // 8) for part in range(1, 9)}) if losses else []
    for begin, end in zip([0, *marks], marks, strict=False):
        lines.append(f"{end:8d}   {statistics.median(losses[begin:end]):.4f}")
    lines.append(
        f"{len(training.seconds)} iterations in {sum(training.seconds):.0f} s, median {1e3 * statistics.median(training.seconds):.0f} ms, "
        f"the first {training.seconds[0]:.1f} s; {training.num_skipped} skipped because the meta-gradient was not finite"
    )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example and prints what it found."""
    parser = argparse.ArgumentParser(description="A learned optimiser, trained by truncated unrolls, against tuned ones.")
    parser.add_argument("--iterations", type=int, default=800, help=f"windows of {WINDOW} steps to train on, at least 1")
    parser.add_argument("--backend", choices=("auto", "inductor", "eager"), default="eager", help="what runs adaptrt's programs")
    parser.add_argument("--adjoint", choices=tuple(ADJOINTS), default="replay", help="exact meta-gradient, or the paper's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tasks")
    parser.add_argument("--tasks", type=int, default=HELD_OUT_TASKS, help="held-out tasks to measure on, at least 2")
    options: Any = parser.parse_args(arguments)
    for name, least in (("iterations", 1), ("tasks", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    torch.set_num_threads(1)  # for kernels this small, sharing work between threads costs more than it gains
    print(f"torch {torch.__version__}, 1 thread, float32, backend {options.backend}, adjoint {options.adjoint}")
    error = meta_gradient_error(options.backend, options.adjoint)
    print(f"meta-gradient of the rule, compiled against a plain eager loop, float64: largest relative error {error:.1e}")
    check(error)

    model, rule = build_model(), build_rule(options.seed)
    unroll = build_unroll(model, learned(rule), options.backend, options.adjoint)
    print("\n".join(report_training(train(model, rule, unroll, options.iterations, options.seed))))

    tuning = draw_episodes(model, options.seed, TUNING_TASKS)
    held_out = draw_episodes(model, options.seed + 1, options.tasks)
    found = [Measured("learned rule", losses_after(model, unroll, held_out, REPORTED_STEPS))]
    found += [measure_rival(model, rival, options.backend, tuning, held_out) for rival in RIVALS]
    print(
        f"loss on {options.tasks} held-out tasks, each from its own weights, with the half-width of its 95% confidence interval\n"
        f"the rule was trained for {HORIZON} steps; learning rates are the best of a grid on {TUNING_TASKS} training tasks, for each column"
    )
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
