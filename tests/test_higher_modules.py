"""Unusual modules and uses of a handle: trained by `adaptrt.higher` as the real optimiser trains the module itself."""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.utils.checkpoint import checkpoint

from tests import naive
from tests.higher_cases import assert_same, batch, make, ours, over_both, quietly, theirs

pytestmark = pytest.mark.usefixtures("double")

STEPS = 3
X, Y = (data.double() for data in batch(1))


def call(model: Any, x: Tensor) -> Tensor:
    return model(x)


def loss_of(model: Any, use: Callable[[Any, Tensor], Tensor]) -> Tensor:
    return F.mse_loss(use(model, X), Y)


def trained(net: nn.Module, use: Callable[[Any, Tensor], Tensor] = call) -> list[Tensor]:
    """The weights, and the loss, after steps of the real optimiser on the module itself."""
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(STEPS):
        opt.zero_grad()
        loss_of(net, use).backward()
        opt.step()
    return [*[p.detach() for p in net.parameters()], loss_of(net, use).detach()]


def adapted(package: Any, net: nn.Module, use: Callable[[Any, Tensor], Tensor] = call) -> tuple[list[Tensor], list[Tensor]]:
    """The same by a handle; and the meta-gradients."""
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with package.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(loss_of(fmodel, use))
        query = loss_of(fmodel, use)
        grads = torch.autograd.grad(query, list(net.parameters()), materialize_grads=True)
        return [*[p.detach() for p in fmodel.parameters()], query.detach()], list(grads)


class Using(nn.Module):
    def __init__(self, inner: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.use = inner, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.inner, x)


def by_hand(net: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
    """Meta-gradients without the library: other parameters are put into the module itself while it runs."""
    whole = Using(net, use)
    start = dict(whole.named_parameters())
    params = {name: p.clone() for name, p in start.items()}

    def loss() -> Tensor:
        with naive.WeightNorm():
            return F.mse_loss(torch.func.functional_call(whole, params, (X,)), Y)

    for _ in range(STEPS):
        grads = torch.autograd.grad(loss(), list(params.values()), create_graph=True, materialize_grads=True)
        params = {name: p - 0.1 * grad for (name, p), grad in zip(params.items(), grads, strict=True)}
    return list(torch.autograd.grad(loss(), list(start.values()), materialize_grads=True))


# --- modules


class Sized(nn.Module):
    """Its weights in a list, and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 4))])
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(2, 4))})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.listed:
            x = torch.tanh(x @ weight.t())
        return x @ self.named["last"].t()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).unsqueeze(0)
        return self.last(self.attention(hidden, hidden, hidden)[0][0])


class Recurrent(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.unsqueeze(0).expand(2, -1, -1))[0][-1])


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table((2 * x[:, 0].abs()).long().clamp(0, 4)))


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.table = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)]), nn.ModuleDict({"between": nn.Tanh()})

    def encode(self, x: Tensor) -> Tensor:
        return self.table["between"](self.layers[0](x))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[-1](self.encode(x))


class Penalised(nn.Module):
    """Its output depends on what its own `parameters()` and the like return."""

    def __init__(self, which: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.inner, self.which = nn.Linear(3, 2), which

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.1 * torch.stack([p.square().sum() for p in self.which(self)]).sum()


class Delegating(nn.Module):
    """With a property, and attributes looked up elsewhere and counted when they are set."""

    calls: int

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value + 1 if name == "calls" else value)

    @property
    def scale(self) -> Tensor:
        return 1 + 0.1 * self.inner.weight.sum()

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls
        return F.linear(x, self.weight, self.bias) * self.scale / self.calls


class Referring(nn.Module):
    """Holds on to itself, its parts and its methods in ways that `nn.Module` knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.me, self.by_name, self.method, self.pair = [self], {"inner": self.inner}, self.helper, (self.inner,)

    def helper(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return (self.me[0].inner(x) + self.by_name["inner"](x) + self.method(x) + self.pair[0](x)) / 4


class Remembering(nn.Module):
    """Registers a buffer when it runs, keeps a plain tensor, and takes an argument called `params`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(3, 2), torch.zeros(2)

    def forward(self, x: Tensor, params: float = 1.0) -> Tensor:
        if not hasattr(self, "count"):
            self.register_buffer("count", torch.zeros(()))
        self.count = self.count + 1
        self.seen = self.seen + 1
        return self.inner(x) * params + self.count - self.seen


class Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Remembering()
        self.absent = None
        self.register_module("missing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, params=2.0)


class Calling(nn.Linear):
    """With a call of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def own_forward() -> nn.Module:
    """Methods in place of the class's, one of which calls that."""
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].forward = types.MethodType(lambda self, x: torch.tanh(F.linear(x, self.weight, self.bias)), net[0])
    net[1].forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), net[1])
    return net


