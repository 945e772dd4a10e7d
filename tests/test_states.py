"""States of adaptations as values: starts, parts that are replaced, states stacked over tasks, and chosen from by task."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import adaptrt
from adaptrt import Adapted, Adjoint, CompiledUnroll, FirstOrder, Replay, Stash, Unrolled, compile_unroll, optim
from adaptrt.errors import AdaptrtError, DeviceMismatch, InvalidArgument, InvalidType, OptimizerMismatch, ShapeChanged
from tests import naive
from tests.models import norm_mlp as model
from tests.models import normal, regress
from tests.tolerances import assert_near

K, T = 2, 3
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash(), FirstOrder()]
over_adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)


def make(adjoint: Adjoint | str = "auto", backend: str = "eager", net: nn.Module | None = None, **options: Any) -> CompiledUnroll:
    opt = optim.sgd(lr=0.1, momentum=0.8)
    return compile_unroll(model() if net is None else net, opt, K, loss=regress, adjoint=adjoint, backend=backend, **options)


def batch(seed: int, *lead: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    return normal(generator, *lead, 5, 3), normal(generator, *lead, 5, 2)


def loop(first_order: bool = False) -> naive.Loop:
    return naive.Loop(model(), regress, naive.sgd, {"lr": 0.1, "momentum": 0.8}, K, first_order=first_order)


def naive_start(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> naive.Start:
    return naive.Start(params, {}, buffers or dict(model().named_buffers()), {})


def tensors(adapted: Adapted) -> dict[str, Tensor]:
    return adapted.state.named_tensors()


def same(one: Adapted, other: Adapted) -> bool:
    """Whether two adaptations have the same bits."""
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- starts


def test_a_start_is_a_copy_of_the_present_values() -> None:
    net = model()
    unroll = make(net=net)
    start, before = unroll.start(), unroll.adapt(batch(1))
    assert start.losses.shape == (0,) and start.num_tasks is None
    assert {name: value.tolist() for name, value in start.params.items()} == {n: p.tolist() for n, p in net.named_parameters()}
    assert start(batch(1)[0]).shape == (5, 2)
    with torch.no_grad():
        net[0].weight.mul_(2.0)  # type: ignore[union-attr]
    assert same(unroll.adapt(batch(1), start=start), before)
    assert not same(unroll.adapt(batch(1)), before)


@over_adjoints
@pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])
def test_gradients_of_a_start(adjoint: Adjoint, tasks: bool) -> None:
    """They flow to what was given, and to the model's parameters for what was not."""
    net = model()
    unroll = make(adjoint, net=net)
    head = normal(Generator().manual_seed(9), *([T] if tasks else []), 2, 4).requires_grad_()
    mean = normal(Generator().manual_seed(8), 4)
    start = unroll.start(params={"3.weight": head}, buffers={"1.running_mean": mean}, num_tasks=T if tasks else None)
    lead = (T,) if tasks else ()
    support, query = batch(1, *lead), batch(2, *lead)
    leaves = {**{name: param for name, param in net.named_parameters() if name != "3.weight"}, "head": head}
    value = (unroll.vmap() if tasks else unroll)(support, query, start=start)
    found = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    buffers = {**dict(net.named_buffers()), "1.running_mean": mean}
    losses: list[Tensor] = []
    for task in range(T if tasks else 1):
        params = {**dict(net.named_parameters()), "3.weight": head[task] if tasks else head}
        one = [tuple(value[task] if tasks else value for value in part) for part in (support, query)]
        losses.append(naive.meta_loss(loop(adjoint.detach_gradient), naive_start(params, buffers), one[0], one[1]))
    wanted = torch.stack(losses).mean()
    grads = torch.autograd.grad(wanted, list(leaves.values()))
    assert_near({"value": value.detach(), **found}, {"value": wanted.detach(), **dict(zip(leaves, grads, strict=True))}, torch.float64)


