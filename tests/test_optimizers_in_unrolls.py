"""Every optimiser inside `compile_unroll`, against `torch.optim` itself: values of a plain loop, derivatives by its finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import Adjoint, FirstOrder, Replay, Unrolled, compile_unroll, optim
from adaptrt.errors import InvalidArgument, NotTraceable, OptimizerMismatch, UnsupportedOptimizer, UnsupportedRandomness
from tests.tolerances import assert_near

K = 3
STEP = 2e-6
"""Of central differences: their error is of the order of its square, and rounding of 1e-16 over it."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """torch.optim keeps some of its state in the default dtype; finite differences need all of it in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Case(NamedTuple):
    kind: type[torch.optim.Optimizer]
    settings: dict[str, Any]
    k: int = K


# eps is large, so that no derivative is large; every other number matters within three steps.
CASES: dict[str, Case] = {
    "sgd": Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    "adam": Case(torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.7), "eps": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adamw": Case(torch.optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.7), "eps": 0.01, "weight_decay": 0.1}),
    "adamax": Case(torch.optim.Adamax, {"lr": 0.05, "betas": (0.8, 0.7), "eps": 0.01, "weight_decay": 0.1}),
    "nadam": Case(torch.optim.NAdam, {"lr": 0.05, "betas": (0.8, 0.7), "eps": 0.01, "momentum_decay": 2.0, "weight_decay": 0.1}),
    "radam": Case(torch.optim.RAdam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1}, k=7),
    "adagrad": Case(torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 0.01}),
    "adadelta": Case(torch.optim.Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 0.01, "weight_decay": 0.1}),
    "asgd": Case(torch.optim.ASGD, {"lr": 0.1, "lambd": 0.3, "alpha": 0.7, "weight_decay": 0.1}),
    "rmsprop": Case(torch.optim.RMSprop, {"lr": 0.05, "alpha": 0.8, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.5, "centered": True}),
    "rprop": Case(torch.optim.Rprop, {"lr": 0.2, "etas": (0.4, 1.3), "step_sizes": (0.06, 0.3)}, k=5),
    "adafactor": Case(torch.optim.Adafactor, {"lr": 0.1, "beta2_decay": -0.7, "eps": (0.3, 0.9), "d": 1.02, "weight_decay": 0.1}),
    "lbfgs": Case(torch.optim.LBFGS, {"lr": 0.4, "max_iter": 4, "history_size": 3, "tolerance_grad": 0, "tolerance_change": 0}),
}
over_cases = pytest.mark.parametrize("name", CASES)


def make_model() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model


def make_batch(seed: int, *leading: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, 6, 3, generator=generator), torch.randn(*leading, 6, 2, generator=generator)


SUPPORT, QUERY = make_batch(2), make_batch(3)
# Made before any test changes the default dtype.
SUPPORT, QUERY = tuple(x.double() for x in SUPPORT), tuple(x.double() for x in QUERY)


def numbers(settings: Mapping[str, Any]) -> dict[str, float]:
    """The settings that have derivatives; those in tuples as "betas.0" and so on."""
    found: dict[str, float] = {}
    for key, value in settings.items():
        entries = {f"{key}.{i}": entry for i, entry in enumerate(value)} if isinstance(value, tuple) else {key: value}
        found.update({path: entry for path, entry in entries.items() if isinstance(entry, float)})
    return found


def replaced(settings: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, index = path.partition(".")
    if not index:
        return {**settings, key: value}
    entries = list(settings[key])
    entries[int(index)] = value
    return {**settings, key: tuple(entries)}


def torch_loop(case: Case, model: nn.Module) -> tuple[nn.Module, list[float]]:
    """A copy of the model after k steps of the real optimiser, and the losses before them."""
    model = copy.deepcopy(model)
    opt: Any = case.kind(model.parameters(), **case.settings)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(SUPPORT[0]), SUPPORT[1])
        loss.backward()
        return loss

    return model, [opt.step(closure).item() for _ in range(case.k)]


def query_loss(case: Case, model: nn.Module) -> float:
    return F.mse_loss(torch_loop(case, model)[0](QUERY[0]), QUERY[1]).item()


def moved(model: nn.Module, direction: Mapping[str, Tensor], by: float) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += by * direction[name]
    return model


def difference(fn: Callable[[float], float]) -> float:
    return (fn(STEP) - fn(-STEP)) / (2 * STEP)


