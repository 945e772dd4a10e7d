"""`adaptrt.higher` beside the original: the same program under both, in float64, and what the original gets wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from adaptrt.errors import OptimizerMismatch
from adaptrt.optim.registry import REGISTERED, Registration
from tests.higher_cases import CASES, MODELS, STEPS, assert_same, batch, loss_of, make, ours, over_both, quietly, theirs

pytestmark = pytest.mark.usefixtures("double")


# --- the same program under both


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_parity(model: str, case: str, warm: bool) -> None:
    """Weights at every time, buffers, losses and meta-gradients, from a fresh or a used optimiser."""
    if warm and case == "asgd":
        pytest.skip("the original raises a tensor to a power by math.pow")

    def run(package: Any) -> list[Tensor]:
        net = make(model)
        opt = CASES[case].kind(net.parameters(), **CASES[case].settings)
        for step in range(2 if warm else 0):
            opt.zero_grad()
            loss_of(net, 10 + step).backward()
            opt.step()
        buffers = [b.clone() for b in net.buffers()]
        with package.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
            assert isinstance(fmodel, type(net))
            fmodel: Any = fmodel
            losses: list[Tensor] = []
            for step in range(STEPS):
                losses.append(loss_of(fmodel, 20 + step))
                diffopt.step(losses[-1])
            query = loss_of(fmodel, 30)
            grads = torch.autograd.grad(query + losses[-1], list(net.parameters()), allow_unused=True)
            by_time = [p.detach() for time in range(STEPS + 1) for p in fmodel.parameters(time=time)]
            assert all(torch.equal(now, before) for now, before in zip(net.buffers(), buffers, strict=True))
            own = [value for value in fmodel.state_dict().values() if value.is_floating_point()]
        return [*[loss.detach() for loss in losses], query.detach(), *grads, *by_time, *own]

    assert_same(run(ours), quietly(lambda: run(theirs)))


@pytest.mark.parametrize("case", ["momentum", "adam", "adagrad", "adamax"])
def test_override_by_group_and_in_a_step(case: str) -> None:
    def run(package: Any) -> list[Tensor]:
        net: Any = make("mlp")
        settings = {**CASES[case].settings}
        opt = CASES[case].kind([{"params": net[0].parameters()}, {"params": net[2].parameters(), "weight_decay": 0.2}], **settings)
        rates = [torch.tensor(0.1, requires_grad=True), torch.tensor(0.05, requires_grad=True)]
        decay, later = torch.tensor(0.3, requires_grad=True), torch.tensor(0.02, requires_grad=True)
        override = {"lr": rates, "weight_decay": [decay]}
        with package.innerloop_ctx(net, opt, copy_initial_weights=False, override=override) as (fmodel, diffopt):
            for step in range(STEPS):
                diffopt.step(loss_of(fmodel, step), override={"lr": [later]} if step == 2 else None)
            return list(torch.autograd.grad(loss_of(fmodel, 9), [*net.parameters(), *rates, decay, later]))

    assert_same(run(ours), quietly(lambda: run(theirs)))


def test_callbacks() -> None:
    def run(package: Any) -> list[Tensor]:
        net = make("mlp")
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        fmodel = package.monkeypatch(net, copy_initial_weights=False)
        diffopt = package.get_diff_optim(opt, net.parameters(), fmodel=fmodel, grad_callback=lambda grads: [0.5 * g for g in grads])
        seen: list[Any] = []

        def noting(grads: Any) -> Any:
            seen.append(grads)
            return [g.clamp(-0.1, 0.1) for g in grads]

        diffopt.step(loss_of(fmodel, 1))
        diffopt.step(loss_of(fmodel, 2), grad_callback=noting)
        assert len(seen) == 1 and isinstance(seen[0], tuple) and [g.shape for g in seen[0]] == [p.shape for p in net.parameters()]
        return list(torch.autograd.grad(loss_of(fmodel, 3), list(net.parameters())))

    assert_same(run(ours), quietly(lambda: run(theirs)))


def test_explicit_params_and_frozen_ones() -> None:
    def run(package: Any) -> list[Tensor]:
        net = make("mlp")
        next(net.parameters()).requires_grad_(False)
        fmodel = package.patch.make_functional(net)
        diffopt = package.create_diff_optim(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, params=list(net.parameters()))
        params = package.utils.get_func_params(net)
        start = [p for p in params if p.requires_grad]
        x, y = batch(1)
        for _ in range(3):
            params = list(diffopt.step(F.mse_loss(fmodel(x, params=params), y), params=params))
        return [*params, *torch.autograd.grad(F.mse_loss(fmodel(x, params=params), y), start)]

    assert_same([p.detach() for p in run(ours)], [p.detach() for p in quietly(lambda: run(theirs))])


@over_both
def test_without_tracking_there_is_one_slot(package: Any) -> None:
    net = make("mlp")
    with package.innerloop_ctx(net, torch.optim.Adam(net.parameters()), track_higher_grads=False) as (fmodel, diffopt):
        for step in range(3):
            diffopt.step(loss_of(fmodel, step))
        assert all(p.grad_fn is None and p.requires_grad for p in fmodel.parameters())
        assert len(list(fmodel.parameters(time=0))) == 4
        with pytest.raises(ValueError):
            fmodel.parameters(time=1)
        with pytest.raises(Exception, match=r"(?i)track"):
            _ = fmodel.init_fast_params


@over_both
def test_copied_weights_get_no_gradient(package: Any) -> None:
    net = make("mlp")
    with package.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel, 1))
        loss_of(fmodel, 2).backward()
        assert all(p.grad is None for p in net.parameters())
        assert all(p.grad is not None for p in fmodel.parameters(time=0))


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2))
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) * self.scale


def test_assignment_to_a_parameter_and_to_fast_params() -> None:
    def run(package: Any) -> list[Tensor]:
        torch.manual_seed(1)
        net = Rooted()
        fmodel = package.monkeypatch(net, copy_initial_weights=False)
        fmodel.scale = fmodel.scale * 2
        out = fmodel(batch(1)[0]).sum()
        fmodel.update_params([p * 1.5 for p in fmodel.fast_params])
        out = out + fmodel(batch(2)[0]).sum()
        times = [p.detach() for time in range(3) for p in fmodel.parameters(time=time)]
        return [out.detach(), *torch.autograd.grad(out, list(net.parameters())), *times]

    assert_same(run(ours), quietly(lambda: run(theirs)))


def test_assignment_to_a_parameter_of_a_submodule() -> None:
    """Which the original cannot do: only its root has `update_params`. A weight that two modules share is replaced in both."""
    net: Any = make("shared")
    fmodel = ours.monkeypatch(net, copy_initial_weights=False)
    fmodel.tied.weight = fmodel.tied.weight * 2
    assert fmodel.first.weight is fmodel.tied.weight
    x = batch(1)[0]
    found = fmodel(x)
    with torch.no_grad():
        net.first.weight.mul_(2)
    torch.testing.assert_close(found, net(x), rtol=1e-14, atol=0.0)
    with pytest.raises(TypeError, match="must be a tensor"):
        fmodel.tied.bias = 1.0


def test_submodules_are_called_alone() -> None:
    """Also where one is empty, at which the original fails."""
    net: Any = nn.Sequential(nn.Sequential(), nn.Sequential(nn.Linear(3, 4), nn.Sequential()))
    fmodel = ours.monkeypatch(net, copy_initial_weights=False)
    fmodel.update_params([2 * p for p in fmodel.fast_params])
    x = batch(1)[0]
    torch.testing.assert_close(fmodel[1](fmodel[0](x)), 2 * net(x), rtol=1e-14, atol=0.0)


def test_trainable_numbers() -> None:
    net = make("mlp")
    opt = torch.optim.Adam([{"params": list(net.parameters())[:2]}, {"params": list(net.parameters())[2:], "lr": 0.3}], lr=0.1)
    override = ours.optim.get_trainable_opt_params(opt)
    wanted = quietly(lambda: theirs.optim.get_trainable_opt_params(opt))
    flags = {"amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}
    assert set(override) == set(wanted) - flags  # the original makes numbers of flags
    for key, values in override.items():
        assert [torch.stack(ours.utils.flatten(v)).tolist() for v in values] == [
            torch.stack(theirs.utils.flatten(v)).tolist() for v in wanted[key]
        ]
    with torch.no_grad():
        override["lr"][0].fill_(0.7)
        override["betas"][1][1].fill_(0.8)
    ours.optim.apply_trainable_opt_params(opt, override)
    assert opt.param_groups[0]["lr"] == 0.7 and opt.param_groups[1]["betas"] == (0.9, 0.8)
    assert isinstance(opt.param_groups[0]["lr"], float)


# --- what the original gets wrong, or refuses


def plain(net: nn.Module, opt: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """The weights after steps of the real optimiser."""
    for step in range(steps):
        opt.zero_grad()
        loss_of(net, step).backward()
        opt.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adafactor])
def test_weights_are_those_of_torch_optim(kind: Any) -> None:
    net = make("mlp")
    opt = kind(net.parameters(), lr=0.1)
    with ours.innerloop_ctx(net, opt) as (fmodel, diffopt):
        for step in range(STEPS):
            diffopt.step(loss_of(fmodel, step))
        assert_same([p.detach() for p in fmodel.parameters()], plain(net, opt, STEPS), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_state_is_written_back(case: str) -> None:
    """The real optimiser goes on where the differentiable one stands."""
    net = make("mlp")
    settings = CASES[case].settings
    reference, kept = copy.deepcopy(net), copy.deepcopy(net)
    whole = plain(reference, CASES[case].kind(reference.parameters(), **settings), 5)
    opt = CASES[case].kind(kept.parameters(), **settings)
    with ours.innerloop_ctx(kept, opt) as (fmodel, diffopt):
        for step in range(3):
            diffopt.step(loss_of(fmodel, step))
        kept.load_state_dict(fmodel.state_dict())
        diffopt.write_state(opt)
    for step in range(3, 5):
        opt.zero_grad()
        loss_of(kept, step).backward()
        opt.step()
    assert_same([p.detach() for p in kept.parameters()], whole, 1e-12)


def test_schedulers_step_inside_the_loop() -> None:
    net = make("mlp")
    opt = torch.optim.SGD(net.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step()  # a scheduler asks for one before it
    with ours.innerloop_ctx(net, opt) as (fmodel, diffopt):
        rates: list[float] = []
        for step in range(3):
            before = [p.detach().clone() for p in fmodel.parameters()]
            loss = loss_of(fmodel, step)
            grads = torch.autograd.grad(loss, list(fmodel.parameters()), retain_graph=True)
            diffopt.step(loss)
            rates.append(float(((before[0] - next(iter(fmodel.parameters())).detach()) / grads[0]).median()))
            scheduler.step()
    assert rates == pytest.approx([0.4, 0.2, 0.1])


@pytest.mark.parametrize("package", [theirs, ours], ids=["theirs", "ours"])
def test_masked_gradients(package: Any) -> None:
    """Where the mask is true a gradient is zero, and so is the gradient of that."""
    mask = torch.tensor([True, False, False])
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = x * 1.0
    y.register_hook(package.optim._get_mask_closure(mask))
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    assert_same([grad.detach()], [torch.tensor([0.0, 12.0, 27.0])])
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert_same([second], [torch.tensor([0.0, 12.0, 18.0])])


def test_first_order() -> None:
    net = make("mlp")
    with ours.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1), copy_initial_weights=False, first_order=True) as (
        fmodel,
        diffopt,
    ):
        for step in range(3):
            diffopt.step(loss_of(fmodel, step))
        loss = loss_of(fmodel, 9)
        found = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        assert_same(found, torch.autograd.grad(loss, list(fmodel.parameters())), 1e-14)


class Checkpointed(nn.Module):
    """Keeps no activations of its hidden layers."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)
        return self.last(hidden)