def test_a_start_without_task_axis_is_that_of_every_task() -> None:
    unroll = make()
    start = unroll.start(params={"3.bias": torch.ones(2, dtype=torch.float64)})
    shared = unroll.vmap().adapt(batch(1, T), start=start)
    assert same(shared, unroll.vmap().adapt(batch(1, T), start=unroll.start(params={"3.bias": start.params["3.bias"]}, num_tasks=T)))


def test_the_state_of_a_start_follows_its_parameters() -> None:
    """Where an optimiser's first state depends on the parameters, a start with others has another."""

    def init(params: Mapping[str, Tensor]) -> Any:
        return {name: 2.0 * value for name, value in params.items()}

    def update(grads: Mapping[str, Tensor], state: Any, params: Mapping[str, Tensor], hyper: Any) -> Any:
        return {name: value - hyper["lr"] * (grads[name] + value - state[name]) for name, value in params.items()}, state

    unroll = compile_unroll(model(), optim.Optimizer(init, update, {"lr": 0.1}), K, loss=regress, backend="eager")
    bias = normal(Generator().manual_seed(1), 2).requires_grad_()
    start = unroll.start(params={"3.bias": bias})
    assert torch.equal(start.opt_state["3.bias"], 2.0 * bias)
    assert torch.autograd.grad(start.opt_state["3.bias"].sum(), bias)[0].tolist() == [2.0, 2.0]
    of_tasks = unroll.start(params={"3.bias": torch.stack([bias, 3.0 * bias])}, num_tasks=2)
    assert torch.equal(of_tasks.opt_state["3.bias"], torch.stack([2.0 * bias, 6.0 * bias]))
    assert torch.equal(of_tasks.opt_state["0.weight"][1], start.opt_state["0.weight"])
    given = unroll.start(params={"3.bias": bias}, opt_state=unroll.start().opt_state)
    assert torch.equal(given.opt_state["3.bias"], unroll.start().opt_state["3.bias"])
    assert not same(unroll.adapt(batch(1), start=given), unroll.adapt(batch(1), start=start))


def test_a_start_has_the_present_state_of_a_torch_optimizer() -> None:
    net = model()
    opt = torch.optim.Adam(net.parameters(), lr=0.1)
    regress(net(batch(1)[0]), batch(1)[1]).backward()
    opt.step()
    unroll = compile_unroll(net, opt, K, loss=regress, backend="eager")
    assert same(unroll.adapt(batch(2), start=unroll.start()), unroll.adapt(batch(2)))
    assert int(unroll.start(num_tasks=2).opt_state["0.weight"].step[1]) == 1


# --- parts that are replaced


def test_a_value_without_task_axis_replaces_that_of_every_task() -> None:
    unroll = make().vmap()
    adapted = unroll.adapt(batch(1, T))
    bias = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    replaced = adapted.replace(params={"3.bias": bias})
    assert replaced.params["3.bias"].tolist() == [[1.0, 2.0]] * T
    assert torch.equal(replaced.params["0.weight"], adapted.params["0.weight"])
    replaced(batch(2, T)[0]).sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [5.0 * T] * 2


# --- stacks


@over_adjoints
def test_going_on_from_a_stack_is_going_on_from_each(adjoint: Adjoint) -> None:
    unroll = make(adjoint)
    users = [unroll.adapt(batch(user)) for user in range(T)]
    stacked = adaptrt.stack(users)
    assert len(stacked) == stacked.num_tasks == T and stacked.losses.shape == (T, K)
    assert all(same(one, user) for one, user in zip(stacked.unbind(), users, strict=True))
    more = unroll.vmap().adapt(batch(7, T), start=stacked)
    for task, user in enumerate(users):
        support = tuple(value[task] for value in batch(7, T))
        wanted = unroll.adapt(support, start=user)
        assert_near(tensors(more[task]), tensors(wanted), torch.float64)
        assert_near({"losses": more[task].losses}, {"losses": wanted.losses}, torch.float64)