def live(case: Case, model: nn.Module) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """The real optimiser with a tensor that requires grad in place of each number, and those tensors."""
    opt = case.kind(model.parameters(), **case.settings)
    leaves = {path: torch.tensor(value, requires_grad=True) for path, value in numbers(case.settings).items()}
    for path, leaf in leaves.items():
        opt.param_groups[0].update({key: value for key, value in replaced(opt.param_groups[0], path, leaf).items() if key != "params"})
    return opt, leaves


@pytest.mark.parametrize("adjoint", [Replay(), Unrolled()], ids=["replay", "unrolled"])
@over_cases
def test_values_and_meta_gradients(name: str, adjoint: Adjoint) -> None:
    case, model = CASES[name], make_model()
    opt, leaves = live(case, model)
    unroll = compile_unroll(model, opt, case.k, loss=F.mse_loss, adjoint=adjoint, backend="eager")

    adapted = unroll.adapt(SUPPORT)
    expected, losses = torch_loop(case, model)
    assert_near(adapted.params, {key: p.detach() for key, p in expected.named_parameters()}, torch.float64)
    torch.testing.assert_close(adapted.losses, torch.tensor(losses), rtol=1e-12, atol=1e-14)

    loss = unroll(SUPPORT, QUERY)
    loss.backward()
    generator = torch.Generator().manual_seed(4)
    direction = {key: torch.randn(p.shape, generator=generator) for key, p in model.named_parameters()}
    along = sum((p.grad * direction[key]).sum().item() for key, p in model.named_parameters() if p.grad is not None)
    found = {"params": along} | {path: torch.as_tensor(leaf.grad).item() for path, leaf in leaves.items()}
    wanted = {"params": difference(lambda h: query_loss(case, moved(model, direction, h)))}
    for path, value in numbers(case.settings).items():

        def at(h: float, path: str = path, value: float = value) -> float:
            return query_loss(case._replace(settings=replaced(case.settings, path, value + h)), model)

        wanted[path] = difference(at)
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
        assert value != 0.0, f"{key} has no influence here, so this shows nothing"


@over_cases
def test_tasks_are_adapted_as_alone(name: str) -> None:
    case, model = CASES[name], make_model()
    opt, leaves = live(case, model)
    unroll = compile_unroll(model, opt, case.k, loss=F.mse_loss, adjoint=Replay(), backend="eager")
    support, query = make_batch(5, 2), make_batch(6, 2)
    wanted = [*model.parameters(), *leaves.values()]
    together = torch.autograd.grad(unroll.vmap()(support, query), wanted)
    alone = torch.stack([unroll((support[0][t], support[1][t]), (query[0][t], query[1][t])) for t in range(2)]).mean()
    for got, expected in zip(together, torch.autograd.grad(alone, wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "lbfgs", "rprop"])