@pytest.mark.parametrize("wrap", [None, nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["plain", "norm", "norm by hook"])
def test_checkpointing(wrap: Any) -> None:
    """Activations computed again on the way back are those of the weights of that time, also where a weight norm makes the weights."""

    def run(on: bool) -> list[Tensor]:
        torch.manual_seed(1)
        net = Checkpointed(on)
        if wrap is not None:
            quietly(lambda: [wrap(net.body[0]), wrap(net.body[2], dim=1)])
        with ours.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.5), copy_initial_weights=False) as (fmodel, diffopt):
            for step in range(3):
                diffopt.step(loss_of(fmodel, step))
            return list(torch.autograd.grad(loss_of(fmodel, 9), list(net.parameters())))

    assert_same(run(True), run(False), 1e-12)


def test_hooks_and_what_forward_leaves_behind() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            self.seen = input
            return super().forward(input)

    net = nn.Sequential(nn.utils.parametrizations.weight_norm(Counting(3, 2)))
    seen: list[Any] = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    fmodel = ours.monkeypatch(net)
    x = batch(1)[0]
    out = fmodel(x)
    assert seen == [out] or torch.equal(seen[0], out)
    fmodel(x)
    first: Any = fmodel[0]
    assert first.calls == 2 and first.seen is x and net[0].calls == 0
    torch.testing.assert_close(out, net(x))


