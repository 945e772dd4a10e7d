"""Deep energy networks, whose prediction is the minimiser of a learned energy (Belanger & McCallum 2016, arXiv 1511.06350).

    python examples/deep_energy.py [--iterations 400] [--backend inductor] [--seed 0]

A row is five handwritten digits that count up or down by one, from any digit, with 0 after 9. The images are so noisy that only about
half of them are classified correctly one by one. The energy of the labels of a row has a local term, which each image contributes for its
own label, and a network on all labels together, which can learn which rows exist:

    E(z; x) = ½ ‖z - local(x)‖² + labels(softmax(z))

The inner loop moves the *prediction* z, the logits of a row's labels. It starts at zero and takes `INNER_STEPS` steps down the energy, at
a rate that is learned too. The outer loss is the cross-entropy of where z ends; its gradient reaches both networks through the steps, as
in Belanger, Yang & McCallum 2017 (arXiv 1703.05667). Without `labels`, z would go to local(x), which reads the images one by one.

The energy is trained twice, from the same weights on the same rows: `higher_inference` is written with `higher`, `compiled_inference` is
the same inference in compiled programs, and everything else is shared. The first gradients agree to rounding. Training amplifies
rounding, and here it does so strongly: the loss curves start equal and drift apart. A third run, with `higher` in float64, shows that
float32 itself drifts as far.

What the command printed with its defaults, on a CPU with 2 cores, the other one busy, torch 2.13: the first gradients differ by 1e-7 in
float32 and not at all in float64, where the eager backend runs the operations of `higher` in the same order. Losses agree to 1e-7 for 20
iterations; at the end they differ by up to a half on single batches, as float32 does from float64, and the means of the last 80 by 0.6%.
Of 2,048 rows with unseen images, 79.4% ± 1.8 are wholly right with `higher`, 78.6% ± 1.8 compiled, 79.2% ± 1.8 in float64; 81.9% ± 1.7
after twice the inner steps. Images read one by one give 4.4% ± 0.9, and knowing the rule and trying all rows on top of that 90.9% ± 1.2.
A feed-forward network on the whole row gives 82.0% ± 1.7, so these numbers do not favour an energy. Three runs took 24 to 32 ms an
iteration with `higher` and 18 to 25 ms compiled, 1.26 to 1.34 times as fast, after 26 to 32 s of compiling; 66 to 85 s in all.

Known limits: a row of the prediction belongs to a row of the batch, so batches have `ROWS` rows. `unroll.vmap()` with a prediction for
one row takes batches of any size, compiling for each, but took 1.6 times as long here: every row then has a gradient of its own for the
energy.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import higher
from adaptrt.demo.digits import Digits, ImageClass, load

LENGTH = 5  # digits of a row
CLASSES = 10
NOISE = 2.1  # standard deviation; that of the pixels is 1
ROWS = 128  # of a batch
INNER_STEPS = 10
HIDDEN = 128
OUTER_LR = 6e-3
RATE_LR = 1e-2  # of the inner rate itself
CLIP = 1.0
TEST_IMAGES = 50  # of each digit, in no training row
TEST_ROWS = 2048
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest relative error of a parameter's first gradient, compiled against `higher`; seeds 0 to 4 gave up to 2e-7 and 0."""

Predict = Callable[..., Tensor]  # images [R, L, 64] -> logits [R, L, 10]; R = rows, L = LENGTH
Infer = Callable[[Tensor, int], Tensor]  # local logits, rounds of `INNER_STEPS` steps -> logits; both [ROWS, L, 10]


def valid_rows() -> Tensor:
    """Returns all rows that exist, [20, L]. The networks are not given them."""
    return torch.stack([(first + way * torch.arange(LENGTH)) % CLASSES for way in (1, -1) for first in range(CLASSES)])