def test_on_inductor(name: str) -> None:
    case, model = CASES[name], make_model()
    opt, leaves = live(case, model)
    wanted = [*model.parameters(), *leaves.values()]
    compiled, eager = (
        torch.autograd.grad(compile_unroll(model, opt, case.k, loss=F.mse_loss, adjoint=Replay(), backend=backend)(SUPPORT, QUERY), wanted)
        for backend in ("inductor", "eager")
    )
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_muon(backend: str) -> None:
    """In float64, which torch.optim.Muon does not do: by finite differences of the loop of pure updates."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    lr = torch.tensor(0.1, requires_grad=True)

    def loss_of(lr: Any) -> Tensor:
        opt = optim.muon(lr=lr, ns_dtype=torch.float64)
        params = {key: p.detach().requires_grad_() for key, p in model.named_parameters()}
        state = opt.init(params)
        for _ in range(K):
            loss = F.mse_loss(torch.func.functional_call(model, params, SUPPORT[0]), SUPPORT[1])
            grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
            params, state = opt.update(grads, state, params, opt.hyper)
            params = {key: p.detach().requires_grad_() for key, p in params.items()}
        return F.mse_loss(torch.func.functional_call(model, params, QUERY[0]), QUERY[1])

    unroll = compile_unroll(model, optim.muon(lr=lr, ns_dtype=torch.float64), K, loss=F.mse_loss, adjoint=Replay(), backend=backend)
    loss = unroll(SUPPORT, QUERY)
    torch.testing.assert_close(loss, loss_of(0.1), rtol=1e-10, atol=0.0)
    (found,) = torch.autograd.grad(loss, lr)
    assert found.item() == pytest.approx(difference(lambda h: loss_of(0.1 + h).item()), rel=1e-6)


def test_muon_follows_torch_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    case = Case(torch.optim.Muon, {"lr": 0.1})
    adapted = compile_unroll(model, torch.optim.Muon(model.parameters(), lr=0.1), K, loss=F.mse_loss, backend="eager").adapt(SUPPORT)
    expected, _ = torch_loop(case, model)
    assert_near(adapted.params, {key: p.detach() for key, p in expected.named_parameters()}, torch.float64)


# --- several updates a step


@pytest.mark.parametrize("adjoint", [Replay(), Replay(every=3), Unrolled(), FirstOrder()], ids=str)
def test_a_step_of_lbfgs_is_several_updates_on_its_own_batch(adjoint: Adjoint) -> None:
    model = make_model()
    lr = torch.tensor(0.4, requires_grad=True)
    batches = make_batch(7, K)
    batches = tuple(x.requires_grad_(x.dim() == 3) for x in batches)

    def gradients(opt: optim.Optimizer, support: tuple[Tensor, ...], k: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        unroll = compile_unroll(model, opt, k, loss=F.mse_loss, adjoint=adjoint, per_step=True, backend="eager")
        adapted = unroll.adapt(support)
        total = F.mse_loss(torch.func.functional_call(model, adapted.params, QUERY[0]), QUERY[1]) + adapted.losses[:: k // K].square().sum()
        return adapted.losses, torch.autograd.grad(total, [*model.parameters(), lr, *batches])

    losses, found = gradients(optim.lbfgs(lr=lr, max_iter=2, history_size=3), batches, K)
    repeated = tuple(x.repeat_interleave(2, 0) for x in batches)
    every_update, wanted = gradients(optim.lbfgs(lr=lr, max_iter=1, history_size=3), repeated, 2 * K)
    torch.testing.assert_close(losses, every_update[::2], rtol=1e-12, atol=0.0)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_dropout_is_drawn_anew_for_every_update() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    support = tuple(x.unsqueeze(0) for x in SUPPORT)
    torch.manual_seed(8)
    one = compile_unroll(model, optim.lbfgs(lr=0.4, max_iter=3), 1, loss=F.mse_loss, per_step=True, backend="eager").adapt(support)
    torch.manual_seed(8)
    repeated = tuple(x.expand(3, *x.shape[1:]) for x in support)
    three = compile_unroll(model, optim.lbfgs(lr=0.4, max_iter=1), 3, loss=F.mse_loss, per_step=True, backend="eager").adapt(repeated)
    assert_near(one.params, three.params, torch.float64)
    assert three.losses[1].item() != three.losses[0].item()


def test_a_partition_makes_one_number_of_updates() -> None:
    with pytest.raises(InvalidArgument, match="equally many updates"):
        optim.partition({"a": optim.lbfgs(), "b": optim.sgd(lr=0.1)}, {})


@pytest.mark.parametrize("made_before", [0, 1, 3])
def test_lbfgs_goes_on_where_torch_stands(made_before: int) -> None:
    """20 updates from any state, the parameters in another order than the optimiser's, over the length of its history and beyond."""
    model = make_model()
    opt: Any = torch.optim.LBFGS(
        reversed(list(model.parameters())), lr=0.3, max_iter=4, history_size=3, tolerance_grad=0, tolerance_change=0
    )

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(SUPPORT[0]), SUPPORT[1])
        loss.backward()
        return loss

    for _ in range(made_before):
        opt.step(closure)
    adapted = compile_unroll(model, opt, 5, loss=F.mse_loss, adjoint=Replay(), backend="eager").adapt(SUPPORT)
    for _ in range(5):
        opt.step(closure)
    for key, p in model.named_parameters():
        torch.testing.assert_close(adapted.params[key], p, rtol=1e-12, atol=1e-14)
    if made_before:
        with pytest.raises(OptimizerMismatch, match="of which 2 adapt"):
            compile_unroll(model, opt, 1, loss=F.mse_loss, params="0.*", backend="eager").adapt(SUPPORT)