def test_gradients_flow_through_a_stack_and_out_of_it() -> None:
    net = model()
    unroll = make(Replay(), net=net)
    users = [unroll.adapt(batch(user)) for user in range(T)]
    more = unroll.vmap().adapt(batch(7, T), start=adaptrt.stack(users))
    value = more[1](batch(8)[0]).square().sum() + more[-1](batch(8)[0]).sum()
    wanted = torch.zeros((), dtype=torch.float64)
    for task in (1, 2):
        after = unroll.adapt(tuple(value[task] for value in batch(7, T)), start=users[task])
        output = after(batch(8)[0])
        wanted = wanted + (output.square().sum() if task == 1 else output.sum())
    params = dict(net.named_parameters())
    found, right = (
        dict(zip(params, torch.autograd.grad(loss, list(params.values()), retain_graph=True), strict=True)) for loss in (value, wanted)
    )
    assert_near(found, right, torch.float64)


@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0, 1], [1], [1, 1, 0, 2]], ids=str)
def test_tasks_of_one_batch_are_put_together_again(places: list[int]) -> None:
    """As their values are, with their gradients; without history where gradients are off."""
    net = model()
    adapted = make(Replay(), net=net).vmap().adapt(batch(1, T), keep="finite")
    rows = adapted.unbind()
    again = adaptrt.stack([rows[place] for place in places])
    apart = adaptrt.stack([copy.copy(rows[place]) for place in places])
    assert again.num_tasks == len(places) and same(again, apart) and torch.equal(again.losses, apart.losses)
    assert again.kept is None and (places != [0, 1, 2] or again.state is adapted.state)
    leaf = adapted.detach().unbind()
    value = leaf[1].params["3.bias"].requires_grad_()
    (found,) = torch.autograd.grad(adaptrt.stack([leaf[place] for place in places]).params["3.bias"].sum(), value)
    assert torch.equal(found, torch.full((2,), float(places.count(1)), dtype=torch.float64))
    taken = rows[1].params["3.bias"]
    (found,) = torch.autograd.grad(adaptrt.stack([rows[place] for place in places]).params["3.bias"].sum(), taken, retain_graph=True)
    assert torch.equal(found, torch.full((2,), float(places.count(1)), dtype=torch.float64))
    weights, params = torch.arange(1.0, len(places) + 1, dtype=torch.float64), list(net.parameters())
    found, right = (
        torch.autograd.grad((one.params["3.bias"].sin().sum(1) + one.losses.sum(1)) @ weights, params, retain_graph=True)
        for one in (again, apart)
    )
    assert_near(dict(zip("abcdef", found, strict=False)), dict(zip("abcdef", right, strict=False)), torch.float64)
    with torch.no_grad():
        constant = adaptrt.stack([rows[place] for place in places])
    assert same(constant, again) and not any(value.requires_grad for value in (*constant.state.leaves, constant.losses))


def test_tasks_of_a_batch() -> None:
    stacked = make().vmap().adapt(batch(1, 4))
    assert [same(stacked[place], one) for place, one in enumerate(stacked)] == [True] * 4
    assert same(stacked[-1], stacked[3]) and stacked[1].num_tasks is None and stacked[1].losses.shape == (K,)
    for chosen, places in ((slice(1, 3), [1, 2]), (slice(None, None, 2), [0, 2]), (slice(None, None, -1), [3, 2, 1, 0])):
        part = stacked[chosen]
        assert len(part) == len(places) and part.losses.shape == (len(places), K)
        assert all(same(one, stacked[place]) for one, place in zip(part, places, strict=True))
    assert same(adaptrt.stack(stacked.unbind()), stacked)
    assert not stacked.detach()[0].losses.requires_grad and stacked[0].losses.requires_grad
    assert bool(stacked) and bool(stacked[0])
    with pytest.raises(AttributeError, match="of adaptations, not of their class"):
        _ = Adapted.losses