@pytest.mark.parametrize(
    ("kind", "settings", "key", "values"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, "momentum", (0.9, 0.9, 0.0, 0.0, 0.9)),
        (torch.optim.SGD, {"momentum": 0.0, "dampening": 0.5}, "momentum", (0.0, 0.9, 0.9, 0.0, 0.9)),
        (torch.optim.Adam, {"amsgrad": True}, "amsgrad", (True, True, False, False, True)),
        (torch.optim.RMSprop, {"centered": True}, "centered", (True, False, False, True, True)),
    ],
)
@pytest.mark.parametrize("by_override", [False, True], ids=["in the group", "by override"])
def test_terms_are_turned_off_and_on(kind: Any, settings: dict[str, Any], key: str, values: tuple[Any, ...], by_override: bool) -> None:
    """State of a term that is off waits, as with the real optimiser."""
    net, real = make("mlp"), make("mlp")
    opt, real_opt = kind(net.parameters(), lr=0.05, **settings), kind(real.parameters(), lr=0.05, **settings)
    with ours.innerloop_ctx(net, opt) as (fmodel, diffopt):
        for step, value in enumerate(values):
            if not by_override:
                opt.param_groups[0][key] = value
            diffopt.step(loss_of(fmodel, step), override={key: [value]} if by_override else None)
            real_opt.param_groups[0][key] = value
            real_opt.zero_grad()
            loss_of(real, step).backward()
            real_opt.step()
        assert_same([p.detach() for p in fmodel.parameters()], [p.detach() for p in real.parameters()], 1e-12)
    opt = torch.optim.Adam(net.parameters())
    with ours.innerloop_ctx(net, opt) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel, 0))
        with pytest.raises(OptimizerMismatch, match="no 'max_exp_avg_sq'"):
            diffopt.step(loss_of(fmodel, 1), override={"amsgrad": [True]})


