"""The blocks of docs/recipes.md against plain PyTorch in float64: every meta-loss with its gradients, every adapted state."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gradients import gradients
from tests.test_readme import DOCS, python_blocks
from tests.tolerances import assert_near

PAGE = DOCS / "recipes.md"
TEXT = PAGE.read_text()
MAX_LINES = 20

EATA = "EATA: steps that are skipped"
SAR = "SAR: sharpness-aware steps"
NEEDED = {SAR: {EATA}}
"""Headings whose blocks another heading's block needs, besides MAML and Tent."""

Names = dict[str, Any]
Params = dict[str, Any]


def run(heading: str, edit: Callable[[str], str] = lambda source: source) -> Names:
    """The names after the blocks that set up, MAML's, Tent's, and those under a heading, as `edit` changes them."""
    lines = TEXT.splitlines()
    namespace: Names = {"__name__": "recipes"}
    was_found = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for line, source in python_blocks(TEXT):
            above = next(text for text in reversed(lines[: line + 1]) if text.startswith("#"))
            title = above.removeprefix("### ")
            if was_found and title != heading:
                break
            was_found |= title == heading
            if title == above or title in {heading, "MAML", "Tent"} | NEEDED.get(heading, set()):
                exec(compile("\n" * line + (edit(source) if title == heading else source), str(PAGE), "exec"), namespace)
    assert was_found, f"no heading {heading}"
    return namespace


def call(module: nn.Module, params: Mapping[str, Tensor], *args: Any) -> Any:
    return torch.func.functional_call(module, dict(params), args)


def one_step(params: Params, value: Tensor, change: Callable[[str, Tensor], Tensor], adapts: str | tuple[str, ...] = "") -> Params:
    """The parameters less what `change` makes of the name and the gradient of those whose names begin with `adapts`."""
    names = [name for name in params if name.startswith(adapts)]
    grads = torch.autograd.grad(value, [params[name] for name in names], create_graph=True)
    return {**params, **{name: params[name] - change(name, grad) for name, grad in zip(names, grads, strict=True)}}


def steps(
    model: nn.Module,
    params: Params,
    loss: Callable[[Any], Tensor],
    rate: Callable[[int, str], Any],
    k: int,
    adapts: str | tuple[str, ...] = "",
    constant: int = 0,
    decay: Any = 0.0,
) -> list[Params]:
    """The parameters after each of k steps of SGD. `loss` takes what calls the model. The first `constant` steps are not differentiated."""
    found: list[Params] = []
    for step in range(k):
        value = loss(lambda *args, params=params: call(model, params, *args))
        params = one_step(params, value, lambda n, g, p=params, s=step: rate(s, n) * (g + decay * p[n]), adapts)
        if step < constant:
            params = detached(params)
        found.append(params)
    return found


def detached(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def tasks(names: Names, one: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor], count: int = 5) -> Tensor:
    """The mean over tasks of a function of one task's support and query."""
    (a, b), (c, d) = names["support"], names["query"]
    return torch.stack([one(a[t], b[t], c[t], d[t], t) for t in range(count)]).mean()


def maml(
    names: Names, adapts: str = "", rate: Callable[[int, str], Any] = lambda step, name: 0.1, sizes: Sequence[int] = (8,) * 5
) -> Tensor:
    model = names["model"]

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        a, b = a[: sizes[task]], b[: sizes[task]]
        after = steps(model, dict(model.named_parameters()), lambda m: F.cross_entropy(m(a), b), rate, 3, adapts)[-1]
        return F.cross_entropy(call(model, after, c), d)

    return tasks(names, one)


def maml_pp(names: Names) -> Tensor:
    model, rates, weights = names["model"], names["rates"], names["step_weights"]

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        rate = lambda step, name: rates[name][step]  # noqa: E731
        after = steps(model, dict(model.named_parameters()), lambda m: F.cross_entropy(m(a), b), rate, 3)
        return torch.stack([weight * F.cross_entropy(call(model, p, c), d) for weight, p in zip(weights, after, strict=True)]).sum()

    return tasks(names, one)