def test_losses_of_unequal_numbers() -> None:
    unroll = make()
    stacked = adaptrt.stack([unroll.adapt(batch(1)), unroll.start()])
    assert stacked.losses.isnan().tolist() == [[False] * K, [True] * K]
    chosen = adaptrt.where(torch.tensor(False), unroll.adapt(batch(1)), unroll.start())
    assert chosen.losses.isnan().all()


def test_where_takes_whole_states_by_task() -> None:
    unroll = make().vmap()
    old = unroll.adapt(batch(1, T))
    new = unroll.adapt(batch(2, T), start=old)
    chosen = adaptrt.where(torch.tensor([True, False, True]), new, old)
    assert [same(chosen[task], (old if task == 1 else new)[task]) for task in range(T)] == [True] * T
    assert torch.equal(chosen.losses, torch.stack([new.losses[0], old.losses[1], new.losses[2]]))
    base = make().start()
    reset = adaptrt.where(torch.tensor([True, False, True]), old, unroll.start())
    assert same(reset[1], base) and same(reset[2], old[2])
    broken = old.replace(params={"3.bias": torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [3.0, 4.0]], dtype=torch.float64)})
    ok = ~broken.params["3.bias"].isnan().any(1)
    assert same(adaptrt.where(ok, broken, old)[1], old[1])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_calls_with_a_start_take_the_route_of_the_call_before(backend: str) -> None:
    """A start of another number of tasks, dtype or optimiser does not."""
    unroll = make(Unrolled(), backend)
    start = unroll.start()
    with torch.inference_mode():
        first = unroll.adapt(batch(1), start=start)
        unroll.adapt(batch(2), start=first)
        second = unroll.adapt(batch(2), start=first)
    wanted = naive.adapt(loop(), naive_start(dict(model().named_parameters())), batch(1))
    one = naive.adapt(loop(), naive.Start(wanted.params, {}, wanted.buffers, wanted.state), batch(2))
    assert_near(dict(second.params), {name: value.detach() for name, value in one.params.items()}, torch.float64)
    before = list(unroll.graphs())
    found = unroll.vmap().adapt(batch(3, T), start=start)
    assert found.num_tasks == T and list(unroll.graphs()) == before


def test_warm_starts_need_nothing_new() -> None:
    unroll = make(Unrolled(), on_new_shape="error")
    unroll.warmup(batch(1), batch(2), start=True)
    users = [unroll.adapt(batch(user)) for user in range(T)]
    tasks = unroll.vmap().warmup(batch(1, T), batch(2, T), start=True)
    tasks.adapt(batch(3, T), start=adaptrt.stack(users))
    with pytest.raises(ShapeChanged):
        tasks.adapt(batch(3, T + 1), start=adaptrt.stack([*users, users[0]]))


def test_predictions_of_an_unroll_are_those_of_the_adaptation() -> None:
    unroll, x = make(), batch(9)[0]
    many, copied = unroll.vmap(), unroll.clone()
    alone, tasks = unroll.adapt(batch(0)), many.adapt(batch(1, T))
    assert torch.equal(unroll.predict(x), unroll.start()(x))
    assert torch.equal(unroll.predict((x,), start=alone), alone(x))
    assert torch.equal(copied.predict(x, start=alone), alone(x))
    mixed = adaptrt.stack([alone, *tasks.unbind(), copied.adapt(batch(2))])
    xs = batch(3, T + 2)[0]
    expected = torch.stack([row(each) for row, each in zip(mixed, xs, strict=True)])
    for each in (unroll, many, copied):
        assert_near({"outputs": each.predict(xs, start=mixed)}, {"outputs": expected})
    (gradient,) = torch.autograd.grad(unroll.predict(x, start=alone).sum(), [next(iter(unroll.module().parameters()))])
    assert gradient.abs().sum() > 0


