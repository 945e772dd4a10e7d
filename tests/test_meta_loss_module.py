"""`unroll.module()`: its parameters, that its call is the unroll's, and what it refuses; in several processes in test_distributed.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import Adjoint, Truncated, Unrolled, compile_unroll, optim
from adaptrt.errors import CannotBePickled, InvalidArgument
from adaptrt.runtime.module import MetaLoss

pytestmark = pytest.mark.usefixtures("double")

K, T = 2, 3
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """With a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 2)
        self.spare = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Weighted(nn.Module):
    """A learned loss."""

    def __init__(self, scale: nn.Parameter | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2)) if scale is None else scale

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (self.scale * (output - target) ** 2).mean()


class Rule(nn.Module):
    """A learned optimiser, whose initial state is learned, too."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate, self.first = nn.Parameter(torch.tensor(-2.0)), nn.Parameter(torch.tensor(0.1))

    def initial_state(self, param: Tensor) -> Tensor:
        return self.first.expand_as(param)

    def forward(self, grad: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        mean = 0.5 * mean + 0.5 * grad
        return -self.log_rate.exp() * mean, mean


def rate(value: float = 0.1) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def batch(*lead: int) -> Batch:
    return torch.randn(*lead, 6, 3), torch.randn(*lead, 6, 2)


def make(opt: Any = None, model: nn.Module | None = None, **options: Any) -> Any:
    options = {"loss": F.mse_loss, "backend": "eager", **options}
    return compile_unroll(Net() if model is None else model, optim.sgd(lr=0.1) if opt is None else opt, K, **options)


def names(module: nn.Module) -> set[str]:
    """Of its parameters, without the model's."""
    return {name for name, _ in module.named_parameters() if not name.startswith("model.")}


# --- which parameters it has


def test_parameters_of_model_losses_and_optimiser() -> None:
    model, loss, query_loss, rule = Net(), Weighted(), Weighted(), Rule()
    module = make(optim.learned(rule), model, loss=loss, query_loss=query_loss).module()
    assert names(module) == {"loss.scale", "query_loss.scale", "optimizer.0.log_rate", "optimizer.0.first"}
    held = {id(value) for part in (model, loss, query_loss, rule) for value in part.parameters()}
    assert {id(value) for value in module.parameters()} == held
    assert module.model is model and {name for name, _ in module.named_buffers()} == {f"model.{name}" for name, _ in model.named_buffers()}


@pytest.mark.parametrize(
    ("opt", "found"),
    [
        (lambda model: optim.adam(lr=rate()), {"hyper.lr"}),
        (lambda model: optim.sgd(lr={name: rate() for name in dict(model.named_parameters())}), None),
        (lambda model: optim.sgd(lr=optim.schedule(lambda step, half: half * 0.9**step, half=rate())), {"hyper.lr_numbers_half"}),
        (lambda model: torch.optim.SGD(model.parameters(), lr=rate()), {"hyper.lr"}),
        (
            lambda model: torch.optim.SGD(
                [{"params": [*model.body.parameters()], "lr": rate()}, {"params": [*model.head.parameters()]}], lr=rate(0.2)
            ),
            {"hyper.0_lr", "hyper.1_lr"},
        ),
    ],
    ids=["pure", "by parameter", "schedule", "torch.optim", "groups"],
)
def test_learned_hyperparameters(opt: Callable[[Any], Any], found: set[str] | None) -> None:
    model = Net()
    module = make(opt(model), model).module()
    if found is None:
        found = {f"hyper.lr_{name.replace('.', '_')}" for name, _ in model.named_parameters()}
    assert names(module) == found
    module(batch(), batch()).backward()
    assert all(value.grad is not None for value in module.parameters())


def test_names_that_a_module_has_already_are_changed() -> None:
    numbers = {"half": rate(), "a": {"b": rate()}, "a_b": rate()}
    schedule = optim.schedule(lambda step, half, a, a_b: half + a["b"] + a_b, **numbers)
    module = make(optim.Optimizer(lambda params: (), optim.sgd(lr=0.1).update, {"lr": schedule, "half": rate(), "training": rate()})).module
    found = names(module())
    assert len(found) == 5 and {"hyper.half_", "hyper.training_", "hyper.lr_numbers_half"} <= found