def cavia(names: Names) -> Tensor:
    model = names["with_context"]

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        params: Params = dict(model.named_parameters())
        params["context"] = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        after = steps(model, params, lambda m: F.cross_entropy(m(a), b), lambda step, name: 1.0, 2, "context")[-1]
        return F.cross_entropy(call(model, after, c), d)

    return tasks(names, one)


def proto_maml(names: Names) -> Tensor:
    model = names["model"]

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        features = torch.tanh(model[0](a))
        prototypes = torch.stack([features[b == label].mean(0) for label in range(4)])
        # The inner gradients treat body and head as independent, although the head's start was computed by the body.
        body: Params = {name: value.clone() for name, value in model.named_parameters() if name.startswith("0.")}
        params = {**body, "2.weight": 2 * prototypes, "2.bias": -(prototypes**2).sum(1)}
        after = steps(model, params, lambda m: F.cross_entropy(m(a), b), lambda step, name: 0.1, 3)[-1]
        return F.cross_entropy(call(model, after, c), d)

    return tasks(names, one)


def step_norm(names: Names) -> tuple[Tensor, Params]:
    """The meta-loss, and the mean over tasks of each step's statistics."""
    normed = names["normed"]
    start, held = dict(normed.named_parameters()), dict(normed.named_buffers())
    statistics = {name: held[name].repeat(5, 1, 1) for name in ("1.means", "1.variances")}

    def forward(params: Params, x: Tensor, step: int, rows: Sequence[Tensor]) -> Tensor:
        hidden = F.linear(x, params["0.weight"], params["0.bias"])
        hidden = F.batch_norm(hidden, rows[0], rows[1], params["1.weight"][step], params["1.bias"][step], normed.training)
        return F.linear(torch.tanh(hidden), params["3.weight"], params["3.bias"])

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        params: Params = start
        for step in range(3):
            output = forward(params, a, step, [value[task, step] for value in statistics.values()])
            params = one_step(params, F.cross_entropy(output, b), lambda name, grad: 0.1 * grad, ("0.", "3."))
        return F.cross_entropy(forward(params, c, 2, [value[task, 2].clone() for value in statistics.values()]), d)

    return tasks(names, one), {name: value.mean(0) for name, value in statistics.items()}


def meta_curvature(names: Names) -> Tensor:
    model, matrices = names["model"], names["curvature"]

    def change(name: str, grad: Tensor) -> Tensor:
        if grad.dim() == 1:
            return 0.1 * (matrices[name][0] @ grad)
        return 0.1 * (matrices[name][0] @ grad @ matrices[name][1].T)

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        params: Params = dict(model.named_parameters())
        for _ in range(3):
            params = one_step(params, F.cross_entropy(call(model, params, a), b), change)
        return F.cross_entropy(call(model, params, c), d)

    return tasks(names, one)


def warp_grad(names: Names) -> Tensor:
    model = names["warped"]
    warp: Params = {name: value for name, value in model.named_parameters() if name.startswith("1.")}

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        point, total = {**detached(dict(model.named_parameters())), **warp}, torch.zeros((), dtype=torch.float64)
        for _ in range(3):
            ahead = steps(model, point, lambda m: F.cross_entropy(m(a), b), lambda step, name: 0.1, 1, ("0.", "3."))[-1]
            total = total + F.cross_entropy(call(model, ahead, c), d)
            point = {**detached(ahead), **warp}
        return total

    return tasks(names, one)


def through_all_steps(names: Names) -> Tensor:
    model, rates, momentum, decays = names["model"], names["rates"], names["momentum"], names["decays"]

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        params: Params = dict(model.named_parameters())
        velocity: Params = {name: torch.zeros_like(value) for name, value in params.items()}
        for rate in rates:
            grads = torch.autograd.grad(F.cross_entropy(call(model, params, a), b), list(params.values()), create_graph=True)
            velocity = {n: momentum * velocity[n] + g + decays[n] * params[n] for n, g in zip(params, grads, strict=True)}
            params = {name: value - rate * velocity[name] for name, value in params.items()}
        return F.cross_entropy(call(model, params, c), d)

    return tasks(names, one)


