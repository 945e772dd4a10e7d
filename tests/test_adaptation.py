"""What an unroll does besides the product of tables: learned data and losses, real optimisers, chains, results, finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import gradcheck

import adaptrt
from adaptrt import Adapted, Adjoint, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim, tree
from adaptrt.inner.step import as_call
from tests import naive
from tests.models import MODELS, normal, regress
from tests.test_meta_gradients import differentiate, joined
from tests.tolerances import assert_near

EXACT: list[Adjoint] = [Unrolled(), Replay(), Replay(every=2), Stash()]
over_exact = pytest.mark.parametrize("adjoint", EXACT, ids=str)
over_adjoints = pytest.mark.parametrize("adjoint", [*EXACT, FirstOrder()], ids=str)
over_tasks = pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])


def mlp() -> tuple[nn.Module, list[Any], list[Any]]:
    """A model, and support and query of two tasks."""
    entry = MODELS["mlp"]
    return entry.model(), [entry.data(1, 4), entry.data(2, 4)], [entry.data(3, 3), entry.data(4, 3)]


def start_of(model: nn.Module, state: naive.State | None = None) -> naive.Start:
    params = dict(model.named_parameters())
    return naive.Start(params, {}, dict(model.named_buffers()), state or {})


def gradients(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The value and its gradients; every leaf must have one."""
    return {"value": value.detach(), **dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))}


# --- finite differences


@over_tasks
@over_exact
def test_gradcheck(adjoint: Adjoint, tasks: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    lr, momentum = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.2, 0.7))
    lead = (2,) if tasks else ()
    x, y, query = (normal(Generator().manual_seed(seed), *lead, 3, size).requires_grad_() for seed, size in ((1, 2), (2, 1), (3, 2)))
    target = normal(Generator().manual_seed(4), *lead, 3, 1)
    unroll = compile_unroll(model, optim.sgd(lr=lr, momentum=momentum), 3, loss=regress, adjoint=adjoint, backend="eager")
    unroll = unroll.vmap() if tasks else unroll
    leaves = (*model.parameters(), lr, momentum, x, y, query)
    assert gradcheck(lambda *_: unroll((x, y), (query, target)), leaves)

    def adapt(*_: Tensor) -> tuple[Tensor, ...]:
        adapted = unroll.adapt((x, y))
        return *adapted.params.values(), adapted.losses, *(state.momentum_buffer for state in adapted.opt_state.values()), adapted(query)

    assert gradcheck(adapt, leaves)


@over_exact
def test_gradcheck_adam(adjoint: Adjoint) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.6, 0.8, 0.02, 0.3)]
    lr, beta1, beta2, eps, decay = numbers
    x, y = (normal(Generator().manual_seed(seed), 3, size).requires_grad_() for seed, size in ((1, 2), (2, 1)))
    opt = optim.adamw(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    unroll = compile_unroll(model, opt, 2, loss=regress, adjoint=adjoint, backend="eager")
    assert gradcheck(lambda *_: unroll((x, y), (x, y)), (*model.parameters(), *numbers, x, y))


def test_gradcheck_of_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 1)).double()
    x, y = (normal(Generator().manual_seed(seed), 4, size).requires_grad_() for seed, size in ((1, 2), (2, 1)))
    unroll = compile_unroll(model, optim.sgd(lr=0.2), 2, loss=regress, adjoint=Replay(), backend="eager")
    assert gradcheck(lambda *_: unroll((x, y), (x, y)), (*model.parameters(), x, y))


# --- what can be learned besides the model


@over_tasks
@over_adjoints
def test_data_that_require_grad(adjoint: Adjoint, tasks: bool) -> None:
    model, supports, queries = mlp()
    data = [value.requires_grad_() for part in (supports[:2], queries[:2]) for batch in part for value in batch]
    if not tasks:
        data = [*supports[0], *queries[0]]
    # First-order support data reach the meta-loss through inner gradients alone, which are constants: their gradient is zero.
    unroll = compile_unroll(model, optim.sgd(lr=0.2), 3, loss=regress, adjoint=adjoint, backend="eager")
    unroll = unroll.vmap() if tasks else unroll
    loop = naive.Loop(model, regress, naive.sgd, {"lr": 0.2}, 3, first_order=isinstance(adjoint, FirstOrder))
    count = 2 if tasks else 1
    losses = [naive.meta_loss(loop, start_of(model), supports[t], queries[t]) for t in range(count)]
    wanted = torch.autograd.grad(torch.stack(losses).mean(), data, allow_unused=True)
    got = torch.autograd.grad(unroll(joined(supports, tasks), joined(queries, tasks)), data, allow_unused=True)
    names = [f"data {index}" for index in range(len(data))]
    dense = [[torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(data, grads, strict=True)] for grads in (got, wanted)]
    got_data, wanted_data = (dict(zip(names, grads, strict=True)) for grads in dense)
    assert_near(got_data, wanted_data)
    assert any(grad.any() for grad in dense[0])