def test_numbers_in_a_list_may_be_replaced_in_place() -> None:
    def run(package: Any, betas: Any) -> list[Tensor]:
        net = make("mlp")
        with package.innerloop_ctx(net, torch.optim.Adam(net.parameters(), lr=0.1, eps=1e-30)) as (fmodel, diffopt):
            diffopt.param_groups[0]["betas"] = betas
            diffopt.step(loss_of(fmodel, 0))
            betas[0] = 0.1
            diffopt.step(loss_of(fmodel, 1))
            return [p.detach() for p in fmodel.parameters()]

    assert_same(run(ours, [0.9, 0.99]), quietly(lambda: run(theirs, [0.9, 0.99])))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adadelta, torch.optim.NAdam, torch.optim.Adamax])
def test_gradients_may_be_of_a_wider_type(kind: Any) -> None:
    net = make("mlp").float()
    x, y = (value.float() for value in batch(1))
    found: list[list[Tensor]] = []
    for callback in (lambda grads: [g.double() for g in grads], None):
        with ours.innerloop_ctx(net, kind(net.parameters(), lr=0.01)) as (fmodel, diffopt):
            diffopt.step(F.mse_loss(fmodel(x), y), grad_callback=callback)
            found.append([p.detach() for p in fmodel.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_versions_of_torch_optim_are_ordinary_classes() -> None:
    """They are made from a table: names, module, docstring, and what pickle needs."""
    for name in [
        "SGD",
        "Adam",
        "AdamW",
        "Adadelta",
        "Adagrad",
        "Adamax",
        "ASGD",
        "RMSprop",
        "Rprop",
        "NAdam",
        "RAdam",
        "Adafactor",
        "Muon",
    ]:
        version: Any = getattr(ours.optim, f"Differentiable{name}")
        assert version.__name__ == version.__qualname__ == f"Differentiable{name}"
        assert version.__module__ == "adaptrt.higher.optim" and f"`adaptrt.optim.{name.lower()}`" in version.__doc__
        assert pickle.loads(pickle.dumps(version)) is version
        assert version.kind is getattr(torch.optim, name) and issubclass(version, ours.optim.DifferentiableOptimizer)


class Differentiating(ours.optim.DifferentiableOptimizer):
    """Its step needs a derivative of its own."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                curve = torch.autograd.grad((g * p.sin()).sum(), p)[0]
                self.state[i][j]["curve"] = curve + 0 * p
                group["params"][j] = p - group["lr"] * curve


class Curved(torch.optim.SGD): ...


def test_an_update_may_differentiate_without_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTERED, Curved, Registration(Differentiating))
    net = make("mlp")
    with ours.innerloop_ctx(net, Curved(net.parameters(), lr=0.1), track_higher_grads=False) as (fmodel, diffopt):
        before = [p.detach() for p in fmodel.parameters()]
        diffopt.step(loss_of(fmodel, 0))
        assert all(not torch.equal(a, b) for a, b in zip(before, fmodel.parameters(), strict=True))
        assert all(
            p.is_leaf and not entry["curve"].requires_grad for p, entry in zip(fmodel.parameters(), diffopt.state[0].values(), strict=True)
        )


class Attentive(nn.Module):
    """PyTorch's layer, and its function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.heads = nn.Linear(4, 12)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.reshape(2, 3, 3) @ torch.eye(3, 4, device=x.device))
        q, k, v = self.heads(h).unsqueeze(1).chunk(3, -1)
        return self.last(F.scaled_dot_product_attention(q, k, v).reshape(6, 4))


def second_order(package: Any, net: nn.Module, device: str = "cpu") -> list[Tensor]:
    net = net.to(device)
    x, y = (value.to(device) for value in batch(1))
    with package.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1), copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(F.mse_loss(fmodel(x), y))
        return list(torch.autograd.grad(F.mse_loss(fmodel(x), y), list(net.parameters())))


def test_attention_needs_no_flags() -> None:
    torch.manual_seed(1)
    net = Attentive()
    found = second_order(ours, net)
    with pytest.raises(RuntimeError, match="not implemented"):
        quietly(lambda: second_order(theirs, net))
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(found, quietly(lambda: second_order(theirs, net)))
    assert torch.backends.cuda.flash_sdp_enabled()


def test_recurrent_networks_run_without_cudnn_where_a_gradient_may_be_differentiated() -> None:
    """On any device: a handle's weights may be elsewhere than the model's."""
    seen: list[bool] = []

    class Noting(nn.LSTM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(*args, **kwargs)

    fmodel = ours.monkeypatch(Noting(3, 2))
    x = torch.randn(4, 1, 3)
    fmodel(x)
    with torch.no_grad():
        fmodel(x)
    fmodel.track_higher_grads = False
    fmodel(x)
    assert seen == [False, True, True]
    assert torch.backends.cudnn.enabled


@pytest.mark.cuda
def test_recurrent_networks_need_no_flags() -> None:
    torch.manual_seed(1)
    net = make("lstm")
    wanted = second_order(ours, net)
    assert_same([grad.cpu() for grad in second_order(ours, net, "cuda")], wanted)
    assert torch.backends.cudnn.enabled


def after_real_steps(kind: Any, settings: dict[str, Any], start: Sequence[Tensor], steps: int = 3) -> float:
    """The query loss after steps of the real optimiser from these weights."""
    net = make("mlp")
    with torch.no_grad():
        for p, value in zip(net.parameters(), start, strict=True):
            p.copy_(value)
    plain(net, kind(net.parameters(), **settings), steps)
    return float(loss_of(net, 9).detach())


COMPLETE: dict[str, tuple[Any, dict[str, Any], str, int | None]] = {
    "adam beta1": (torch.optim.Adam, {"lr": 0.1, "betas": (0.6, 0.7), "eps": 0.01}, "betas", 0),
    "adam beta2": (torch.optim.Adam, {"lr": 0.1, "betas": (0.6, 0.7), "eps": 0.01}, "betas", 1),
    "adamax beta2": (torch.optim.Adamax, {"lr": 0.1, "betas": (0.6, 0.7), "eps": 0.01}, "betas", 1),
    "rmsprop alpha": (torch.optim.RMSprop, {"lr": 0.05, "alpha": 0.7, "eps": 0.01, "centered": True, "momentum": 0.3}, "alpha", None),
    "rprop eta plus": (torch.optim.Rprop, {"lr": 0.01, "etas": (0.4, 1.3)}, "etas", 1),
    "asgd lambd": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.2}, "lambd", None),
    "adagrad lr_decay": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.2}, "lr_decay", None),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_gradients_and_hypergradients_are_those_of_the_real_optimiser(name: str) -> None:
    """Against finite differences of it."""
    kind, settings, key, position = COMPLETE[name]
    net = make("mlp")
    start = [p.detach().clone() for p in net.parameters()]
    number = settings[key] if position is None else settings[key][position]
    learned = torch.tensor(number, requires_grad=True)

    def with_number(value: Any) -> Any:
        return value if position is None else tuple(value if i == position else old for i, old in enumerate(settings[key]))

    opt = kind(net.parameters(), **settings)
    with ours.innerloop_ctx(net, opt, copy_initial_weights=False, override={key: [with_number(learned)]}) as (fmodel, diffopt):
        for step in range(3):
            diffopt.step(loss_of(fmodel, step))
        loss = loss_of(fmodel, 9)
        found = torch.autograd.grad(loss, [learned, *net.parameters()])
    assert float(loss.detach()) == pytest.approx(after_real_steps(kind, settings, start), rel=1e-12)
    h = 1e-6
    of_number = [after_real_steps(kind, {**settings, key: with_number(number + sign * h)}, start) for sign in (1, -1)]
    assert float(found[0]) == pytest.approx((of_number[0] - of_number[1]) / (2 * h), rel=1e-5)
    assert abs(float(found[0])) > 1e-6
    directions = [torch.randn_like(p) for p in start]
    moved = [after_real_steps(kind, settings, [p + sign * h * d for p, d in zip(start, directions, strict=True)]) for sign in (1, -1)]
    along = sum(float((g * d).sum()) for g, d in zip(found[1:], directions, strict=True))
    assert along == pytest.approx((moved[0] - moved[1]) / (2 * h), rel=1e-5)