def learned_loss(names: Names) -> Tensor:
    model, loss = names["model"], names["learned"]

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        after = steps(model, dict(model.named_parameters()), lambda m: loss(m(a), b), lambda step, name: 0.1, 3)[-1]
        return F.cross_entropy(call(model, after, c), d)

    return tasks(names, one)


def imaml(names: Names) -> Tensor:
    """All steps differentiated through: at the solution that is the same."""
    model = names["model"]
    start = dict(model.named_parameters())

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        params: Params = dict(start)
        for _ in range(50):
            loss = F.cross_entropy(call(model, params, a), b)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            pulled = [g + 2.0 * (params[name] - start[name]) for name, g in zip(params, grads, strict=True)]
            params = {name: value - 0.3 * g for (name, value), g in zip(params.items(), pulled, strict=True)}
        return F.cross_entropy(call(model, params, c), d)

    return tasks(names, one)


def truncated(names: Names) -> Tensor:
    model, lr, decay = names["model"], names["log_lr"].exp(), names["log_decay"].exp()

    def one(a: Tensor, b: Tensor, c: Tensor, d: Tensor, task: int) -> Tensor:
        start, rate = dict(model.named_parameters()), lambda step, name: lr
        after = steps(model, start, lambda m: F.cross_entropy(m(a), b), rate, 10, constant=8, decay=decay)[-1]
        return F.cross_entropy(call(model, after, c), d)

    return tasks(names, one)


def distillation(names: Names) -> Tensor:
    model, images, inits, rate = names["model"], names["images"], names["inits"], names["rate"]
    losses: list[Tensor] = []
    for index in range(names["count"]):
        params: Params = {name: value[index].clone().requires_grad_() for name, value in inits.items()}
        after = steps(model, params, lambda m: F.cross_entropy(m(images), torch.arange(4)), lambda step, name: rate, 3)[-1]
        losses.append(F.cross_entropy(call(model, after, names["query"][0][0]), names["query"][1][0]))
    return torch.stack(losses).mean()


META: dict[str, tuple[str, str, Callable[[Names], Tensor], tuple[str, ...]]] = {
    "MAML": ("MAML", "meta_loss", maml, ("model",)),
    "ANIL": ("ANIL and BOIL", "anil_loss", lambda names: maml(names, "2."), ("model",)),
    "BOIL": ("ANIL and BOIL", "boil_loss", lambda names: maml(names, "0."), ("model",)),
    "Meta-SGD": ("Meta-SGD", "meta_loss", lambda n: maml(n, rate=lambda step, name: n["rates"][name]), ("model", "rates")),
    "MAML++": ("MAML++", "meta_loss", maml_pp, ("model", "rates")),
    "step norm": ("MAML++: batch normalisation for each step", "meta_loss", lambda names: step_norm(names)[0], ("normed",)),
    "sizes": ("Tasks of different sizes", "meta_loss", lambda n: maml(n, sizes=n["sizes"].tolist()), ("model",)),
    "Meta-Curvature": ("Meta-Curvature", "meta_loss", meta_curvature, ("model", "curvature")),
    "WarpGrad": ("WarpGrad", "meta_loss", warp_grad, ("warped",)),
    "CAVIA": ("CAVIA", "meta_loss", cavia, ("with_context",)),
    "ProtoMAML": ("ProtoMAML", "meta_loss", proto_maml, ("model",)),
    "learned loss": ("A learned loss", "meta_loss", learned_loss, ("model", "learned")),
    "iMAML": ("iMAML", "meta_loss", imaml, ("model",)),
    "all steps": ("Hyperparameters through all steps", "meta_loss", through_all_steps, ("model", "rates", "momentum", "decays")),
    "truncated": ("Hyperparameters by truncated backpropagation", "meta_loss", truncated, ("log_lr", "log_decay")),
    "distillation": ("Dataset distillation", "meta_loss", distillation, ("images", "rate")),
}


def leaves_of(name: str, held: Any) -> dict[str, Tensor]:
    """The tensors of a module, a dict or a tuple that require grad, by their places."""
    if isinstance(held, Tensor):
        return {name: held} if held.requires_grad else {}
    entries = held.named_parameters() if isinstance(held, nn.Module) else held.items() if isinstance(held, dict) else enumerate(held)
    return {place: leaf for key, value in entries for place, leaf in leaves_of(f"{name}.{key}", value).items()}