class Rows:
    """Draws rows from the images for training, or from those kept for testing."""

    def __init__(self, digits: Digits, test: bool = False) -> None:
        part = slice(-TEST_IMAGES, None) if test else slice(None, -TEST_IMAGES)
        self._images = [digits.images(ImageClass(digit, 0)).flatten(1)[part] for digit in range(CLASSES)]

    def draw(self, num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images [R, L, 64], each with noise of its own, and labels [R, L]."""
        valid = valid_rows()
        labels = valid[torch.randint(len(valid), (num_rows,), generator=generator)]
        images = NOISE * torch.randn(*labels.shape, 64, generator=generator)
        for digit, known in enumerate(self._images):
            here = labels == digit
            images[here] += known[torch.randint(len(known), (int(here.sum()),), generator=generator)]
        return images, labels


# --- the networks


def mlp(*widths: int) -> nn.Sequential:
    """Builds linear layers with softplus between them, because an energy is differentiated twice."""
    layers = [part for sizes in itertools.pairwise(widths) for part in (nn.Linear(*sizes), nn.Softplus())]
    return nn.Sequential(*layers[:-1])


class Prediction(nn.Module):
    """What the inner loop moves: the logits of every label. `forward` passes them to the energy, together with the local logits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(ROWS, LENGTH, CLASSES, dtype=dtype))

    def forward(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, local), both [ROWS, L, 10]."""
        return self.logits, local


class Energy(nn.Module):
    """E(z; x), summed over rows, since the energy of a row does not depend on the others."""

    def __init__(self) -> None:
        super().__init__()
        first, *rest = mlp(LENGTH * CLASSES, HIDDEN, HIDDEN, 1)
        with torch.no_grad():  # probabilities are small inputs, so with the usual weights the energy starts flat and stays flat for long
            first.get_parameter("weight").mul_(3.0)
        self.labels = nn.Sequential(first, *rest)

    def forward(self, output: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the energy, a scalar, for the output of `Prediction`."""
        logits, local = output
        return 0.5 * (logits - local).square().sum() + self.labels(logits.softmax(-1).flatten(1)).sum()


class Networks(nn.Module):
    """Everything that is learned."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.local = mlp(64, HIDDEN, CLASSES)
            self.energy = Energy()
        self.rate = nn.Parameter(torch.tensor(0.5))


def whole_row_network(seed: int) -> nn.Module:
    """Builds what one would train without an energy: a network from the images of a row to logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = mlp(64 * LENGTH, 2 * HIDDEN, 2 * HIDDEN, CLASSES * LENGTH)
    return nn.Sequential(nn.Flatten(), layers, nn.Unflatten(1, (LENGTH, CLASSES)))


# --- the two ways to descend the energy


def higher_inference(networks: Networks) -> Infer:
    """Predicts by a loop written with `higher`, with every step on autograd's tape."""
    model = Prediction(networks.rate.dtype)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)

    def infer(local: Tensor, rounds: int) -> Tensor:
        with higher.innerloop_ctx(model, opt, override={"lr": [networks.rate]}) as (prediction, diffopt):
            for _ in range(rounds * INNER_STEPS):
                diffopt.step(networks.energy(prediction(local)))
            return prediction.logits

    return infer


def compiled_inference(networks: Networks, backend: str) -> Infer:
    """Predicts by programs. `local`, the energy's parameters and the rate get gradients from whatever is computed from the result."""
    model, opt = Prediction(networks.rate.dtype), adaptrt.optim.sgd(lr=networks.rate)
    # Replay compiles one step. "auto" would take one graph of ten steps, which compiles for a minute and saves a tenth of a call's time.
    unroll = adaptrt.compile_unroll(model, opt, INNER_STEPS, loss=networks.energy, adjoint=adaptrt.Replay(), backend=backend)

    def infer(local: Tensor, rounds: int) -> Tensor:
        adapted = unroll.adapt((local,))
        for _ in range(rounds - 1):
            adapted = unroll.adapt((local,), start=adapted)
        return adapted.params["logits"]

    return infer


# --- training and comparing