def test_lbfgs_in_half_precision() -> None:
    model = make_model().to(torch.bfloat16)
    support = tuple(x.to(torch.bfloat16) for x in SUPPORT)
    adapted = compile_unroll(model, optim.lbfgs(lr=0.3, max_iter=3), 1, loss=F.mse_loss, backend="eager").adapt(support)
    expected = compile_unroll(make_model(), optim.lbfgs(lr=0.3, max_iter=3), 1, loss=F.mse_loss, backend="eager").adapt(SUPPORT)
    for key, value in adapted.params.items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), expected.params[key].detach(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("settings", [{"line_search_fn": "strong_wolfe"}, {"tolerance_grad": 0}, {"tolerance_change": 0}], ids=str)
def test_lbfgs_that_may_stop_early_is_refused(settings: dict[str, Any]) -> None:
    model = make_model()
    with pytest.raises(UnsupportedOptimizer, match="tolerance_grad=0, tolerance_change=0 and line_search_fn=None"):
        compile_unroll(model, torch.optim.LBFGS(model.parameters(), **settings), 1)


# --- rates by parameter, by element and by step


@pytest.mark.parametrize("adjoint", [Replay(), Unrolled()], ids=["replay", "unrolled"])
def test_rates_by_layer_and_step(adjoint: Adjoint) -> None:
    """LSLR of MAML++, against a loop written out."""
    model = make_model()
    rates = {key: torch.linspace(0.05, 0.2, K).requires_grad_() for key, _ in model.named_parameters()}
    unroll = compile_unroll(model, optim.sgd(lr=optim.per_step(rates)), K, loss=F.mse_loss, adjoint=adjoint, backend="eager")
    params: dict[str, Tensor] = dict(model.named_parameters())
    for step in range(K):
        loss = F.mse_loss(torch.func.functional_call(model, params, SUPPORT[0]), SUPPORT[1])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {key: p - rates[key][step] * g for (key, p), g in zip(params.items(), grads, strict=True)}
    expected = F.mse_loss(torch.func.functional_call(model, params, QUERY[0]), QUERY[1])
    loss = unroll(SUPPORT, QUERY)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    wanted = [*rates.values(), *model.parameters()]
    for got, reference in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-14)
        assert bool((got != 0).all())


def test_a_new_rate_in_a_schedule_is_no_new_program() -> None:
    model = make_model()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.param_groups[0]["lr"] = optim.per_step([0.1, 0.2, 0.3])
    unroll = compile_unroll(model, opt, K, loss=F.mse_loss, backend="eager", on_new_shape="error").warmup(SUPPORT)
    first = unroll.adapt(SUPPORT).params["0.weight"]
    opt.param_groups[0]["lr"] = optim.per_step([0.3, 0.2, 0.1])
    second = unroll.adapt(SUPPORT).params["0.weight"]
    assert not torch.equal(first, second)
    opt.param_groups[0]["lr"] = optim.per_step(torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(unroll.adapt(SUPPORT).params["0.weight"], first, rtol=0.0, atol=0.0)


def test_a_schedule_goes_on_from_an_earlier_adaptation() -> None:
    model = make_model()
    opt = optim.sgd(lr=optim.per_step([0.1, 0.2, 0.3, 0.4]))
    two = compile_unroll(model, opt, 2, loss=F.mse_loss, backend="eager")
    four = compile_unroll(model, opt, 4, loss=F.mse_loss, backend="eager")
    assert_near(two.adapt(SUPPORT, start=two.adapt(SUPPORT)).params, four.adapt(SUPPORT).params, torch.float64)


# --- optimisers of the user's own


def test_ten_lines_make_an_optimizer() -> None:
    """Lion (Chen et al. 2023, arXiv 2302.06675)."""
    lr, beta = torch.tensor(0.05, requires_grad=True), torch.tensor(0.9, requires_grad=True)

    def init(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.zeros_like(p) for key, p in params.items()}

    def update(grads: Any, state: Any, params: Any, hyper: Any) -> Any:
        means = {key: hyper["beta"] * state[key] + (1 - hyper["beta"]) * g for key, g in grads.items()}
        return {key: p - hyper["lr"] * torch.tanh(10 * means[key]) for key, p in params.items()}, means

    model = make_model()
    unroll = compile_unroll(model, optim.Optimizer(init, update, {"lr": lr, "beta": beta}), K, loss=F.mse_loss, backend="eager")
    params: dict[str, Tensor] = dict(model.named_parameters())
    means = init(params)
    for _ in range(K):
        loss = F.mse_loss(torch.func.functional_call(model, params, SUPPORT[0]), SUPPORT[1])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        means = {key: beta * means[key] + (1 - beta) * g for key, g in zip(params, grads, strict=True)}
        params = {key: p - lr * torch.tanh(10 * means[key]) for key, p in params.items()}
    expected = F.mse_loss(torch.func.functional_call(model, params, QUERY[0]), QUERY[1])
    wanted = [lr, beta, *model.parameters()]
    found = torch.autograd.grad(unroll(SUPPORT, QUERY), wanted)
    for got, reference in zip(found, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-14)


def test_an_initial_state_that_reads_values() -> None:
    """Steps are pulled back to where the parameters were at the beginning: the state is a copy of them, and gradients flow through it."""
    pull = torch.tensor(0.3, requires_grad=True)

    def init(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: p.clone() for key, p in params.items()}

    def update(grads: Any, state: Any, params: Any, hyper: Any) -> Any:
        return {key: p - 0.2 * grads[key] + hyper["pull"] * (state[key] - p) for key, p in params.items()}, state

    model = make_model()
    unroll = compile_unroll(model, optim.Optimizer(init, update, {"pull": pull}), K, loss=F.mse_loss, backend="eager")
    wanted = [pull, *model.parameters()]
    for _ in range(2):
        params: dict[str, Tensor] = dict(model.named_parameters())
        start = init(params)
        for _ in range(K):
            loss = F.mse_loss(torch.func.functional_call(model, params, SUPPORT[0]), SUPPORT[1])
            grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))
            params = update(grads, start, params, {"pull": pull})[0]
        expected = F.mse_loss(torch.func.functional_call(model, params, QUERY[0]), QUERY[1])
        found = unroll(SUPPORT, QUERY)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
        for got, reference in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
            torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-14)
        with torch.no_grad():  # what the state starts from is read at every call
            for p in model.parameters():
                p.mul_(0.5)