@pytest.mark.parametrize("name", META)
def test_meta_learning(name: str) -> None:
    heading, result, oracle, learned = META[name]
    names = run(heading)
    leaves = {place: leaf for key in learned for place, leaf in leaves_of(key, names[key]).items()}
    found = gradients(names[result], leaves)
    assert any(bool(value.any()) for key, value in found.items() if key != "value")
    assert_near(found, gradients(oracle(names), leaves), torch.float64)


def test_reptile() -> None:
    names = run("Reptile")
    model, (x, y) = names["model"], names["support"]
    start = dict(model.named_parameters())
    rows = [steps(model, start, lambda m, t=t: F.cross_entropy(m(x[t]), y[t]), lambda step, name: 0.1, 3)[-1] for t in range(5)]
    wanted = {name: value + 0.5 * (torch.stack([row[name] for row in rows]).mean(0) - value) for name, value in start.items()}
    assert_near(names["moved"], {name: value.detach() for name, value in wanted.items()}, torch.float64)


def test_statistics_of_each_step() -> None:
    names = run("MAML++: batch normalisation for each step")
    assert_near(names["statistics"], step_norm(names)[1], torch.float64)
    names["normed"].load_state_dict(names["statistics"], strict=False)
    names["normed"].eval()
    assert_near({"loss": names["step_norm"](names["support"], names["query"])}, {"loss": step_norm(names)[0]}, torch.float64)


def test_evolution_strategies() -> None:
    names = run("ES-MAML")
    (a, b), (c, d), model, noise = names["support"], names["query"], names["model"], names["noise"]
    wanted = {name: torch.zeros_like(value[0]) for name, value in noise.items()}
    for i in range(5):
        for sign in (1, -1):
            params: Params = {name: (value + sign * 0.1 * noise[name][i]) for name, value in model.named_parameters()}
            after = steps(model, params, lambda m, i=i: F.cross_entropy(m(a[i]), b[i]), lambda step, name: 0.1, 3)[-1]
            loss = F.cross_entropy(call(model, after, c[i]), d[i]).detach()
            for name, value in wanted.items():
                value += sign * loss * noise[name][i] / (2 * 0.1 * 5)
    assert_near(names["estimate"], wanted, torch.float64)


# --- hyperparameters and weights in turn


def in_turn(
    params: Params,
    learned: Params,
    step: Callable[[Params, Params], Params],
    valid: Callable[[Params, Params], Tensor],
    meta_lr: float,
    count: int,
    again: bool,
) -> Params:
    """At every `step` what is learned follows the gradient of `valid` after it. `again`: then the step is made anew."""
    params, learned = detached(params), detached(learned)
    for _ in range(count):
        ahead = step(params, learned)
        grads = torch.autograd.grad(valid(ahead, learned), list(learned.values()))
        learned = detached({name: value - meta_lr * grad for (name, value), grad in zip(learned.items(), grads, strict=True)})
        params = detached(step(params, learned) if again else ahead)
    return {name: value.detach() for name, value in {**params, **learned}.items()}


def t1_t2(names: Names) -> Params:
    model, (a, b), (c, d) = names["model"], names["train"], names["valid"]
    return in_turn(
        dict(model.named_parameters()),
        {"log_decay": torch.tensor(-4.0, dtype=torch.float64)},
        lambda params, learned: steps(
            model, params, lambda m: F.cross_entropy(m(a), b), lambda step, name: 0.1, 1, decay=learned["log_decay"].exp()
        )[0],
        lambda params, learned: F.cross_entropy(call(model, params, c), d),
        100.0,
        4,
        again=False,
    )