def test_an_unroll_predicts_with_its_own_programs() -> None:
    """Whichever unroll of the family made the state: a server warms one, and keeps states of others."""
    unroll = make(on_new_shape="error")
    ready, support, x = unroll.clone(), batch(0), batch(9)[0]
    ready.warmup(support, inputs=x, start=ready.start())
    adapted = ready.adapt(support, start=ready.start())
    of_other = unroll.clone(on_new_shape="compile").adapt(support)
    num_programs = len(ready.graphs())
    assert torch.equal(ready.predict(x, start=of_other), ready.predict(x, start=adapted))
    assert len(ready.graphs()) == num_programs and not unroll.graphs()
    with pytest.raises(ShapeChanged):
        unroll.predict(x, start=adapted)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [(lambda: make(net=model()).start(), OptimizerMismatch, "another unroll"), (lambda: 3, InvalidType, "got int")],
    ids=["another unroll", "no adaptation"],
)
def test_predictions_from_what_is_none_of_the_unrolls(start: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make().predict(batch(0)[0], start=start())


def test_a_long_chain_through_a_stack_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptrt.runtime.adapted.LONG_CHAIN", 4)
    unroll = compile_unroll(nn.Linear(3, 2).double(), optim.sgd(lr=0.1), 1, loss=regress, adjoint=Replay(), backend="eager")
    state = adaptrt.stack([unroll.start()])
    with pytest.warns(adaptrt.errors.LongChain):
        for _ in range(6):
            state = adaptrt.stack(unroll.vmap().adapt(batch(1, 1), start=state).unbind())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            state = unroll.vmap().adapt(batch(1, 1), start=state).detach()


# --- what does not fit

ZEROS = torch.zeros(2, dtype=torch.float64)


def head_only() -> CompiledUnroll:
    return make(params="3.*")


WRONG: dict[str, tuple[Callable[[], Any], type[AdaptrtError], str]] = {
    "name": (lambda: make().start(params={"3.bais": ZEROS}), InvalidArgument, "'3.bais'.*did you mean '3.bias'"),
    "frozen": (lambda: head_only().start(params={"0.bias": torch.zeros(4)}), InvalidArgument, "no name of what adapts"),
    "shape": (
        lambda: make().start(params={"3.bias": ZEROS[:1]}),
        InvalidArgument,
        r"3.bias'\] must be float64\[2\], got float64\[1\]",
    ),
    "dtype": (lambda: make().start(params={"3.bias": ZEROS.float()}), InvalidArgument, r"got float32\[2\]; call .to\(torch.float64\)"),
    "device": (lambda: make().start(params={"3.bias": ZEROS.to("meta")}), DeviceMismatch, r"is on meta, the model on cpu"),
    "tasks": (lambda: make().start(params={"3.bias": torch.stack([ZEROS] * 4)}), InvalidArgument, r"start\(num_tasks=4"),
    "number": (lambda: make().start(params={"3.bias": 0.0}), InvalidType, "must be a tensor, got float"),  # type: ignore[dict-item]
    "list": (lambda: make().start(params=[ZEROS]), InvalidType, "must be a dict of tensors"),  # type: ignore[arg-type]
    "buffer": (lambda: make().start(buffers={"1.mean": ZEROS}), InvalidArgument, "buffers has '1.mean'"),
    "num_tasks": (lambda: make().start(num_tasks=0), InvalidArgument, "num_tasks must be at least 1"),
    "opt_state": (lambda: make().start(opt_state={}), InvalidArgument, "opt_state has another structure"),
    "replace": (lambda: make().adapt(batch(1)).replace(params={"3.bias": ZEROS[:1]}), InvalidArgument, "must be"),
    "nothing": (lambda: adaptrt.stack([]), InvalidArgument, "at least one"),
    "one": (lambda: adaptrt.stack(make().start()), InvalidType, "takes a list or tuple of adaptations, got an adaptation of one task"),  # type: ignore[arg-type]
    "batch": (lambda: adaptrt.stack(make().start(num_tasks=2)), InvalidType, r"got one that has a task axis already \(2 tasks\)"),  # type: ignore[arg-type]
    "an int": (lambda: adaptrt.stack(3), InvalidType, "of adaptations, got int"),  # type: ignore[arg-type]
    "no index": (lambda: make().start(num_tasks=2)[None], InvalidType, "indexed by an int or a slice, got None"),  # type: ignore[index]
    "no adaptation": (lambda: adaptrt.stack([make().start(), 3]), InvalidType, "got int at 1"),  # type: ignore[list-item]
    "other unroll": (lambda: adaptrt.stack([make().start(), make().start()]), InvalidArgument, "adaptation 1 is of another unroll"),
    "stack of stacks": (lambda: adaptrt.stack([make().start(num_tasks=2)]), InvalidArgument, r"unbind\(\) first"),
    "len": (lambda: len(make().start()), InvalidType, r"len\(\) needs an adaptation over tasks"),
    "index": (lambda: make().start()[0], InvalidType, "an index needs"),
    "no slice": (lambda: make().start(num_tasks=2)[2:], InvalidArgument, "none of the 2 tasks"),
    "numbers of tasks": (
        lambda: adaptrt.where(torch.tensor([True]), (u := make()).start(num_tasks=2), u.start(num_tasks=1)),
        InvalidArgument,
        "of 2 tasks and 1 tasks",
    ),
    "condition": (lambda: adaptrt.where(torch.ones(2), (u := make()).start(num_tasks=2), u.start()), InvalidType, "must be a bool tensor"),
    "no condition": (lambda: adaptrt.where(True, (u := make()).start(), u.start()), InvalidType, "got bool"),  # type: ignore[arg-type]
    "condition's shape": (
        lambda: adaptrt.where(torch.tensor([True]), (u := make()).start(), u.start()),
        InvalidArgument,
        "needs one value for each task, and none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    run, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        run()


def test_states_of_a_changed_optimizer() -> None:
    """They are refused by name: with momentum there is a state, without there is none."""
    net = model()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    unroll = compile_unroll(net, opt, K, loss=regress, backend="eager")
    old = unroll.adapt(batch(1))
    opt.param_groups[0]["momentum"] = 0.0
    new = unroll.adapt(batch(1))
    with pytest.raises(OptimizerMismatch, match="momentum_buffer"):
        adaptrt.stack([old, new])
    with pytest.raises(OptimizerMismatch, match="momentum_buffer"):
        unroll.adapt(batch(1), start=old)


def test_states_of_a_converted_model() -> None:
    net = model()
    unroll = make(net=net)
    old = unroll.start()
    net.float()
    with pytest.raises(OptimizerMismatch, match=r"params.0.weight is float64\[4, 3\] in the first adaptation, and float32"):
        adaptrt.stack([old, unroll.start()])


def test_an_index_out_of_range_ends_an_iteration() -> None:
    with pytest.raises(IndexError, match="there are 2 tasks"):
        make().start(num_tasks=2)[2]


def test_a_copy_of_one_task_has_memory_for_one() -> None:
    stacked = make().vmap().adapt(batch(1, 50)).detach()
    for one in (stacked[3], stacked.unbind()[3]):
        copied = copy.deepcopy(one)
        assert same(copied, one)
        assert all(value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in copied.state.leaves)


def test_tasks_that_are_taken_apart_have_the_graph_of_the_moment() -> None:
    """Whatever mode their values are first asked for in."""
    unroll = make(Replay()).vmap()
    adapted = unroll.adapt(batch(1, 2))
    rows = adapted.unbind()
    with torch.no_grad():
        assert rows[0].params["3.bias"].requires_grad and rows[0].losses.requires_grad
        constant = adapted.unbind()
    with torch.inference_mode():
        assert rows[1].params["3.bias"].requires_grad and rows[1].state is rows[1].state
    assert not constant[0].params["3.bias"].requires_grad and not constant[1].losses.requires_grad
    (rows[0].losses.sum() + rows[1].params["3.bias"].sum()).backward()
    with torch.inference_mode():
        inferred = unroll.adapt(batch(1, 2)).unbind()
    assert same(inferred[1], adapted[1].detach())


class Centred(nn.Module):
    """A loss that remembers a mean of what it has seen."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * output.detach().mean(0)
        return (output - self.mean - target).square().mean()


def test_buffers_of_a_loss_are_part_of_a_state() -> None:
    net = nn.Linear(3, 2).double()
    unroll = compile_unroll(net, optim.sgd(lr=0.1), 1, loss=Centred(), backend="eager")
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    adapted = unroll.adapt((x, y))
    assert adapted.buffers == {}
    assert_near({"mean": adapted.loss_buffers["mean"]}, {"mean": 0.5 * net(x).detach().mean(0)}, torch.float64)
    moved = unroll.start().replace(loss_buffers={"mean": torch.ones(2, dtype=torch.float64)})
    after = unroll.adapt((x, y), start=moved, keep=lambda before, after: (before.loss_buffers["mean"] == 1).all())
    assert_near({"mean": after.loss_buffers["mean"]}, {"mean": 0.5 + 0.5 * net(x).detach().mean(0)}, torch.float64)
    with pytest.raises(InvalidArgument, match="loss_buffers has 'means', which is no name of what adapts; did you mean 'mean'"):
        adapted.replace(loss_buffers={"means": torch.ones(2)})


def test_a_clone_has_memory_of_its_own_and_can_be_stacked() -> None:
    unroll = adaptrt.compile_unroll(nn.Linear(2, 1), adaptrt.optim.adam(lr=0.1), k=2, backend="eager").vmap()
    batch = unroll.adapt((torch.randn(3, 5, 2), torch.randn(3, 5, 1)))
    row = batch.unbind()[1]
    clone = row.clone()
    for leaf, own in zip(row.state.leaves, clone.state.leaves, strict=True):
        assert torch.equal(leaf, own)
        assert own.untyped_storage().nbytes() == own.numel() * own.element_size()
    assert torch.equal(adaptrt.stack([clone, row]).params["weight"][0], row.params["weight"])
    (gradient,) = torch.autograd.grad(clone.params["weight"].sum(), row.params["weight"])
    assert torch.equal(gradient, torch.ones(1, 2))


def test_vmap_may_keep_more_shapes_and_refuse_new_ones() -> None:
    unroll = adaptrt.compile_unroll(nn.Linear(2, 1), adaptrt.optim.sgd(lr=0.1), k=2, cache_size=1, backend="eager")
    many = unroll.vmap(cache_size=4, on_new_shape="error")
    assert (many.has_task_axis, unroll.has_task_axis, many.examples, many.per_step) == (True, False, "equal", False)

    def data(num_tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(num_tasks, 5, 2), torch.randn(num_tasks, 5, 1)

    with torch.no_grad():
        for num_tasks in (1, 2, 3):
            begin = many.start(num_tasks=num_tasks)
            many.warmup(data(num_tasks), start=begin, inputs=torch.randn(num_tasks, 4, 2))
        known = len(many.graphs())
        assert known == 3 * 2  # steps from such a start, and predictions, for each number; nothing for calls without a start
        for num_tasks in (1, 2, 3):
            rows = [unroll.start()] * num_tasks  # of the same unroll
            many.adapt(data(num_tasks), start=adaptrt.stack(rows))
            many.start(num_tasks=num_tasks)(torch.randn(num_tasks, 4, 2))
        assert len(many.graphs()) == known
        with pytest.raises(ShapeChanged):
            many.adapt(data(4), start=many.start(num_tasks=4))
    for call in (lambda: unroll.vmap(cache_size=0), lambda: unroll.vmap(on_new_shape="never")):
        with pytest.raises(InvalidArgument):
            call()


def test_a_state_is_not_written_to_what_is_no_file() -> None:
    adapted = adaptrt.compile_unroll(nn.Linear(2, 1), adaptrt.optim.sgd(lr=0.1), k=2, backend="eager").start()
    with pytest.raises(InvalidType, match="a path or an open binary file, got int"):
        adapted.save(3)  # pyright: ignore[reportArgumentType]