def test_a_tensor_in_several_places_is_one_parameter() -> None:
    model, lr = Net(), rate()
    model.register_parameter("lr", lr)
    shared = nn.Parameter(torch.ones(2))
    model.register_parameter("scale", shared)
    module = make(optim.sgd(lr=lr), model, loss=Weighted(shared), params="head.*").module()
    assert names(module) == set()
    assert len([*module.parameters()]) == len([*model.parameters()])
    assert {"model.scale", "loss.scale"} <= module.state_dict().keys()


def test_modes_and_frozen_parameters() -> None:
    model = Net().eval()
    model.spare.requires_grad_(False)
    unroll = make(None, model)
    module = unroll.module()
    assert not module.training
    data = batch()
    evaluated = module(data, data)
    module.train()
    assert model.training and not torch.equal(module(data, data), evaluated)
    module.eval()
    assert torch.equal(module(data, data), evaluated)


# --- what it computes


OPTIONS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "plain": lambda unroll, data: {},
    "by task": lambda unroll, data: {"reduction": "none"},
    "every step": lambda unroll, data: {"every_step": True},
    "weighted": lambda unroll, data: {"step_weights": torch.tensor([0.3, 0.7])},
    "start": lambda unroll, data: {"start": unroll.adapt(data).detach()},
    "generator": lambda unroll, data: {"generator": torch.Generator().manual_seed(3)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("adjoint", "tasks"), [(Unrolled(), False), (Truncated(1), True)], ids=["one task", "truncated, vmap"])
def test_a_call_is_the_unrolls_and_every_parameter_gets_a_gradient(adjoint: Adjoint, name: str, tasks: bool) -> None:
    """Also where autograd knows of no way from the loss to a parameter: `DistributedDataParallel` waits for each of them."""
    lr = rate()
    unroll = make(optim.sgd(lr=lr, momentum=0.5), loss=Weighted(), adjoint=adjoint)
    unroll = unroll.vmap() if tasks else unroll
    module = unroll.module()
    support, query = (batch(T), batch(T)) if tasks else (batch(), batch())
    options = OPTIONS[name](unroll, support)
    params = dict(module.named_parameters())

    found = module(support, query, **options)
    grads = torch.autograd.grad(found.sum(), [*params.values()])
    wanted = unroll(support, query, **(OPTIONS["generator"](unroll, support) if name == "generator" else options))
    assert torch.equal(found, wanted)
    expected = torch.autograd.grad(wanted.sum(), [*params.values()], allow_unused=True)
    for grad, other in zip(grads, expected, strict=True):
        assert torch.equal(grad, torch.zeros_like(grad) if other is None else other)
    with torch.no_grad():
        assert not module(support, query, **options).requires_grad


def test_a_start_that_depends_on_the_parameters() -> None:
    """The zeros of parameters that are not read are added to the gradients that come through the start."""
    unroll = make()
    module, data = unroll.module(), batch()
    weight = module.model.head.weight
    (grad,) = torch.autograd.grad(module(data, data, start=unroll.start()), weight)
    (wanted,) = torch.autograd.grad(unroll(data, data), weight)
    torch.testing.assert_close(grad, wanted, rtol=0.0, atol=1e-14)
    assert grad.abs().max() > 0


def test_step_weights_that_are_learned() -> None:
    module, data = make().module(), batch()
    module.step_weights = nn.Parameter(torch.tensor([0.5, 0.5]))
    module(data, data, step_weights=module.step_weights).backward()
    assert module.step_weights.grad is not None and module.step_weights.grad.abs().min() > 0
    module.zero_grad()
    module(data, data).backward()
    assert torch.equal(module.step_weights.grad, torch.zeros(2))
    logits = torch.zeros(2, requires_grad=True)
    module(data, data, step_weights=logits.softmax(0)).backward()  # what they are computed from is the caller's
    assert logits.grad is not None


def test_a_loaded_state_is_what_the_unroll_uses() -> None:
    torch.manual_seed(1)
    first, second = (make(optim.sgd(lr=rate(value)), loss=Weighted()) for value in (0.1, 0.3))
    data = batch()
    one, other = first.module(), second.module()
    assert not torch.equal(first(data, data), second(data, data))
    other.load_state_dict(one.state_dict())
    assert torch.equal(first(data, data), second(data, data))
    with pytest.raises(RuntimeError, match=r"hyper\.lr"):
        make(loss=Weighted()).module().load_state_dict(one.state_dict())