def meta_weight_net(names: Names) -> Params:
    model, (a, b), (c, d) = names["model"], names["train"], names["valid"]

    def step(params: Params, net: Params) -> Params:
        each = -F.log_softmax(call(model, params, a), -1)[torch.arange(len(b)), b]
        hidden = F.relu(each.detach()[:, None] * net["net.0.weight"][:, 0] + net["net.0.bias"])
        weights = torch.sigmoid(hidden @ net["net.2.weight"][0] + net["net.2.bias"])
        return one_step(params, (weights * each).sum() / len(b), lambda name, grad: 0.5 * grad)

    learned = dict(names["weigh"].named_parameters())
    valid = lambda params, net: F.cross_entropy(call(model, params, c), d)  # noqa: E731
    return in_turn(dict(model.named_parameters()), learned, step, valid, 1.0, 3, again=True)


def darts(names: Names) -> Params:
    mixed, (a, b), (c, d) = names["mixed"], names["train"], names["valid"]
    params = dict(mixed.named_parameters())
    learned = {"alpha": params.pop("alpha")}

    def step(params: Params, alpha: Params) -> Params:
        ahead = steps(mixed, {**params, **alpha}, lambda m: F.cross_entropy(m(a), b), lambda step, name: 0.1, 1, ("head.", "ops."))[0]
        return {name: ahead[name] for name in params}

    return in_turn(params, learned, step, lambda p, alpha: F.cross_entropy(call(mixed, {**p, **alpha}, c), d), 1.0, 3, again=True)


IN_TURN: dict[str, tuple[Callable[[Names], Params], Callable[[Names], Params]]] = {
    "T1-T2": (lambda names: {"log_decay": names["log_decay"]}, t1_t2),
    "Meta-Weight-Net": (lambda names: dict(names["weigh"].named_parameters()), meta_weight_net),
    "DARTS": (lambda names: {"alpha": names["mixed"].alpha}, darts),
}
"""By heading: what was learned, and parameters and what was learned by plain PyTorch, from the names before the loop."""


@pytest.mark.parametrize("heading", IN_TURN)
def test_in_turn(heading: str) -> None:
    learned, oracle = IN_TURN[heading]
    names, before = run(heading), run(heading, lambda source: source.split("\nfor ")[0])
    assert any(bool((value != learned(before)[name]).any()) for name, value in learned(names).items())
    assert_near({**names["state"].params, **learned(names)}, oracle(before), torch.float64)


# --- test-time adaptation


class Stream:
    """A network in train mode that adapts by plain PyTorch, its affine parameters changed in place."""

    def __init__(self, names: Names, index: int | None = None) -> None:
        self.net = names["Net"]().double()
        self.net.load_state_dict(names["net"].state_dict())
        self.params = list(self.net.norm.parameters())
        self.moments = [torch.zeros_like(value) for value in self.params]

    def step(self, x: Tensor, loss: Callable[[Tensor], Tensor], lr: float = 0.05, momentum: float = 0.0, radius: float = 0.0) -> Tensor:
        """One step, and the loss before it."""
        value = loss(self.net(x))
        grads = torch.autograd.grad(value, self.params)
        if radius:
            norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
            with torch.no_grad():
                for param, grad in zip(self.params, grads, strict=True):
                    param += radius * grad / norm
            second = torch.autograd.grad(loss(self.net(x)), self.params)
            with torch.no_grad():
                for param, grad in zip(self.params, grads, strict=True):
                    param -= radius * grad / norm
            grads = second
        with torch.no_grad():
            for param, grad, moment in zip(self.params, grads, self.moments, strict=True):
                moment.mul_(momentum).add_(grad)
                param -= lr * moment
        return value

    def state(self) -> dict[str, Tensor]:
        floating = {name: value for name, value in self.net.named_buffers() if value.is_floating_point()}
        return {**{f"norm.{name}": value.detach() for name, value in self.net.norm.named_parameters()}, **floating}


def state_of(adapted: Any) -> dict[str, Tensor]:
    return {**adapted.params, **{name: value for name, value in adapted.buffers.items() if value.is_floating_point()}}


def predicted(net: nn.Module, x: Tensor, params: Params | None = None) -> Tensor:
    """The output of a network whose buffers do not change."""
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    return torch.func.functional_call(net, {**buffers, **(params or {})}, (x,)).detach()


def entropy(output: Tensor) -> Tensor:
    return -(F.softmax(output, -1) * F.log_softmax(output, -1)).sum(-1)