class Run:
    """Trains a network from images to logits by Adam, whose learning rate falls to zero along a cosine."""

    def __init__(self, networks: nn.Module, predict: Predict, iterations: int, lr: float = OUTER_LR) -> None:
        self.networks = networks
        self.predict = predict
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.first_gradient: list[Tensor] = []
        groups = [{"params": [param], **({"lr": RATE_LR} if name == "rate" else {})} for name, param in networks.named_parameters()]
        self._outer = torch.optim.Adam(groups, lr=lr)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._outer, iterations)

    def iterate(self, images: Tensor, labels: Tensor) -> None:
        """One step of the outer loop."""
        images = images.to(next(self.networks.parameters()).dtype)
        started = time.perf_counter()
        self._outer.zero_grad()
        loss = F.cross_entropy(self.predict(images).flatten(0, 1), labels.flatten())
        loss.backward()
        if not self.losses:
            # Adding a constant to the energy changes nothing, so `higher` finds no gradient for its last bias, and the programs find zero.
            self.first_gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.networks.parameters()]
        nn.utils.clip_grad_norm_(self.networks.parameters(), CLIP)
        self._outer.step()
        self._schedule.step()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())

    def time_s(self) -> float:
        """The median seconds of an iteration, without the first, which compiles."""
        return statistics.median(self.seconds[1:] or self.seconds)


def energy_run(seed: int, iterations: int, dtype: torch.dtype, backend: str | None) -> Run:
    """Makes a training of all networks, through inference with `higher` or compiled for a backend."""
    networks = Networks(seed).to(dtype)
    infer = higher_inference(networks) if backend is None else compiled_inference(networks, backend)
    return Run(networks, lambda images, rounds=1: infer(networks.local(images), rounds), iterations)