def test_the_original_leaves_part_of_a_hypergradient_out() -> None:
    """That of Adam's beta2, whose bias correction goes through `math.sqrt`. Weights and losses are the same."""

    def run(package: Any) -> tuple[Tensor, Tensor]:
        net = make("mlp")
        beta2 = torch.tensor(0.7, requires_grad=True)
        opt = torch.optim.Adam(net.parameters(), lr=0.1, eps=1e-30)
        with package.innerloop_ctx(net, opt, override={"betas": [(0.6, beta2)]}) as (fmodel, diffopt):
            for step in range(3):
                diffopt.step(loss_of(fmodel, step))
            loss = loss_of(fmodel, 9)
            return loss.detach(), torch.autograd.grad(loss, beta2)[0]

    mine, original = run(ours), quietly(lambda: run(theirs))
    assert_same(mine[:1], original[:1])
    assert abs(float(mine[1] / original[1]) - 1) > 0.01


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"foreach": True, "maximize": True}),
        (torch.optim.Adam, {"capturable": True, "differentiable": True, "maximize": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.RMSprop, {"foreach": False, "capturable": True, "maximize": True}),
        (torch.optim.Rprop, {"maximize": True}),
    ],
)
def test_flags_of_newer_versions(kind: Any, settings: dict[str, Any]) -> None:
    """`maximize` ascends; the others choose an implementation."""
    net, real = make("mlp"), make("mlp")
    of_real = {key: value for key, value in settings.items() if key == "maximize"}
    with ours.innerloop_ctx(net, kind(net.parameters(), lr=0.01, **settings)) as (fmodel, diffopt):
        for step in range(STEPS):
            diffopt.step(loss_of(fmodel, step))
        wanted = plain(real, kind(real.parameters(), lr=0.01, **of_real), STEPS)
        assert_same([p.detach() for p in fmodel.parameters()], wanted, 1e-12)


def test_buffers_of_a_module_used_twice_stay_one() -> None:
    norm = nn.BatchNorm1d(3)
    net: Any = nn.Sequential(norm, nn.Sequential(norm), nn.Linear(3, 2))
    fmodel = ours.monkeypatch(net)
    fmodel(batch(1)[0])
    assert fmodel[0].running_mean is fmodel[1][0].running_mean and fmodel[0].num_batches_tracked == 2
    assert norm.num_batches_tracked == 0