class LearnedLoss(nn.Module):
    """Weights each output's error by a parameter, and normalises by a running mean of its own."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, 1.9], dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        error = ((output - target) ** 2 * self.weight.exp()).mean()
        self.scale.mul_(0.9).add_(0.1 * error.detach())
        return error / self.scale


@over_tasks
@over_adjoints
def test_loss_is_a_module(adjoint: Adjoint, tasks: bool) -> None:
    model, supports, queries = mlp()
    loss = LearnedLoss()
    unroll = compile_unroll(model, optim.sgd(lr=0.2), 3, loss=loss, adjoint=adjoint, backend="eager")
    unroll = unroll.vmap() if tasks else unroll
    leaves = {**dict(model.named_parameters()), "loss weight": loss.weight}
    got = gradients(unroll(joined(supports, tasks), joined(queries, tasks)), leaves)

    # The oracle has no loss modules: loss and model are one model of (inputs, target), whose output is the loss.
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = model, loss

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.model(x), y)

    both = Both()
    loop = naive.Loop(both, lambda output: output, naive.sgd, {"lr": 0.2}, 3, first_order=isinstance(adjoint, FirstOrder))
    named = dict(both.named_parameters())
    start = naive.Start(
        {name: param for name, param in named.items() if name.startswith("model.")},
        {name: param for name, param in named.items() if name.startswith("loss.")},
        dict(both.named_buffers()),
        {},
    )
    count = 2 if tasks else 1
    losses = [naive.meta_loss(loop, start, (supports[t],), (queries[t],)) for t in range(count)]
    assert_near(got, gradients(torch.stack(losses).mean(), leaves))
    assert float(loss.scale) == 2.0
    adapted = unroll.adapt(joined(supports, tasks))
    assert not adapted.buffers
    assert set(adapted.params) == set(dict(model.named_parameters()))


@over_exact
def test_learning_rate_of_each_element(adjoint: Adjoint) -> None:
    model, (support, _), (query, _) = mlp()
    lr = {name: torch.rand_like(param, requires_grad=True) for name, param in model.named_parameters()}
    decay = {name: torch.tensor(0.1 * index, dtype=torch.float64, requires_grad=True) for index, name in enumerate(lr)}
    hyper = {"lr": lr, "weight_decay": decay}
    unroll = compile_unroll(model, optim.sgd(lr=lr, weight_decay=decay), 3, loss=regress, adjoint=adjoint, backend="eager")
    loop = naive.Loop(model, regress, naive.sgd, hyper, 3)
    wanted = differentiate(naive.meta_loss(loop, start_of(model), support, query), model, hyper)
    assert_near(differentiate(unroll(support, query), model, hyper), wanted)
    assert_near(differentiate(regress(unroll.adapt(support)(query[0]), query[1]), model, hyper), wanted)


def test_learning_rates_in_a_torch_optimizer() -> None:
    model, (support, _), (query, _) = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    unroll = compile_unroll(model, opt, 3, loss=regress, adjoint=Replay(), backend="eager")
    unroll(support, query)
    for lr in (torch.tensor(0.2, dtype=torch.float64, requires_grad=True), {n: torch.rand_like(p) for n, p in model.named_parameters()}):
        lr = tree.map_leaves(lambda value: value.requires_grad_(), lr)
        opt.param_groups[0]["lr"] = lr
        loop = naive.Loop(model, regress, naive.sgd, {"lr": lr}, 3)
        wanted = differentiate(naive.meta_loss(loop, start_of(model), support, query), model, {"lr": lr})
        assert_near(differentiate(unroll(support, query), model, {"lr": lr}), wanted)


def test_changing_a_number_does_not_compile() -> None:
    model, (support, _), (query, _) = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    unroll = compile_unroll(model, opt, 2, loss=regress, adjoint=Replay(), backend="eager")
    unroll(support, query)
    graphs = {name: id(graph) for name, graph in unroll.graphs().items()}
    for lr, momentum in ((0.2, 0.5), (0.01, 0.9)):
        opt.param_groups[0].update(lr=lr, momentum=momentum)
        loop = naive.Loop(model, regress, naive.sgd, {"lr": lr, "momentum": momentum}, 2)
        assert_near({"loss": unroll(support, query)}, {"loss": naive.meta_loss(loop, start_of(model), support, query)})
    assert {name: id(graph) for name, graph in unroll.graphs().items()} == graphs


# --- optimisers that have taken steps

STEPPED: dict[str, tuple[Callable[..., torch.optim.Optimizer], naive.Rule, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, naive.sgd, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, naive.sgd, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (torch.optim.Adam, naive.adam, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, naive.adamw, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True}),
}


@pytest.mark.parametrize(("steps", "tasks"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize(("kind", "rule", "settings"), STEPPED.values(), ids=STEPPED)
def test_branches_from_a_torch_optimizer(
    kind: Callable[..., torch.optim.Optimizer], rule: naive.Rule, settings: dict[str, Any], steps: int, tasks: bool
) -> None:
    model, supports, queries = mlp()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    opt = kind([{"params": first, "lr": 0.05}, {"params": second, "lr": 0.01}], lr=1.0, **settings)
    for seed in range(steps):
        opt.zero_grad()
        regress(model(supports[0][0]), normal(Generator().manual_seed(seed), 4, 2)).backward()
        opt.step()
    opt.zero_grad()
    unroll = compile_unroll(model, opt, 3, loss=regress, adjoint=Replay(), backend="eager")
    unroll = unroll.vmap() if tasks else unroll
    groups = {name: index for index, names in enumerate((("0.weight", "0.bias"), ("2.weight", "2.bias"))) for name in names}
    loop = naive.Loop(model, regress, rule, {**settings, "lr": {name: (0.05, 0.01)[index] for name, index in groups.items()}}, 3)
    state = {name: dict(opt.state[param]) for name, param in model.named_parameters() if opt.state[param]}
    kept = tree.map_leaves(lambda value: value.clone(), state)
    assert bool(state) == bool(steps)
    got = differentiate(unroll(joined(supports, tasks), joined(queries, tasks)), model, {})
    losses = [naive.meta_loss(loop, start_of(model, state), supports[t], queries[t]) for t in range(2 if tasks else 1)]
    assert_near(got, differentiate(torch.stack(losses).mean(), model, {}))
    for name, param in model.named_parameters():
        assert all(torch.equal(torch.as_tensor(opt.state[param][key]), value) for key, value in kept.get(name, {}).items())
    assert not any(param.grad is not None for param in model.parameters())


def test_adaptation_is_what_the_optimizer_itself_would_do() -> None:
    model, (support, _), _ = mlp()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True)
    adapted = compile_unroll(model, opt, 4, loss=regress, backend="eager").adapt(support)
    losses: list[Tensor] = []
    for _ in range(4):
        opt.zero_grad()
        losses.append(regress(model(support[0]), support[1]))
        losses[-1].backward()
        opt.step()
    assert_near(adapted.params, {name: param.detach() for name, param in model.named_parameters()})
    assert_near({"losses": adapted.losses}, {"losses": torch.stack(losses)})


# A live moving mean is left out: between two steps of torch.optim its graph is gone.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "moving-mean-live"])
def test_every_model_adapts_as_torch_optim_trains_it(name: str) -> None:
    # Nothing here is called as a function: the module itself is trained.
    entry = MODELS[name]
    model, (inputs, *target) = entry.model(), entry.data(1, 4)
    chosen = [param for key, param in model.named_parameters() if param.requires_grad and fnmatch(key, entry.select or "*")]
    opt = torch.optim.SGD(chosen, lr=0.1, momentum=0.5, weight_decay=0.01)
    unroll = compile_unroll(model, opt, entry.k, loss=entry.loss, adjoint=Replay(), backend="eager")
    torch.manual_seed(3)
    with torch.no_grad():
        adapted = unroll.adapt((inputs, *target))
    torch.manual_seed(3)
    losses: list[Tensor] = []
    args, kwargs = as_call(inputs)
    for _ in range(entry.k):
        opt.zero_grad()
        losses.append(entry.loss(model(*args, **kwargs), *target))
        losses[-1].backward()
        opt.step()
    assert_near({"losses": adapted.losses}, {"losses": torch.stack(losses).detach()})
    state = model.state_dict()
    assert_near({key: adapted.state_dict()[key] for key in state}, dict(state))


# --- one batch for each step, and chains


@over_tasks
@over_adjoints
def test_per_step(adjoint: Adjoint, tasks: bool) -> None:
    entry = MODELS["mlp"]
    model = entry.model()
    supports = [joined([entry.data(10 * t + step, 4) for step in range(3)], True) for t in range(2)]
    queries = [entry.data(100 + t, 3) for t in range(2)]
    for batch in supports:
        batch[0].requires_grad_()
    hyper: dict[str, Any] = {"lr": 0.1, "momentum": 0.5}
    unroll = compile_unroll(model, optim.sgd(**hyper), 3, loss=regress, adjoint=adjoint, per_step=True, backend="eager")
    unroll = unroll.vmap() if tasks else unroll
    loop = naive.Loop(model, regress, naive.sgd, hyper, 3, per_step=True, first_order=isinstance(adjoint, FirstOrder))
    count = 2 if tasks else 1
    losses = [naive.meta_loss(loop, start_of(model), supports[t], queries[t]) for t in range(count)]
    data = {f"x{t}": supports[t][0] for t in range(count)}
    wanted = differentiate(torch.stack(losses).mean(), model, data)
    assert_near(differentiate(unroll(joined(supports, tasks), joined(queries, tasks)), model, data), wanted)
    adapted = unroll.adapt(joined(supports, tasks))
    predicted = regress(adapted(joined(queries, tasks)[0]), joined(queries, tasks)[1])
    assert_near(differentiate(predicted, model, data), wanted)


CHAINED = {
    "momentum": (optim.sgd, naive.sgd, {"lr": 0.1, "momentum": 0.9}),
    "adam": (optim.adam, naive.adam, {"lr": 0.05, "eps": 0.01}),
}


@over_tasks
@pytest.mark.parametrize(
    ("adjoint", "name"),
    [(Unrolled(), "momentum"), (Replay(), "adam"), (Replay(every=2), "momentum"), (FirstOrder(), "adam")],
    ids=str,
)
def test_two_adaptations_are_one_longer(adjoint: Adjoint, name: str, tasks: bool) -> None:
    model, supports, queries = mlp()
    ours, rule, hyper = CHAINED[name]
    unroll = compile_unroll(model, ours(**hyper), 2, loss=regress, adjoint=adjoint, backend="eager")
    unroll = unroll.vmap() if tasks else unroll
    support, query = joined(supports, tasks), joined(queries, tasks)
    loop = naive.Loop(model, regress, rule, hyper, 4, first_order=isinstance(adjoint, FirstOrder))
    losses = [naive.meta_loss(loop, start_of(model), supports[t], queries[t]) for t in range(2 if tasks else 1)]
    wanted = differentiate(torch.stack(losses).mean(), model, {})
    half = unroll.adapt(support)
    assert_near(differentiate(unroll(support, query, start=half), model, {}), wanted)
    whole = unroll.adapt(support, start=half)
    assert_near(differentiate(regress(whole(query[0]), query[1]), model, {}), wanted)
    assert not torch.equal(whole.losses, half.losses)


def test_chain_through_buffers() -> None:
    entry = MODELS["moving-mean-live"]
    model, support, query = entry.model(), entry.data(1, 4), entry.data(2, 3)
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, adjoint=Replay(), backend="eager")
    half = unroll.adapt(support)
    loop = naive.Loop(model, entry.loss, naive.sgd, {"lr": 0.1}, 4)
    start = start_of(model)
    wanted = differentiate(naive.meta_loss(loop, start, support, query), model, {})
    assert_near(differentiate(unroll(support, query, start=half), model, {}), wanted)
    assert int(half.buffers["calls"]) == 2


@over_exact
def test_all_tasks_start_from_one_adaptation(adjoint: Adjoint) -> None:
    model, supports, queries = mlp()
    unroll = compile_unroll(model, optim.sgd(lr=0.1, momentum=0.5), 2, loss=regress, adjoint=adjoint, backend="eager")
    common = unroll.adapt(supports[0])
    loss = unroll.vmap()(joined(supports, True), joined(queries, True), start=common)
    loop = naive.Loop(model, regress, naive.sgd, {"lr": 0.1, "momentum": 0.5}, 2)
    before = naive.adapt(loop, start_of(model), supports[0])
    losses = [naive.meta_loss(loop, before, supports[t], queries[t]) for t in range(2)]
    assert_near(differentiate(loss, model, {}), differentiate(torch.stack(losses).mean(), model, {}))


# --- results


@over_tasks
def test_prediction_is_differentiable_in_its_inputs(tasks: bool) -> None:
    model, supports, queries = mlp()
    unroll = compile_unroll(model, optim.sgd(lr=0.2), 2, loss=regress, backend="eager")
    unroll = unroll.vmap() if tasks else unroll
    x = joined(queries, tasks)[0].requires_grad_()
    adapted = unroll.adapt(joined(supports, tasks))
    got = differentiate(adapted(x).sin().sum(), model, {"x": x})
    loop = naive.Loop(model, regress, naive.sgd, {"lr": 0.2}, 2)
    outputs: list[Tensor] = []
    for t in range(2 if tasks else 1):
        after = naive.adapt(loop, start_of(model), supports[t])
        outputs.append(naive.call(model, after.params, after.buffers, x[t] if tasks else x)[0].sin().sum())
    assert_near(got, differentiate(torch.stack(outputs).sum(), model, {"x": x}))


def test_prediction_of_a_tree() -> None:
    entry = MODELS["dataclass-output"]
    model, support, (inputs,) = entry.model(), entry.data(1, 4), entry.data(2, 3)
    unroll = compile_unroll(model, optim.sgd(lr=0.2), 2, adjoint=Replay(), backend="eager")
    output = unroll.adapt(support)(inputs)  # as in (inputs, target): a tuple of one dict, which the model takes whole
    loop = naive.Loop(model, entry.loss, naive.sgd, {"lr": 0.2}, 2)
    after = naive.adapt(loop, start_of(model), support)
    wanted, _ = naive.call(model, after.params, after.buffers, inputs)
    assert type(output) is type(wanted)
    got = differentiate(output.loss + output.hidden[0].sum(), model, {})
    assert_near(got, differentiate(wanted.loss + wanted.hidden[0].sum(), model, {}))


def test_prediction_by_keyword_and_by_position() -> None:
    entry = MODELS["tuple-inputs"]
    model, support, ((left, right), _) = entry.model(), entry.data(1, 4), entry.data(2, 3)
    adapted = compile_unroll(model, optim.sgd(lr=0.2), 2, loss=regress, backend="eager").adapt(support)
    assert torch.equal(adapted(left, right), adapted(left=left, right=right))


def test_losses_without_labels() -> None:
    def entropy(logits: Tensor) -> Tensor:
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()

    model, (support, _), (query, _) = mlp()
    unroll = compile_unroll(model, optim.sgd(lr=0.2), 3, loss=entropy, backend="eager")
    loop = naive.Loop(model, entropy, naive.sgd, {"lr": 0.2}, 3)
    wanted = naive.meta_loss(loop, start_of(model), support[:1], query[:1])
    assert_near(differentiate(unroll(support[:1], query[:1]), model, {}), differentiate(wanted, model, {}))


def test_default_losses() -> None:
    for name in ("mlp", "conv-bn-train"):
        entry = MODELS[name]
        model, support, query = entry.model(), entry.data(1, 4), entry.data(2, 3)
        values = [compile_unroll(model, optim.sgd(lr=0.1), 2, loss=loss, backend="eager")(support, query) for loss in (None, entry.loss)]
        assert torch.equal(*values)


def test_state_dict_can_be_loaded() -> None:
    entry = MODELS["conv-bn-train"]
    model, other, (x, _) = entry.model(), entry.model(seed=9), entry.data(2, 3)
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, backend="eager")
    other.load_state_dict(unroll.adapt(entry.data(1, 4)).state_dict())
    loop = naive.Loop(model, entry.loss, naive.sgd, {"lr": 0.1}, 2)
    after = naive.adapt(loop, start_of(model), entry.data(1, 4))
    wanted, _ = naive.call(entry.model().eval(), after.params, after.buffers, x)
    assert_near({"prediction": other.eval()(x)}, {"prediction": wanted})


def test_only_what_requires_grad_is_asked_for() -> None:
    model, (support, _), (query, _) = mlp()
    unroll = compile_unroll(model, optim.sgd(lr=0.2), 2, loss=regress, params="2.*", backend="eager")
    with torch.no_grad():
        adapted = unroll.adapt(support)
    assert not adapted.losses.requires_grad
    model.requires_grad_(False)
    assert not unroll(support, query).requires_grad
    model.get_parameter("0.bias").requires_grad_(True)
    loss = unroll(support, query)
    loss.backward()
    assert [name for name, param in model.named_parameters() if param.grad is not None] == ["0.bias"]


# --- randomness


def test_noise_differs_by_task() -> None:
    entry = MODELS["dropout"]
    unroll = compile_unroll(entry.model(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend="eager").vmap()
    support = joined([entry.data(1, 4)] * 4, True)
    with torch.no_grad():
        losses = unroll.adapt(support).losses
    assert len({float(value) for value in losses.flatten()}) == losses.numel()


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.random])
def test_same_seed_same_noise_as_the_model_itself(name: str) -> None:
    # The model called as users call it, in train mode: lr = 0, so that each step's loss is that of the model under the next draws.
    entry = MODELS[name]
    model, support = entry.model(), entry.data(1, 4)
    unroll = compile_unroll(model, optim.sgd(lr=0.0), 3, loss=entry.loss, adjoint=Replay(), backend="eager")
    torch.manual_seed(11)
    adapted: Adapted = unroll.adapt(support)
    prediction = adapted(support[0])
    after = torch.get_rng_state()
    torch.manual_seed(11)
    losses = [entry.loss(model(support[0]), support[1]) for _ in range(3)]
    assert_near({"losses": adapted.losses, "prediction": prediction}, {"losses": torch.stack(losses), "prediction": model(support[0])})
    assert torch.equal(torch.get_rng_state(), after)


def test_generator_of_ones_own() -> None:
    entry = MODELS["dropout"]
    unroll = compile_unroll(entry.model(), optim.sgd(lr=0.1), 2, loss=entry.loss, backend="eager")
    before = torch.get_rng_state()
    with torch.no_grad():
        values = [float(unroll(entry.data(1, 4), entry.data(2, 3), generator=Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert values[0] == values[1] != values[2]
    torch.manual_seed(1)
    assert float(unroll(entry.data(1, 4), entry.data(2, 3)).detach()) == values[0]


# --- the model stays as it is


@pytest.mark.parametrize("name", ["conv-bn-train", "weight-norm-hook", "spectral-norm", "moving-mean", "dropout", "tied", "attributes"])
def test_model_is_untouched(name: str) -> None:
    entry = MODELS[name]
    model = entry.model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    held = [{key: id(value) for key, value in vars(part).items()} for part in model.modules()]
    tensors = [*map(id, model.parameters()), *map(id, model.buffers())]
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, loss=entry.loss, adjoint=Replay(), backend="eager")
    loss = unroll(entry.data(1, 4), entry.data(2, 3))
    unroll.adapt(entry.data(1, 4))(entry.data(2, 3)[0])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [{key: id(value) for key, value in vars(part).items()} for part in model.modules()] == held
    assert [*map(id, model.parameters()), *map(id, model.buffers())] == tensors
    assert all(param.grad is None for param in model.parameters())
    loss.backward()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_auto_is_exact() -> None:
    model, (support, _), (query, _) = mlp()
    loop = naive.Loop(model, regress, naive.sgd, {"lr": 0.2}, 2)
    unroll = compile_unroll(model, optim.sgd(lr=0.2), 2, loss=regress, backend="eager")
    wanted = naive.meta_loss(loop, start_of(model), support, query)
    assert_near(differentiate(unroll(support, query), model, {}), differentiate(wanted, model, {}))


def test_chain_of_transforms() -> None:
    model, (support, _), (query, _) = mlp()
    opt = optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(lr=0.3), optim.scale_by_schedule(lambda step: 0.5**step))
    unroll = compile_unroll(model, opt, 3, loss=regress, adjoint=Replay(), backend="eager")
    params: dict[str, Any] = dict(model.named_parameters())
    for step in range(3):
        loss, _ = naive.evaluate(naive.Loop(model, regress, naive.sgd, {}, 1), params, {}, support)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        total = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        factor = (0.5 / (total + 1e-6)).clamp(max=1.0)
        params = {name: p - 0.3 * 0.5**step * factor * g for (name, p), g in zip(params.items(), grads, strict=True)}
    wanted = F.mse_loss(torch.func.functional_call(model, params, (query[0],)), query[1])
    assert_near(differentiate(unroll(support, query), model, {}), differentiate(wanted, model, {}))


def test_adapted_is_public() -> None:
    assert adaptrt.Adapted is Adapted


@over_tasks
@pytest.mark.parametrize("per_step", [False, True])
def test_truncated_is_a_loop_whose_first_steps_run_without_gradients(per_step: bool, tasks: bool) -> None:
    """So data of those steps and the start get zero, and hyperparameters what the last steps contribute."""
    entry = MODELS["mlp"]
    model, lr = entry.model(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    lead = (2,) if tasks else ()
    steps = (3,) if per_step else ()
    x, y = (normal(Generator().manual_seed(seed), *lead, *steps, 4, size).requires_grad_() for seed, size in ((1, 3), (2, 2)))
    query = [normal(Generator().manual_seed(seed), *lead, 4, size) for seed, size in ((3, 3), (4, 2))]
    unroll = compile_unroll(model, optim.sgd(lr=lr), 3, loss=regress, adjoint=Truncated(2), backend="eager", per_step=per_step)
    leaves = {"lr": lr, "x": x, "y": y, **dict(model.named_parameters())}
    found = gradients((unroll.vmap() if tasks else unroll)((x, y), tuple(query)), leaves)

    losses: list[Tensor] = []
    for task in range(2) if tasks else [None]:
        one = [value if task is None else value[task] for value in (x, y, *query)]
        params: dict[str, Tensor] = dict(model.named_parameters())
        for step in range(3):
            a, b = (value[step] for value in one[:2]) if per_step else one[:2]
            loss = regress(torch.func.functional_call(model, params, (a,)), b)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: value - lr * grad for (name, value), grad in zip(params.items(), grads, strict=True)}
            if step == 0:
                params = {name: value.detach().requires_grad_() for name, value in params.items()}
        losses.append(regress(torch.func.functional_call(model, params, (one[2],)), one[3]))
    value = torch.stack(losses).mean()
    right = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    wanted = {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), right, strict=True)}
    assert_near(found, {"value": value.detach(), **wanted}, torch.float64)


def test_truncated_at_all_steps_is_exact_and_keeps_its_losses_apart() -> None:
    model, supports, queries = mlp()
    losses = [compile_unroll(model, optim.sgd(lr=0.2), 3, loss=regress, adjoint=a, backend="eager") for a in (Truncated(7), Stash())]
    found, wanted = (gradients(unroll(supports[0], queries[0]), dict(model.named_parameters())) for unroll in losses)
    assert_near(found, wanted, torch.float64)
    # The losses before the constant steps depend on nothing; that of the last step on the start through no path.
    adapted = compile_unroll(model, optim.sgd(lr=0.2), 3, loss=regress, adjoint=Truncated(1), backend="eager").adapt(supports[0])
    (grad,) = torch.autograd.grad(adapted.losses.sum(), next(model.parameters()))
    assert not grad.any()


@pytest.mark.parametrize("steps", [0, True, 1.5, "2"])
def test_truncated_needs_a_number_of_steps(steps: Any) -> None:
    with pytest.raises(adaptrt.errors.InvalidArgument, match="must be an int of at least 1"):
        Truncated(steps)


def test_the_gradient_of_a_computed_hyperparameter_by_the_tensor_it_was_computed_from() -> None:
    """`torch.autograd.grad` may not be asked whether a leaf runs."""
    model, supports, queries = mlp()
    found: list[Tensor] = []
    for is_ours in (True, False):
        log_lr = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        if is_ours:
            unroll = compile_unroll(model, optim.sgd(lr=log_lr.exp()), 3, loss=regress, adjoint=Replay(), backend="eager")
            loss = unroll(supports[0], queries[0])
        else:
            loop = naive.Loop(model, regress, naive.sgd, {"lr": log_lr.exp()}, 3)
            loss = naive.meta_loss(loop, start_of(model), supports[0], queries[0])
        found += torch.autograd.grad(loss, log_lr)
    assert_near({"log_lr": found[0]}, {"log_lr": found[1]}, torch.float64)