def train(runs: Sequence[Run], source: Rows, iterations: int, seed: int) -> None:
    """Trains all by turns, one iteration of each, on equal rows."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        images, labels = source.draw(ROWS, generator)
        for run in runs:
            run.iterate(images, labels)


def checked_error(found: Run, expected: Run) -> float:
    """Returns the largest relative difference of a parameter's first gradients.

    Raises:
      RuntimeError: it exceeds the entry of `TOLERANCES` for the dtype.
    """
    pairs = list(zip(found.first_gradient, expected.first_gradient, strict=True))
    error = max(((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).nan_to_num(math.inf).item() for ours, theirs in pairs)
    limit = TOLERANCES[pairs[0][0].dtype]
    if not error <= limit:
        raise RuntimeError(f"a gradient of the compiled run differs from that of higher by {error:.1e}, more than {limit:.0e}")
    return error


def report(ours: Run, theirs: Run, exact: Run) -> list[str]:
    """Describes loss curves and times in words."""
    total = len(ours.losses)
    marks = sorted({min(20, total), *(max(1, total * part // 5) for part in range(1, 6))})
    lines = ["mean loss since the line before, and the largest relative difference of the loss up to there",
             "iteration   higher     compiled   higher, float64   compiled from higher   float32 from float64"]  # fmt: skip
    for begin, end in zip([0, *marks], marks, strict=False):
        curves = "   ".join(f"{statistics.fmean(run.losses[begin:end]):.6f}" for run in (theirs, ours, exact))
        drifts = [max(abs(a / b - 1) for a, b in zip(x.losses[:end], y.losses, strict=False)) for x, y in ((ours, theirs), (theirs, exact))]
        lines.append(f"{end:9d}   {curves}          {drifts[0]:.0e}                  {drifts[1]:.0e}")
    lines.append(
        f"median time of an iteration: higher {1e3 * theirs.time_s():.1f} ms, compiled {1e3 * ours.time_s():.1f} ms, "
        f"ratio {theirs.time_s() / ours.time_s():.2f}; the first compiled one took {ours.seconds[0]:.0f} s"
    )
    return lines


def accuracy(predict: Predict, images: Tensor, labels: Tensor) -> str:
    """The share of labels and of whole rows that are right, with the half-width of the 95% confidence interval over rows."""
    logits = torch.cat([predict(part).detach() for part in images.split(ROWS)])
    right = (logits.argmax(-1) == labels).double()
    by_row = (right.mean(1), right.prod(1))
    return "".join(f"{100 * each.mean():13.1f}% ± {196 * each.std() / math.sqrt(len(each)):.1f}" for each in by_row)


def best_valid_row(logits: Tensor) -> Tensor:
    """Returns the likeliest of all rows that exist, as logits [R, L, 10]: the result of knowing the rule and trying all rows."""
    choices = F.one_hot(valid_rows(), CLASSES).to(logits.dtype)  # [20, L, 10]
    return choices[torch.einsum("rlc,vlc->rv", logits, choices).argmax(1)]


class Comparison(NamedTuple):
    """The energy trained three times, and once more for the first iteration only."""

    compiled: Run
    higher: Run
    exact: Run  # with `higher` in float64
    exact_compiled: Run  # in float64 on the eager backend: the same graphs, and nothing to compile


def follow(source: Rows, iterations: int, backend: str, seed: int) -> Comparison:
    """Trains by turns, from equal weights on equal rows."""
    ways = ((torch.float32, backend), (torch.float32, None), (torch.float64, None), (torch.float64, "eager"))
    runs = Comparison(*[energy_run(seed, iterations, dtype, way) for dtype, way in ways])
    train(runs[:3], source, iterations, seed)
    train(runs[3:], source, 1, seed)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example and prints what it found."""
    parser = argparse.ArgumentParser(description="A deep energy network on rows of digits: the loop of higher against compiled programs.")
    parser.add_argument("--iterations", type=int, default=400, help="of the outer loop, at least 1")
    parser.add_argument("--backend", choices=("auto", "inductor", "eager"), default="auto", help="what runs the compiled programs")
    parser.add_argument("--seed", type=int, default=0, help="of weights and rows")
    options: Any = parser.parse_args(arguments)
    if options.iterations < 1:
        parser.error(f"--iterations must be at least 1, got {options.iterations}")
    torch.set_num_threads(1)  # for networks this small, sharing work between threads costs more than it gains
    print(f"torch {torch.__version__}, 1 thread, float32, backend {options.backend}")
    digits, iterations, seed = load(), options.iterations, options.seed
    source, unseen = Rows(digits), Rows(digits, test=True)
    runs = follow(source, iterations, options.backend, seed)
    errors = checked_error(runs.compiled, runs.higher), checked_error(runs.exact_compiled, runs.exact)
    print(f"first gradient, compiled from higher: relative error {errors[0]:.0e}; in float64, on the eager backend, {errors[1]:.0e}")
    print("\n".join(report(runs.compiled, runs.higher, runs.exact)))

    one_by_one, whole = Networks(seed).local, whole_row_network(seed)
    train([Run(model, model, iterations, lr=OUTER_LR / 2) for model in (one_by_one, whole)], source, iterations, seed)
    found: dict[str, Predict] = {
        "images one by one": one_by_one,
        "a feed-forward network on the row": whole,
        "energy, trained with higher": runs.higher.predict,
        "energy, trained compiled": runs.compiled.predict,
        f"  the same, {2 * INNER_STEPS} inner steps": lambda images: runs.compiled.predict(images, rounds=2),
        "energy, with higher in float64": lambda images: runs.exact.predict(images.double()),
        "one by one, then the best valid row": lambda images: best_valid_row(one_by_one(images)),
    }
    images, labels = unseen.draw(TEST_ROWS, torch.Generator().manual_seed(seed + 1))
    print(f"{f'right, of {TEST_ROWS} unseen rows':36}           labels        whole rows   (and 95% confidence intervals)")
    for label, predict in found.items():
        print(f"{label:<36}{accuracy(predict, images, labels)}")


if __name__ == "__main__":
    main()