def test_tent() -> None:
    names = run("Tent")
    eager = Stream(names)
    for x, found in zip(names["stream"], names["predictions"], strict=True):
        assert_near({"prediction": found}, {"prediction": predicted(eager.net, x)}, torch.float64)
        eager.step(x, lambda output: entropy(output).mean())
    assert_near(state_of(names["state"]), eager.state(), torch.float64)


def test_statistics_of_another_domain() -> None:
    names = run("AdaBN")
    first, norm, _, head = names["target_net"]
    hidden = [first(x) for x in names["stream"]]
    mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    variance = torch.stack([h.var(0) for h in hidden]).mean(0)
    z = torch.tanh((hidden[0] - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)
    assert_near({"prediction": names["predictions"]}, {"prediction": head(z).detach()}, torch.float64)


@torch.no_grad()
def test_supports_of_classes() -> None:
    """All supports in a list, of which those of least entropy are chosen at the end."""
    names = run("T3A")
    body, head = names["model"][:2], names["model"][2]
    supports = [(float(entropy(head(w))), label, w) for label, w in enumerate(head.weight)]
    for x in names["stream"]:
        supports += [(float(entropy(head(z))), int(head(z).argmax()), z) for z in body(x)]
    rows: list[Tensor] = []
    for label in range(4):
        chosen = sorted([entry for entry in supports if entry[1] == label], key=lambda entry: entry[0])[:5]
        rows.append(F.normalize(torch.stack([z / z.norm() for *_, z in chosen]).sum(0), dim=0))
    assert len(supports) == 4 + 48 and any(sum(entry[1] == label for entry in supports) > 5 for label in range(4))
    right = body(names["stream"][0]) @ torch.stack(rows).T
    assert_near({"prediction": names["predictions"]}, {"prediction": right.detach()}, torch.float64)


def reliable(output: Tensor) -> Tensor:
    each = entropy(output)
    return each[each < 1.3].mean()


def has_reliable(net: nn.Module, x: Tensor) -> bool:
    return bool((entropy(predicted(net, x)) < 1.3).any())


def test_steps_on_reliable_examples() -> None:
    names = run(EATA)
    eager = Stream(names)
    made = 0
    for x in names["stream"]:
        if has_reliable(eager.net, x):
            eager.step(x, reliable)
            made += 1
    assert made
    assert_near(state_of(names["state"]), eager.state(), torch.float64)


def test_reliable_and_not_redundant() -> None:
    names = run(EATA)
    eager = Stream(names)
    mean: Tensor | None = None
    redundant = 0
    for x in names["stream"]:
        output = predicted(eager.net, x)
        each, probabilities = entropy(output), output.softmax(-1)
        chosen = each < 1.3
        if mean is not None:
            alike = F.normalize(probabilities, dim=-1) @ F.normalize(mean, dim=0) >= 0.95
            redundant += int((chosen & alike).sum())
            chosen = chosen & ~alike
        if chosen.any():
            weights = torch.exp(1.3 - each[chosen])
            eager.step(x, lambda output, chosen=chosen, weights=weights: (weights * entropy(output)[chosen]).mean())
            new = probabilities[chosen].mean(0)
            mean = new if mean is None else 0.9 * mean + 0.1 * new
    assert redundant
    assert_near(state_of(names["whole_state"]), eager.state(), torch.float64)


@pytest.mark.parametrize("threshold", [0.2, 1.273])
def test_sharpness_aware_with_reset(threshold: float) -> None:
    names = run(SAR, lambda source: source.replace("mean < 0.2", f"mean < {threshold}"))
    eager, mean, resets = Stream(names), torch.tensor(math.nan, dtype=torch.float64), []
    for x in names["stream"]:
        if has_reliable(eager.net, x):
            loss = eager.step(x, reliable, momentum=0.9, radius=0.05).detach()
            mean = loss if mean.isnan() else 0.9 * mean + 0.1 * loss
        resets.append(bool(mean < threshold))
        if resets[-1]:
            eager = Stream(names)
    assert resets == ([False] * 3 if threshold == 0.2 else [True, False, False])
    assert_near({"mean": names["mean"], **state_of(names["state"])}, {"mean": mean, **eager.state()}, torch.float64)


def test_streams_with_rollback_and_reset() -> None:
    names = run("Streams with rollback and reset")
    for task in range(2):
        eager = Stream(names)
        for _ in range(3):
            before, held = [value.detach().clone() for value in eager.params], {n: v.clone() for n, v in eager.net.named_buffers()}
            loss = eager.step(names["users"][task], lambda output: entropy(output).mean())
            norm = torch.stack([(new - old).square().sum() for new, old in zip(eager.params, before, strict=True)]).sum().sqrt()
            assert norm < 0.5 and loss < 2.0 and held  # neither happens on this stream; test_guards.py and test_states.py have those
        assert_near(state_of(names["state"][task]), eager.state(), torch.float64)


def test_teacher_and_restored_weights() -> None:
    names = run("CoTTA")
    net = Stream(names).net
    first = {name: value.detach().clone() for name, value in net.named_parameters()}
    source, teacher = copy.deepcopy(net), dict(first)
    generator = torch.Generator().manual_seed(0)
    was_sure: set[bool] = set()
    for x, found in zip(names["stream"], names["labels"], strict=True):
        outputs = [predicted(net, x + 0.1 * torch.randn(x.shape, generator=generator).double(), teacher) for _ in range(4)]
        is_sure = bool(predicted(source, x).softmax(-1).max(-1).values.mean() > 0.4)
        labels = predicted(net, x, teacher).softmax(-1) if is_sure else torch.stack(outputs).softmax(-1).mean(0)
        was_sure.add(is_sure)
        assert_near({"labels": found}, {"labels": labels}, torch.float64)
        loss = -(labels * net(x).log_softmax(-1)).sum(-1).mean()
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for (name, value), grad in zip(net.named_parameters(), grads, strict=True):
                value -= 0.05 * grad
                teacher[name] = 0.9 * teacher[name] + 0.1 * value
                is_restored = torch.rand(value.shape, generator=generator) < 0.1
                value[is_restored] = first[name][is_restored]
    assert len(was_sure) == 2
    state = names["state"]
    buffers = {name: value for name, value in net.named_buffers() if value.is_floating_point()}
    assert_near(state_of(state), {**{name: value.detach() for name, value in net.named_parameters()}, **buffers}, torch.float64)
    assert_near(state.opt_state.average, teacher, torch.float64)


def test_marginal_entropy() -> None:
    names = run("MEMO")
    model = names["model"]
    for x, augmented, found in zip(names["x"], names["augmented"], names["predictions"], strict=True):

        def marginal(m: Any, augmented: Tensor = augmented) -> Tensor:
            log = m(augmented).log_softmax(-1).logsumexp(0) - math.log(8)
            return -(log.exp() * log).sum()

        after = steps(model, dict(model.named_parameters()), marginal, lambda step, name: 0.5, 1)[0]
        assert_near({"prediction": found}, {"prediction": call(model, after, x)}, torch.float64)


def test_rotations() -> None:
    names = run("TTT")
    model = names["two_heads"]
    for photo, found in zip(names["photos"], names["predictions"], strict=True):
        turned = torch.stack([photo, photo.flip(-1).mT, photo.flip(-1, -2), photo.mT.flip(-1)])

        def loss(m: Any, turned: Tensor = turned) -> Tensor:
            return F.cross_entropy(m(turned)[1], torch.arange(4))

        after = steps(model, dict(model.named_parameters()), loss, lambda step, name: 0.1, 3, "trunk.")[-1]
        assert_near({"prediction": found}, {"prediction": call(model, after, photo[None])[0][0]}, torch.float64)


def test_blocks_are_short() -> None:
    for _, source in python_blocks(TEXT):
        assert len(source.splitlines()) <= MAX_LINES


def test_every_recipe_is_compared() -> None:
    headings = set(re.findall(r"^### (.*)$", TEXT, re.MULTILINE))
    assert headings == {heading for heading, *_ in META.values()} | set(IN_TURN) | {
        "Reptile",
        "ES-MAML",
        "Tent",
        "AdaBN",
        "T3A",
        EATA,
        SAR,
        "Streams with rollback and reset",
        "CoTTA",
        "MEMO",
        "TTT",
    }