@pytest.mark.parametrize(
    ("result", "message"),
    [(lambda grads: None, r"must return \(params, state\), got NoneType"), (lambda grads: ({}, ()), "must return all parameters")],
)
def test_an_update_that_returns_something_else(result: Callable[[Any], Any], message: str) -> None:
    opt = optim.Optimizer(lambda params: (), lambda grads, *_: result(grads))
    with pytest.raises(InvalidArgument, match=message):
        compile_unroll(make_model(), opt, 1, loss=F.mse_loss, backend="eager").adapt(SUPPORT)


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_updates_per_step_is_a_count(count: Any) -> None:
    with pytest.raises(InvalidArgument, match="updates_per_step must be an int of at least 1"):
        optim.Optimizer(lambda params: (), lambda grads, *_: (dict(grads), ()), updates_per_step=count)


class Recurrent(nn.Module):
    """A coordinate-wise LSTM."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2, 5)
        self.out = nn.Linear(5, 1)
        self.dropout = nn.Dropout(dropout)

    def initial_state(self, param: Tensor) -> tuple[Tensor, Tensor]:
        zeros = param.new_zeros(param.numel(), 5)
        return zeros, zeros.clone()

    def forward(self, grad: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inputs = torch.stack([grad.reshape(-1), torch.tanh(10 * grad.reshape(-1))], 1)
        h, c = self.cell(inputs, state)
        return 0.1 * self.out(self.dropout(h)).reshape(grad.shape), (h, c)


@pytest.mark.parametrize("adjoint", [Replay(), Unrolled()], ids=["replay", "unrolled"])
def test_a_module_as_optimizer(adjoint: Adjoint) -> None:
    model, rule = make_model(), Recurrent()
    unroll = compile_unroll(model, optim.learned(rule), K, loss=F.mse_loss, adjoint=adjoint, backend="eager")
    params: dict[str, Tensor] = dict(model.named_parameters())
    state = {key: rule.initial_state(p) for key, p in params.items()}
    for _ in range(K):
        loss = F.mse_loss(torch.func.functional_call(model, params, SUPPORT[0]), SUPPORT[1])
        for (key, p), g in zip(list(params.items()), torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True):
            step, state[key] = rule(g, state[key])
            params[key] = p + step
    expected = F.mse_loss(torch.func.functional_call(model, params, QUERY[0]), QUERY[1])
    wanted = [*rule.parameters(), *model.parameters()]
    reference = torch.autograd.grad(expected, wanted)
    unroll(SUPPORT, QUERY).backward()
    for leaf, grad in zip(wanted, reference, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-10, atol=1e-14)

    # Its parameters are read at every call, also those that have taken the place of others.
    with torch.no_grad():
        before = unroll(SUPPORT, QUERY)
        rule.out.bias.add_(1.0)
        changed = unroll(SUPPORT, QUERY)
        assert not torch.equal(changed, before)
        rule.out.bias = nn.Parameter(rule.out.bias - 1.0)
        torch.testing.assert_close(unroll(SUPPORT, QUERY), before)
    unroll(SUPPORT, QUERY).backward()
    assert rule.out.bias.grad is not None


def test_truncated_unrolls() -> None:
    """The gradient of a window is that of its own steps; what came before is a constant."""
    model, rule = make_model(), Recurrent()
    unroll = compile_unroll(model, optim.learned(rule), 2, loss=F.mse_loss, adjoint=Replay(), backend="eager")
    first = unroll.adapt(SUPPORT)
    assert first.losses.requires_grad and not first.detach().losses.requires_grad
    cut = unroll.adapt(SUPPORT, start=first.detach())
    whole = unroll.adapt(SUPPORT, start=first)
    assert_near(cut.params, whole.params, torch.float64)
    wanted = list(rule.parameters())
    of_window, of_all = (torch.autograd.grad(part.losses.sum(), wanted) for part in (cut, whole))
    with torch.no_grad():
        constant = unroll.adapt(SUPPORT)
    for got, expected in zip(of_window, torch.autograd.grad(unroll.adapt(SUPPORT, start=constant).losses.sum(), wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0.0)
    assert any(not torch.allclose(got, other) for got, other in zip(of_window, of_all, strict=True))


class Remembering(nn.Module):
    """Starts from a learned state, and counts its calls in a buffer if told to."""

    calls: Tensor

    def __init__(self, counts: str = "") -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor(0.3))
        self.counts = counts
        self.register_buffer("calls", torch.zeros(()))

    def initial_state(self, param: Tensor) -> Tensor:
        return self.first * torch.ones_like(param)

    def forward(self, grad: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        if self.counts == "in place":
            self.calls += 1
        if self.counts == "anew":
            self.calls = self.calls + 1
        mean = 0.5 * mean + grad
        return -0.1 * mean, mean


def test_a_learned_initial_state() -> None:
    model, rule = make_model(), Remembering()
    loss = compile_unroll(model, optim.learned(rule), K, loss=F.mse_loss, backend="eager")
    (found,) = torch.autograd.grad(loss(SUPPORT, QUERY), rule.first)

    def at(h: float) -> float:
        with torch.no_grad():
            rule.first.fill_(0.3 + h)
            return loss(SUPPORT, QUERY).item()

    assert found.item() == pytest.approx(difference(at), rel=1e-6) and found.item() != 0.0


@pytest.mark.parametrize("counts", ["in place", "anew"])
def test_a_rule_that_writes_to_a_buffer_is_refused(counts: str) -> None:
    unroll = compile_unroll(make_model(), optim.learned(Remembering(counts)), 1, loss=F.mse_loss, backend="eager")
    with pytest.raises(NotTraceable, match=r"Remembering writes to its buffer 'calls'"):
        unroll.adapt(SUPPORT)


def test_mode_and_buffers_of_a_rule_are_read_at_every_call() -> None:
    class Moody(Remembering):
        def forward(self, grad: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
            return -(0.1 if self.training else 0.2) * (1 + self.calls) * grad, mean

    model, rule = make_model(), Moody()
    unroll = compile_unroll(model, optim.chain(optim.clip_by_global_norm(10.0), optim.learned(rule)), 1, loss=F.mse_loss, backend="eager")

    def step() -> Tensor:
        return unroll.adapt(SUPPORT).params["0.bias"].detach() - model.get_parameter("0.bias").detach()

    first = step()
    rule.eval()
    torch.testing.assert_close(step(), 2 * first)
    rule.calls = torch.ones(())
    torch.testing.assert_close(step(), 4 * first)
    rule.train()
    torch.testing.assert_close(step(), 2 * first)


def test_a_rule_that_draws_random_numbers_is_refused() -> None:
    unroll = compile_unroll(make_model(), optim.learned(Recurrent(dropout=0.5)), 1, loss=F.mse_loss, adjoint=Replay(), backend="eager")
    with pytest.raises(UnsupportedRandomness):
        unroll.adapt(SUPPORT)