def test_other_dtypes() -> None:
    module = make(optim.sgd(lr=rate()), loss=Weighted()).module()
    module.float()
    data = tuple(value.float() for value in batch())
    module(data, data).backward()
    assert {value.grad.dtype for value in module.parameters()} == {torch.float32}


def gradients(module: nn.Module, data: Any) -> Mapping[str, Tensor]:
    return dict(zip(dict(module.named_parameters()), torch.autograd.grad(module(data, data), [*module.parameters()]), strict=True))


@pytest.mark.parametrize("tasks", [False, True], ids=["one task", "vmap"])
def test_a_deep_copy_is_of_its_own(tasks: bool) -> None:
    unroll = make(optim.proximal(optim.sgd(lr=rate()), strength=0.5), loss=Weighted())
    module: MetaLoss = (unroll.vmap() if tasks else unroll).module()
    data = batch(T) if tasks else batch()
    twin = copy.deepcopy(module)
    assert not {id(value) for value in module.parameters()} & {id(value) for value in twin.parameters()}
    before = gradients(module, data)
    assert {name: value.tolist() for name, value in gradients(twin, data).items()} == {k: v.tolist() for k, v in before.items()}
    with torch.no_grad():
        for value in twin.parameters():
            value += 0.1
    assert all(torch.equal(value, before[name]) for name, value in gradients(module, data).items())
    changed = gradients(twin, data)
    assert not torch.equal(changed["model.head.weight"], before["model.head.weight"])
    assert all(not torch.equal(changed[name], before[name]) for name in names(module))
    assert len(names(module)) == 2


def test_pickling_is_refused() -> None:
    with pytest.raises(CannotBePickled, match="state_dict"):
        pickle.dumps(make().module())


def test_its_text_names_the_unroll() -> None:
    assert "CompiledUnroll(Net, k=2" in repr(make().module())


# --- what it refuses


def test_a_hyperparameter_must_be_a_parameter() -> None:
    with pytest.raises(InvalidArgument, match=r"'lr' requires grad and is a plain tensor.*make it an nn\.Parameter"):
        make(optim.sgd(lr=torch.tensor(0.1, requires_grad=True))).module()
    log_lr = nn.Parameter(torch.tensor(-2.0))
    with pytest.raises(InvalidArgument, match=r"'lr' requires grad and is computed from other tensors.*schedule"):
        make(optim.sgd(lr=log_lr.exp())).module()
    module = make(optim.sgd(lr=optim.schedule(lambda step, log_lr: log_lr.exp(), log_lr=log_lr))).module()  # as the message says
    data = batch()
    module(data, data).backward()
    assert log_lr.grad is not None and log_lr.grad.abs() > 0
    model = Net()
    with pytest.raises(InvalidArgument, match=r"pass a 0-dim nn\.Parameter itself"):  # of another shape, only a view of it is read
        make(torch.optim.SGD(model.parameters(), lr=nn.Parameter(torch.tensor([0.1]))), model).module()


def test_a_hyperparameter_that_is_replaced() -> None:
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=rate())
    unroll, data = make(opt, model), batch()
    module = unroll.module()
    opt.param_groups[0]["lr"] = rate(0.2)
    with pytest.raises(InvalidArgument, match=r"'lr' requires grad and is another tensor than the one in the module.*unroll\.module\(\)"):
        module(data, data)
    with torch.no_grad():
        assert torch.equal(module(data, data), unroll(data, data))
    unroll.module()(data, data)
    opt.param_groups[0]["lr"] = 0.2
    module(data, data)


def test_a_buffer_that_requires_grad() -> None:
    model = Net()
    model.register_buffer("shift", torch.zeros(2))
    module, data = make(None, model).module(), batch()
    module(data, data)
    model.shift.requires_grad_(True)
    for call in (lambda: module(data, data), make(None, model).module):
        with pytest.raises(InvalidArgument, match=r"buffer 'model\.shift' requires grad.*make it an nn\.Parameter"):
            call()


def test_step_weights_that_are_not_registered() -> None:
    module, data = make().module(), batch()
    with pytest.raises(InvalidArgument, match=r"step_weights requires grad.*module\.step_weights = nn\.Parameter"):
        module(data, data, step_weights=torch.ones(K, requires_grad=True))