def hooked() -> nn.Module:
    net: Any = make("mlp")
    net[0].register_forward_hook(lambda module, args, output: output * module.weight.sum())
    net[0].register_forward_hook(lambda module, args, output: output + 1, prepend=True)
    net[2].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    net[2].register_full_backward_hook(lambda module, inputs, outputs: tuple([grad / 2 for grad in inputs]))
    return net


def pruned() -> nn.Module:
    net: Any = make("mlp")
    prune.l1_unstructured(net[0], "weight", amount=0.3)
    return net


def compiled(in_place: bool) -> nn.Module:
    net = make("mlp")
    if in_place:
        net.compile(backend="eager")
        return net
    made: Any = torch.compile(net, backend="eager")
    return made


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    use: Callable[[Any, Tensor], Tensor] = call
    same: bool = True  # whether the original gets it right, too
    plain: Callable[[], nn.Module] | None = None  # what the loop by hand uses instead


def two(build: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(build(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def by_children(model: Any, x: Tensor) -> Tensor:
    for child in model.children():
        x = child(x)
    return x


CASES: dict[str, Case] = {
    "parameters in containers": Case(Sized),
    "attention": Case(Attending),
    "gru": Case(lambda: Recurrent(nn.GRU(3, 2, bidirectional=True))),
    "lstm, projected": Case(lambda: Recurrent(nn.LSTM(3, 6, proj_size=4))),
    "embedding": Case(Embedding),
    "modules in containers": Case(Indexed),
    "spectral norm": Case(two(parametrizations.spectral_norm)),
    "orthogonal": Case(two(parametrizations.orthogonal)),
    "spectral norm by a hook": Case(two(spectral_norm), same=False),
    "weight norm by a hook": Case(two(lambda layer: quietly(lambda: nn.utils.weight_norm(layer))), same=False),
    "pruned": Case(pruned, same=False),
    "reads parameters()": Case(lambda: Penalised(lambda module: module.parameters())),
    "reads named_parameters()": Case(lambda: Penalised(lambda module: [p for _, p in module.named_parameters()])),
    "reads state_dict()": Case(lambda: Penalised(lambda module: module.state_dict().values())),
    "reads parameters() of a part": Case(lambda: Penalised(lambda module: module.get_submodule("inner").parameters())),
    "properties and attribute access": Case(Delegating, same=False),
    "refers to itself": Case(Referring, same=False),
    "state of its own": Case(Remembering),
    "an argument called params": Case(Passing, same=False),
    "own forward": Case(own_forward, same=False),
    "own call": Case(lambda: Calling(3, 2)),
    "hooks": Case(hooked, same=False),
    "compiled": Case(lambda: compiled(False), same=False, plain=lambda: make("mlp")),
    "compiled in place": Case(lambda: compiled(True), same=False, plain=lambda: make("mlp")),
    "forward": Case(lambda: make("mlp"), lambda model, x: model.forward(x)),
    "children": Case(lambda: make("mlp"), by_children, same=False),
    "slices": Case(lambda: make("mlp"), lambda model, x: model[1:](model[:1](x)), same=False),
    "parts": Case(Indexed, lambda model, x: model.layers[1](model.table["between"](model.layers[0](x))), same=False),
    "a method": Case(Indexed, lambda model, x: model.layers[1](model.encode(x)), same=False),
    "weights of parts": Case(lambda: nn.Sequential(nn.Linear(3, 2)), lambda model, x: F.linear(x, model[0].weight, model[0].bias)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(2)
    return CASES[name].build()


@pytest.mark.parametrize("name", CASES)
def test_trains_as_the_real_optimiser_does(name: str) -> None:
    """And meta-gradients are those of the loop by hand, and of the original where that is right."""
    case = CASES[name]
    net = build(name)
    before = copy.deepcopy(net.state_dict())
    weights, grads = adapted(ours, net, case.use)
    assert_same(weights, trained(build(name), case.use), 1e-12)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    torch.manual_seed(2)
    assert_same(grads, by_hand(case.plain() if case.plain else case.build(), case.use), 1e-12)
    if case.same:
        assert_same(grads, quietly(lambda: adapted(theirs, build(name), case.use))[1])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.same])
def test_where_the_original_is_wrong_or_fails(name: str) -> None:
    """So that a difference stays in the table only as long as there is one."""
    wanted = trained(build(name), CASES[name].use)
    try:
        found = quietly(lambda: adapted(theirs, build(name), CASES[name].use))[0]
    except (AttributeError, TypeError, RecursionError):
        return
    assert not torch.allclose(found[-1], wanted[-1], rtol=1e-6)


# --- functions that would go on with the module's own weights


def enclosing(net: Any) -> Callable[[Tensor], Tensor]:
    original = net.forward
    return lambda x: 2 * original(x)


def enclosing_method(net: Any) -> Callable[[Tensor], Tensor]:
    original = net.forward
    return types.MethodType(lambda self, x: 2 * original(x), net)


def twice_decorated(net: Any) -> Callable[[Tensor], Tensor]:
    def doubling(function: Any) -> Any:
        @functools.wraps(function)
        def run(x: Tensor) -> Any:
            return 2 * function(x)

        return run

    return doubling(doubling(net.forward))


def with_a_default(net: Any) -> Callable[[Tensor], Tensor]:
    return lambda x, original=net.forward: 2 * original(x)


def enclosing_a_list(net: Any) -> Callable[[Tensor], Tensor]:
    layers = {"all": [net]}
    return lambda x: F.linear(x, layers["all"][0].weight)


@pytest.mark.parametrize(
    "replace",
    [
        enclosing,
        enclosing_method,
        twice_decorated,
        with_a_default,
        enclosing_a_list,
        lambda net: functools.partial(net.forward),
        lambda net: functools.partial(lambda self, x: self.weight @ x, net),
    ],
    ids=["closure", "method and closure", "decorators", "default", "containers", "partial method", "partial function"],
)
def test_a_forward_that_holds_on_to_its_module_is_refused(replace: Callable[[Any], Any]) -> None:
    """The original runs it, on the module's weights: nothing is ever learned."""
    net: Any = nn.Linear(3, 2)
    net.forward = replace(net)
    with pytest.raises(ValueError, match=r"forward of a Linear was replaced .* types\.MethodType"):
        ours.monkeypatch(net)


def test_a_forward_that_holds_on_to_nothing_is_used() -> None:
    """As when a head is cut off."""
    net: Any = make("mlp")
    factor = 2.0
    net[2].forward = lambda x: x * factor
    torch.testing.assert_close(ours.monkeypatch(net)(X), net(X))


# --- uses of a handle


@over_both
def test_state_dicts(package: Any) -> None:
    net = make("batch norm")
    fmodel: Any = package.monkeypatch(net)
    fmodel.update_params([2 * p for p in fmodel.fast_params])
    other = make("batch norm", 3)
    other.load_state_dict(fmodel.state_dict())
    assert_same([other(X)], [fmodel(X)], 1e-14)
    fmodel.load_state_dict(net.state_dict())
    assert_same([fmodel(X)], [net(X)], 1e-14)
    assert all(p is not q for p, q in zip(fmodel.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("track", [True, False])
def test_a_state_dict_that_is_assigned_is_one_update(track: bool) -> None:
    net: Any = make("nested")
    fmodel: Any = ours.monkeypatch(net, track_higher_grads=track)
    for part, prefix in ((fmodel, ""), (fmodel[0], "0.")):
        before, times = list(fmodel.parameters()), len(fmodel._adaptrt_fast.versions)
        state = {name.removeprefix(prefix): 2 * value for name, value in fmodel.state_dict().items() if name.startswith(prefix)}
        part.load_state_dict(state, assign=True)
        assert_same(list(part.state_dict().values()), list(state.values()), 0.0)
        assert len(fmodel._adaptrt_fast.versions) == times + track
        assert not track or all(p is q for p, q in zip(fmodel.parameters(time=times - 1), before, strict=True))
        assert all(p.requires_grad for p in fmodel.parameters())
        assert all(grad is not None for grad in torch.autograd.grad(loss_of(fmodel, call), list(fmodel.parameters())))


def test_a_copied_handle_is_independent() -> None:
    """At which the original fails."""
    fmodel = ours.monkeypatch(make("shared"))
    fmodel(X)
    twin = copy.deepcopy(fmodel)
    before = fmodel(X)
    fmodel.update_params([2 * p for p in fmodel.fast_params])
    assert_same([twin(X), twin.last(twin.first(X))], [before, make("shared").last(make("shared").first(X))], 1e-14)  # pyright: ignore
    twin.last.weight = twin.last.weight * 3
    assert len(list(twin.parameters(time=1))) == len(list(fmodel.parameters(time=1)))
    assert twin.last.weight is list(twin.parameters())[-2] and not torch.equal(twin.last.weight, fmodel.last.weight)
    del fmodel
    twin.update_params([0 * p for p in twin.fast_params])
    assert not twin(X).any()


def test_a_copy_after_a_step_has_the_same_graph_behind_it() -> None:
    net = make("batch norm")
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with ours.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel, call))
        twin = copy.deepcopy(fmodel)
        losses = [loss_of(handle, call) for handle in (fmodel, twin)]
        mine, other = (torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses)
        assert_same(mine, other, 0.0)
        again = ours.get_diff_optim(opt, net.parameters(), fmodel=twin)
        again.step(losses[1])
        assert len(list(twin.parameters(time=2))) == len(list(net.parameters()))
        with pytest.raises(IndexError):
            fmodel.parameters(time=2)
        assert twin[1].running_mean is not fmodel[1].running_mean


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
        lambda layer: quietly(lambda: nn.utils.weight_norm(layer)),
        lambda layer: delattr(layer, "weight"),
    ],
    ids=["parametrization", "weight norm", "deletion"],
)
@pytest.mark.parametrize(
    "then", [lambda handle: handle(X), lambda handle: handle.update_params(handle.fast_params)], ids=["call", "update"]
)
def test_a_parameter_of_a_handle_may_not_go(change: Any, then: Any) -> None:
    """It would go on as if nothing had happened."""
    fmodel: Any = ours.monkeypatch(make("mlp"))
    fmodel(X)
    change(fmodel[0])
    with pytest.raises(ValueError, match="'weight' is no parameter of the patched module's Linear any more"):
        then(fmodel)


@pytest.mark.parametrize("copied", [lambda handle: copy.copy(handle), lambda handle: copy.deepcopy(handle[0])], ids=["copy", "of a part"])
def test_copies_that_would_share_weights_are_refused(copied: Any) -> None:
    fmodel: Any = ours.monkeypatch(make("mlp"))
    before = fmodel(X)
    with pytest.raises(TypeError, match="copy"):
        copied(fmodel)
    assert_same([fmodel(X)], [before], 0.0)


def test_parts_are_added_and_replaced() -> None:
    """Also after a call. What is added keeps its own weights; the original fails at the next update."""
    net: Any = make("mlp")
    fmodel: Any = ours.monkeypatch(net)
    fmodel(X)
    fmodel[1] = nn.ReLU()
    fmodel.add_module("3", nn.Linear(2, 2))
    fmodel.update_params([2 * p for p in fmodel.fast_params])
    assert len(net) == 3 and isinstance(net[1], nn.Tanh)
    wanted = F.linear(torch.relu(F.linear(X, 2 * net[0].weight, 2 * net[0].bias)), 2 * net[2].weight, 2 * net[2].bias)
    assert_same([fmodel(X)], [fmodel[3](wanted)], 1e-14)


def test_changes_after_a_call_are_seen_by_the_next() -> None:
    net: Any = nn.Sequential(Remembering())
    fmodel: Any = ours.monkeypatch(net)
    before = fmodel(X)
    fmodel.add_module("1", nn.Tanh())
    torch.testing.assert_close(fmodel(X), torch.tanh(before))
    del fmodel[1]
    torch.testing.assert_close(fmodel(X), before)
    del fmodel[0].seen
    with pytest.raises(AttributeError, match="seen"):
        fmodel(X)
    assert net[0].seen is not None and len(net) == 1


@over_both
def test_forward_takes_params(package: Any) -> None:
    net: Any = make("mlp")
    fmodel: Any = package.monkeypatch(net)
    doubled = [2 * p for p in fmodel.parameters()]
    assert_same([fmodel.forward(X, params=doubled)], [fmodel(X)], 1e-15)
    assert all(p is q for p, q in zip(fmodel.parameters(), doubled, strict=True))


def test_a_part_takes_params() -> None:
    """Those of the whole handle, which the original fails to do."""
    fmodel: Any = ours.monkeypatch(make("nested"))
    doubled = [2 * p for p in fmodel.parameters()]
    assert_same([fmodel[1](fmodel[0](X, params=doubled))], [fmodel(X, params=doubled)], 1e-15)


@over_both
def test_modes_dtypes_and_gradients_of_a_handle(package: Any) -> None:
    net: Any = make("batch norm")
    fmodel: Any = package.monkeypatch(net)
    fmodel(X).sum().backward()
    assert all(p.grad is not None for p in fmodel.parameters())
    fmodel.zero_grad()
    assert all(p.grad is None for p in fmodel.parameters())
    fmodel.eval()
    assert not fmodel[1].training and net[1].training
    assert_same([fmodel(X)], [fmodel(X)], 0.0)
    fmodel.float()
    assert fmodel(X.float()).dtype is torch.float32
    assert all(p.dtype is torch.float64 for p in net.parameters())
    assert torch.nn.utils.parameters_to_vector(fmodel.parameters()).shape == (27 + 10,)


@over_both
def test_evaluation_without_grad(package: Any) -> None:
    fmodel: Any = package.monkeypatch(make("mlp"), copy_initial_weights=False)
    with torch.no_grad():
        plain = fmodel(X)
    with torch.inference_mode():
        inference = fmodel(X)
    tracked = fmodel(X)
    assert not plain.requires_grad and inference.is_inference() and tracked.requires_grad
    assert_same([plain], [tracked.detach()], 1e-15)


@over_both
def test_weights_frozen_half_way_and_weights_that_are_no_leaves(package: Any) -> None:
    net = make("mlp")
    scale = torch.tensor(1.5, requires_grad=True)
    fmodel: Any = package.monkeypatch(net)
    diffopt = package.get_diff_optim(torch.optim.SGD(net.parameters(), lr=0.1), net.parameters(), fmodel=fmodel)
    fmodel.update_params([p.detach() * scale for p in net.parameters()])
    diffopt.step(loss_of(fmodel, call))
    fmodel.update_params([p.detach() if i < 2 else p for i, p in enumerate(fmodel.fast_params)])
    frozen = list(fmodel.parameters())[:2]
    diffopt.step(loss_of(fmodel, call))
    assert all(p is q for p, q in zip(fmodel.parameters(), frozen, strict=False))
    (found,) = torch.autograd.grad(loss_of(fmodel, call), scale)
    assert found.isfinite() and found != 0


def test_a_slice_has_no_weights_of_its_own() -> None:
    """Its parts run on the handle's; the original cannot be sliced."""
    fmodel: Any = ours.monkeypatch(make("mlp"))
    part = fmodel[:1]
    assert [name for name, _ in part.named_parameters()] == ["0.weight", "0.bias"]
    assert len(list(part.parameters())) == 2
    with pytest.raises(ValueError, match="use the patched module"):
        part.update_params([])


def test_hooks_put_on_a_handle_stay_there() -> None:
    net: Any = make("mlp")
    fmodel: Any = ours.monkeypatch(net)
    seen: collections.Counter[str] = collections.Counter()
    handle = fmodel[0].register_forward_hook(lambda module, args, output: seen.update(["call"]), always_call=True)
    fmodel(X)
    handle.remove()
    fmodel(X)
    assert seen["call"] == 1 and not net[0]._forward_hooks


# --- what forward leaves in attributes, while weights change


class Caching(nn.Module):
    """Keeps references to its parts that it makes while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "order"):
            self.order = [self.a, self.b]
            self.table = {"first": (self.a,)}
        return self.order[1](torch.tanh(self.table["first"][0](x)))


class CachingMethods(Caching):
    run: Any = None

    def helper(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.run is None:
            self.run = self.helper
        return self.run(x)


class Appending(Caching):
    def __init__(self) -> None:
        super().__init__()
        self.order: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.order:
            self.order += [self.a, self.b]
        return self.order[1](torch.tanh(self.order[0](x)))


class HookingItself(Caching):
    hooked = False

    def add_bias(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.b.bias.sum()

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.a.register_forward_hook(self.add_bias)
            self.hooked = True
        return self.b(torch.tanh(self.a(x)))


class Choosing(Caching):
    """Another submodule under a name, by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
        self.active, self.calls = self.others[0], 0

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == 1:
            self.active = self.others[1]
        self.calls += 1
        return self.b(torch.tanh(self.active(x)))


class Priming(Caching):
    def __init__(self) -> None:
        super().__init__()
        self.primed = True

    def forward(self, x: Tensor) -> Tensor:
        factor = 1.0
        if hasattr(self, "primed"):
            del self.primed
        else:
            factor = 2.0
        return factor * self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("kind", [Caching, CachingMethods, Appending, HookingItself, Choosing, Priming])
def test_what_forward_changes_stays_changed(kind: Any) -> None:
    """Against the model itself under a real optimiser."""
    torch.manual_seed(1)
    net = kind()
    real = copy.deepcopy(net)
    opt, real_opt = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(real.parameters(), lr=0.1)
    with ours.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(F.mse_loss(fmodel(X), Y))
            real_opt.zero_grad()
            F.mse_loss(real(X), Y).backward()
            real_opt.step()
        assert_same([p.detach() for p in fmodel.parameters()], [p.detach() for p in real.parameters()], 1e-12)
        assert_same([fmodel(X).detach()], [real(X).detach()], 1e-12)
    assert set(vars(net)) == set(vars(kind())) and len(net.a._forward_hooks) == 0


class Checkpointed(nn.Module):
    """Parts in a list, and a bound method, computed again on the way back."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on, self.a, self.b = on, nn.Linear(3, 4), nn.Linear(4, 2)
        self.parts = [self.a]
        self.method = self.last

    def last(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(x))

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.parts, self.method):
            x = cast(Tensor, checkpoint(part, x, use_reentrant=False) if self.on else part(x))
        return x


def test_checkpointed_parts_that_are_referred_to() -> None:
    found: list[list[Tensor]] = []
    for on in (False, True):
        torch.manual_seed(1)
        net = Checkpointed(on)
        with ours.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.5), copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(STEPS):
                diffopt.step(F.mse_loss(fmodel(X), Y))
            found.append(list(torch.autograd.grad(F.mse_loss(fmodel(X), Y), list(net.parameters()))))
    assert_same(found[1], found[0], 1e-12)


def test_attributes_set_on_the_handle_during_a_call() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input)

    fmodel: Any = ours.monkeypatch(nn.Sequential(Counting(3, 2)))
    fmodel.register_forward_hook(lambda module, args, output: setattr(fmodel, "feature", output))
    seen = [fmodel(X) for _ in range(3)]
    assert fmodel[0].calls == 3 and fmodel.feature is seen[-1]


def test_changes_that_go_past_attributes_are_seen() -> None:
    torch.manual_seed(1)
    fmodel: Any = ours.monkeypatch(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9), nn.ModuleList([nn.Tanh()])))
    before = fmodel[:2](X)
    fmodel.eval()
    x = fmodel[0](X)
    assert not torch.equal(before, x) and torch.equal(fmodel[1](x), x)
    del fmodel[2][0]
    assert len(fmodel[2]) == 0
    fmodel[0].register_parameter("extra", nn.Parameter(torch.ones(2)))
    assert torch.equal(fmodel[0](X), x)


class Private(nn.Linear):
    """Names that ours must not take."""

    _fast = False

    def _run(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input) * (2.0 if self._fast else 1.0)


def test_private_names_of_a_model_are_its_own() -> None:
    net = Private(3, 2).double()
    net._fast = True
    torch.testing.assert_close(ours.monkeypatch(net)(X), net(X))


def test_kernels_of_attention_are_put_back_after_threads() -> None:
    handles = [ours.monkeypatch(make("mlp")) for _ in range(4)]
    before = torch.backends.cuda.flash_sdp_enabled()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: [handles[i](X) for _ in range(50)], range(4)))
    assert before and torch.backends.cuda.flash_sdp_enabled() == before
