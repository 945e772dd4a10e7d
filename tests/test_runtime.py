"""How an unroll behaves: what is compiled when, what it sees of model and optimiser, what it returns, what it says about itself."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import FirstOrder, Replay, Unrolled, tree
from adaptrt.backend import Backend, Eager
from adaptrt.errors import ShapeChanged
from adaptrt.graph.ir import Graph
from adaptrt.inner.reader import Reader
from adaptrt.optim.source import source
from tests.models import classifier
from tests.pairs import SINGLE_AND_TASKS, by_name, over_pairs
from tests.tolerances import STEPS, assert_close

Batch = tuple[Tensor, Tensor]


def data(num: int = 6, features: int = 4, classes: int = 3) -> Batch:
    return torch.randn(num, features), torch.randint(classes, (num,))


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.4), nn.Linear(5, 3))


def compiled(model: nn.Module, opt: Any = None, k: int = 2, **options: Any) -> adaptrt.CompiledUnroll:
    return adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1) if opt is None else opt, k, **{"backend": "eager", **options})


def count(unroll: adaptrt.CompiledUnroll) -> int:
    """How many programs are compiled."""
    return len(unroll.explain().programs)


def stepped(model: nn.Module, opt: torch.optim.Optimizer, support: Batch, k: int) -> dict[str, Tensor]:
    """The parameters after k ordinary steps of a copy of model and optimiser."""
    twin = copy.deepcopy(model)
    kind: Any = type(opt)
    again = kind(twin.parameters(), lr=1.0)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(k):
        again.zero_grad()
        F.cross_entropy(twin(support[0]), support[1]).backward()
        again.step()
    return {name: param.detach() for name, param in twin.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, STEPS, msg=name)


class Counting(Backend):
    """The eager backend, with a list of what it compiled."""

    name = "counting"

    def __init__(self) -> None:
        self.compiled: list[Graph] = []

    def compile(self, graph: Graph) -> Any:
        self.compiled.append(graph)
        return Eager().compile(graph)


# --- warmup, shapes and the cache


@pytest.mark.parametrize("adjoint", [Unrolled(), Replay(), Replay(every=2), FirstOrder(), "auto"], ids=str)
@pytest.mark.parametrize("vmap", [False, True], ids=["single", "vmap"])
def test_warmup_compiles_all_that_is_needed(adjoint: Any, vmap: bool) -> None:
    model = normed()
    unroll = compiled(model, k=3, adjoint=adjoint)
    support, query = data(), data(7)
    if vmap:
        unroll = unroll.vmap()
        support, query = (tuple(torch.stack([value] * 2) for value in batch) for batch in (support, query))
    assert unroll.warmup(support, query) is unroll
    warm = count(unroll)
    assert warm > 0
    with torch.inference_mode():
        unroll.adapt(support)(query[0])
    unroll(support, query).backward()
    assert count(unroll) == warm


def test_warmup_without_query_is_for_adapting_alone() -> None:
    unroll = compiled(classifier(), adjoint=Replay())
    support = data()
    assert [report.name for report in unroll.warmup(support).explain().programs] == ["step"]
    with torch.no_grad():
        unroll.adapt(support)
    assert count(unroll) == 1


def test_warmup_without_gradients_compiles_no_pullback() -> None:
    unroll = compiled(classifier(), adjoint=Replay())
    with torch.no_grad():
        unroll.warmup(data(), data())
        warm = count(unroll)
        unroll(data(), data())
    assert count(unroll) == warm
    assert not any("pullback" in report.name for report in unroll.explain().programs)


def test_warmup_leaves_model_and_randomness_alone() -> None:
    model = normed()
    before = copy.deepcopy(model.state_dict())
    support, query = data(), data(7)
    state = torch.get_rng_state()
    compiled(model).warmup(support, query)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_what_is_warm_runs_under_error() -> None:
    model = normed()
    unroll = compiled(model, on_new_shape="error").warmup(data(), data(7)).warmup(data(5), data(8))
    for size, query in ((6, 7), (5, 8), (6, 7)):
        unroll.adapt(data(size))(data(query)[0])
        unroll(data(size), data(query)).backward()
    with pytest.raises(ShapeChanged):
        unroll.adapt(data(4))
    with pytest.raises(ShapeChanged):
        unroll(data(6), data(8))
    model.eval()
    with pytest.raises(ShapeChanged, match="mode"):
        unroll.adapt(data())
    model.train()
    unroll.adapt(data())


@pytest.mark.parametrize(("cache_size", "expected"), [(1, 4), (2, 2)])
def test_the_cache_is_bounded(cache_size: int, expected: int) -> None:
    backend = Counting()
    unroll = compiled(classifier(), backend=backend, cache_size=cache_size, adjoint=Unrolled())
    with torch.no_grad():
        for size in (6, 5, 6, 5):
            unroll.adapt(data(size))
    assert len(backend.compiled) == expected
    assert count(unroll) == cache_size


def test_the_cache_drops_what_was_used_least_recently() -> None:
    backend = Counting()
    unroll = compiled(classifier(), backend=backend, cache_size=2, adjoint=Unrolled())
    made: list[int] = []
    with torch.no_grad():
        for size in (6, 5, 6, 4, 6, 5):
            unroll.adapt(data(size))
            made.append(len(backend.compiled))
    assert made == [1, 2, 2, 3, 3, 4], "the third shape takes the place of 5, not of 6"


def test_shapes_of_query_and_prediction_are_cached_likewise() -> None:
    backend = Counting()
    unroll = compiled(classifier(), backend=backend, cache_size=1, adjoint=Replay())
    support = data()
    with torch.no_grad():
        adapted = unroll.adapt(support)
        made: list[int] = []
        for size in (5, 5, 4, 5):
            unroll(support, data(size))
            adapted(data(size)[0])
            made.append(len(backend.compiled))
    assert made == [3, 3, 5, 7]


def test_data_of_another_dtype_is_another_shape() -> None:
    unroll = compiled(classifier(), adjoint=Unrolled())
    x, y = data()
    with torch.no_grad():
        a, b = unroll.adapt((x, y)), unroll.adapt((x, y.to(torch.uint8)))
    assert count(unroll) == 2
    assert torch.equal(a.losses, b.losses)


def test_python_values_among_the_inputs_are_part_of_the_shape() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: float, flag: bool | None = None) -> Tensor:
            h = self.layer(x) * scale
            return -h if flag is True else h

    model = Scaled()
    x, y = data()
    unroll = compiled(model)
    for extra in ({"scale": 1.0}, {"scale": 2.0}, {"scale": 1.0, "flag": True}, {"scale": 1.0, "flag": 1}):
        inputs = {"x": x, **extra}
        with torch.no_grad():
            found, expected = unroll.adapt((inputs, y)).losses[0], F.cross_entropy(model(**inputs), y)
            torch.testing.assert_close(found, expected)


# --- what is read anew at every call


def test_changing_a_learning_rate_compiles_nothing() -> None:
    model = classifier()
    opt = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}], lr=0.1)
    unroll = compiled(model, opt, k=3)
    support, query = data(), data(7)
    unroll.warmup(support, query)
    warm = count(unroll)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for _ in range(3):
        assert_same(unroll.adapt(support).params, stepped_groups(model, opt, support, 3))
        unroll(support, query).backward()
        opt.step()
        schedule.step()
        opt.param_groups[0]["lr"] = 1.7 * float(opt.param_groups[0]["lr"])
        opt.zero_grad()
    with torch.no_grad():
        unroll.adapt(support)
    assert not any("pullback" in name and name.startswith("adapt") for name in unroll.graphs())
    assert count(unroll) == warm


def stepped_groups(model: nn.Sequential, opt: torch.optim.Optimizer, support: Batch, k: int) -> dict[str, Tensor]:
    """As `stepped`, by hand, for plain gradient descent with one learning rate a layer."""
    twin = copy.deepcopy(model)
    for _ in range(k):
        grads = torch.autograd.grad(F.cross_entropy(twin(support[0]), support[1]), list(twin.parameters()))
        with torch.no_grad():
            for (name, param), grad in zip(twin.named_parameters(), grads, strict=True):
                param -= opt.param_groups[0 if name.startswith("0.") else 1]["lr"] * grad
    return {name: param.detach() for name, param in twin.named_parameters()}


def test_turning_momentum_on_makes_a_new_plan() -> None:
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    unroll = compiled(model, opt, k=3)
    support = data()
    with torch.no_grad():
        unroll.adapt(support)
    plain = count(unroll)
    for momentum in (0.9, 0.5, 0.0):
        opt.param_groups[0]["momentum"] = momentum
        with torch.no_grad():
            found = unroll.adapt(support)
        with torch.enable_grad():
            assert_same(found.params, stepped(model, opt, support, 3))
    assert count(unroll) == 2 * plain, "with momentum and without, whatever its value"


@pytest.mark.parametrize("change", [{"weight_decay": 0.1}, {"maximize": True}, {"nesterov": True, "momentum": 0.8}], ids=str)
def test_other_settings_are_seen_too(change: dict[str, Any]) -> None:
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    unroll = compiled(model, opt, k=2)
    support = data()
    unroll.adapt(support)
    opt.param_groups[0].update(change)
    assert_same(unroll.adapt(support).params, stepped(model, opt, support, 2))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_optimisers_state_is_branched_from_as_it_stands(kind: Any) -> None:
    model = classifier()
    opt = kind(model.parameters(), lr=0.05, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    unroll = compiled(model, opt, k=2)
    support = data()
    unroll.warmup(support)
    warm = count(unroll)
    for _ in range(3):
        with torch.no_grad():
            found = unroll.adapt(support)
        state = copy.deepcopy(opt.state_dict())
        assert_same(found.params, stepped(model, opt, support, 2))
        assert str(opt.state_dict()) == str(state)
        opt.zero_grad()
        F.cross_entropy(model(support[0]), support[1]).backward()
        opt.step()
    assert count(unroll) == warm


def test_the_models_mode_is_seen() -> None:
    model = normed()
    unroll = compiled(model, k=1)
    support = data()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        trained = unroll.adapt(support)
        one = count(unroll)
        model.eval()
        evaluated = unroll.adapt(support)
        two = count(unroll)
        assert two > one
        model.train()
        unroll.adapt(support)
        model[1].eval()
        partly = unroll.adapt(support)
    assert count(unroll) > two, "the mode of one layer is seen as well"
    assert int(trained.buffers["1.num_batches_tracked"]) == 1
    assert int(evaluated.buffers["1.num_batches_tracked"]) == 0
    assert all(torch.equal(value, before[name]) for name, value in evaluated.buffers.items())
    assert all(torch.equal(value, before[name]) for name, value in partly.buffers.items())
    model.eval()
    torch.testing.assert_close(evaluated.losses[0], F.cross_entropy(model(support[0]), support[1]).detach())


def test_the_mode_is_seen_by_predictions() -> None:
    model = normed()
    unroll = compiled(model, k=1)
    adapted = unroll.adapt(data())
    x = torch.randn(50, 4)
    assert not torch.equal(adapted(x), adapted(x)), "dropout"
    model.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_the_models_tensors_are_read_at_every_call() -> None:
    model = normed().eval()
    unroll = compiled(model, k=1)
    support = data()

    def check() -> None:
        torch.testing.assert_close(unroll.adapt(support).losses[0].detach(), F.cross_entropy(model(support[0]), support[1]).detach())

    check()
    made = count(unroll)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2)
    check()
    model[0].weight.data = torch.randn(5, 4)
    check()
    model[0].bias = nn.Parameter(torch.randn(5))
    check()
    model[1].running_mean = torch.randn(5)
    check()
    model.load_state_dict(normed().state_dict())
    check()
    assert count(unroll) == made


def test_nothing_of_the_model_changes() -> None:
    model = normed()
    model[0].register_forward_hook(lambda module, args, output: output.mul(1.5))
    opt = torch.optim.Adam(model.parameters())
    unroll = compiled(model, opt)
    support, query = data(), data()
    before, modes, ids = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()], [id(p) for p in model.parameters()]
    adapted = unroll.adapt(support)
    adapted(query[0]).sum().backward()
    unroll(support, query)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [part.training for part in model.modules()]
    assert ids == [id(p) for p in model.parameters()]
    assert len(model[0]._forward_hooks) == 1
    assert not opt.state


# --- explain and graphs


def test_explain_before_anything_is_compiled() -> None:
    report = compiled(classifier()).explain()
    assert report.programs == ()
    assert "nothing compiled yet" in str(report)
    assert "2 steps" in str(report)
    assert "eager" in str(report)


def test_explain_counts_what_can_be_counted_by_hand() -> None:
    model = nn.Linear(4, 3)
    unroll = compiled(model, k=1, adjoint=Replay())
    unroll.warmup(data(6), data(7))
    reports = {report.name: report for report in unroll.explain().programs}
    assert set(reports) == set(unroll.graphs()) == {"step", "predict", "query pullback", "step pullback"}
    assert reports["predict"].flops == 2 * 7 * 4 * 3
    assert reports["step"].flops == 2 * 2 * 6 * 4 * 3, "forward, and the gradient of the weight"
    params = 4 * (4 * 3 + 3)
    learning_rate = 8
    assert reports["predict"].num_bytes == params + 4 * 7 * 4 + 4 * 7 * 3
    assert reports["step"].num_bytes == params + learning_rate + (4 * 6 * 4 + 8 * 6) + params + 4
    for name, report in reports.items():
        assert report.num_nodes == unroll.graphs()[name].num_nodes > 0
        assert report.passes == unroll.graphs()[name].history
        assert {record.name for record in report.passes} >= {"functionalise", "remove_identities", "merge_duplicates", "own_outputs"}
        assert report.passes[-1].num_nodes_after == report.num_nodes
        assert report.capture_s > 0
        assert report.compile_s >= 0
    text = str(unroll.explain())
    for part in ("step pullback", "MFLOP", "MB", "passes: ", "functionalise", "float32[6, 4]", "float32[7, 4]", "captured in"):
        assert part in text


@pytest.mark.parametrize(("k", "expected"), [(1, "Unrolled()"), (2, "Unrolled()"), (200, "Stash()")])
def test_auto_chooses_by_size_and_says_why(k: int, expected: str) -> None:
    unroll = compiled(classifier(), k=k)
    with torch.no_grad():
        unroll.adapt(data())
    ((shapes, adjoint, reason),) = unroll.explain().adjoints
    assert shapes == "float32[6, 4], int64[6]"
    assert adjoint == expected
    assert f"{k} steps of " in reason
    assert "cpu" in reason
    assert reason in str(unroll.explain())


def test_an_adjoint_that_was_asked_for_is_used() -> None:
    unroll = compiled(classifier(), k=200, adjoint=Replay(every=7))
    with torch.no_grad():
        unroll.adapt(data())
    ((_, adjoint, reason),) = unroll.explain().adjoints
    assert (adjoint, reason) == ("Replay(every=7)", "asked for")


@pytest.mark.parametrize("adjoint", [Unrolled(), Replay()], ids=str)
def test_graphs_are_readable_and_run(adjoint: adaptrt.Adjoint) -> None:
    unroll = compiled(classifier(), adjoint=adjoint)
    unroll.warmup(data(), data())
    for graph in unroll.graphs().values():
        assert str(graph).startswith(f"graph of {graph.num_nodes} operations")
        assert any(entry.name.startswith("carry.params.0.weight") for entry in graph.signature.inputs)


def test_the_number_of_programs_of_replay_does_not_grow_with_k() -> None:
    sizes = []
    for k in (2, 9):
        unroll = compiled(classifier(), k=k, adjoint=Replay())
        unroll(data(), data()).backward()
        sizes.append({report.name: report.num_nodes for report in unroll.explain().programs})
    assert sizes[0] == sizes[1]


# --- what adapt returns


def test_adapted_holds_everything() -> None:
    model = normed()
    unroll = compiled(model, adaptrt.optim.adam(), k=3)
    result = unroll.adapt(data())
    named = dict(model.named_parameters())
    assert {name: value.shape for name, value in result.params.items()} == {name: value.shape for name, value in named.items()}
    assert {name: value.shape for name, value in result.buffers.items()} == {name: value.shape for name, value in model.named_buffers()}
    assert result.losses.shape == (3,)
    assert result.num_tasks is None
    assert int(result.buffers["1.num_batches_tracked"]) == 3
    assert result.opt_state["0.weight"].exp_avg.shape == (5, 4)
    batch = torch.randn(2, 6, 4), torch.randint(3, (2, 6))
    tasks = unroll.vmap().adapt(batch)
    assert {name: value.shape for name, value in tasks.params.items()} == {name: (2, *value.shape) for name, value in named.items()}
    assert tasks.losses.shape == (2, 3)
    assert tasks.num_tasks == 2


class Tied(nn.Module):
    """Tied weights, a module used twice, a buffer that is not saved, one that is, and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.embed.weight
        self.alias = self.again
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]), persistent=False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.shift = torch.tensor(0.25)

    def forward(self, x: Tensor) -> Tensor:
        h = self.alias(self.again(self.embed(x))) * self.mask * self.scale + self.shift  # type: ignore[operator]
        return self.head(self.norm(h))


@pytest.mark.parametrize("make", [classifier, normed, Tied])
@pytest.mark.parametrize("only_head", [False, True], ids=["all", "head"])
def test_state_dict_loads_into_a_fresh_model(make: Callable[[], nn.Module], only_head: bool) -> None:
    model = make()
    last = list(model.named_modules())[-1][0] if make is not Tied else "head"
    unroll = compiled(model, k=3, params=f"{last}.*" if only_head else None)
    adapted = unroll.adapt(data(12))
    saved = adapted.state_dict()
    assert list(saved) == list(model.state_dict())
    assert not any(value.requires_grad for value in saved.values())
    fresh = make()
    fresh.load_state_dict(saved, strict=True)
    model.eval()
    fresh.eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(fresh(x), adapted(x))
    assert not torch.allclose(fresh(x), model(x))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, saved[name])}
    buffers = {name for name, _ in model.named_buffers()}
    if only_head:
        assert changed - buffers == {f"{last}.weight", f"{last}.bias"}
    if make is Tied:
        assert "mask" not in saved
        assert torch.equal(saved["embed.weight"], saved["again.weight"])
        assert torch.equal(saved["again.weight"], saved["alias.weight"])


def test_results_are_the_callers_own() -> None:
    """Writing to a result changes neither the model nor another result."""
    model = normed()
    unroll = compiled(model, params="3.*")
    with torch.no_grad():
        support = data()
        first, second = unroll.adapt(support), unroll.adapt(support)
        before = copy.deepcopy(model.state_dict())
        kept = {name: value.clone() for name, value in second.params.items()}
        for value in (*first.params.values(), *first.buffers.values(), first.losses):
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in second.params.items())


@pytest.mark.parametrize("opt", [adaptrt.optim.sgd(0.1, momentum=0.9), adaptrt.optim.adam(0.05)], ids=["momentum", "adam"])
@pytest.mark.parametrize("vmap", [False, True], ids=["single", "vmap"])
def test_start_goes_on_where_it_stopped(opt: adaptrt.optim.Optimizer, vmap: bool) -> None:
    model = classifier()
    short, long = compiled(model, opt, k=2), compiled(model, opt, k=4)
    support = data()
    if vmap:
        short, long = short.vmap(), long.vmap()
        support = torch.randn(2, 6, 4), torch.randint(3, (2, 6))
    half = short.adapt(support)
    whole = short.adapt(support, start=half)
    expected = long.adapt(support)
    assert_same(whole.params, expected.params)
    torch.testing.assert_close(torch.cat([half.losses, whole.losses], -1), expected.losses)
    torch.testing.assert_close(short(support, support, start=half), long(support, support))


def test_a_start_without_tasks_serves_all_tasks() -> None:
    model = classifier()
    unroll = compiled(model, adaptrt.optim.sgd(0.1, momentum=0.9))
    start = unroll.adapt(data())
    support = torch.randn(2, 6, 4), torch.randint(3, (2, 6))
    tasks = unroll.vmap().adapt(support, start=start)
    for task in range(2):
        alone = unroll.adapt((support[0][task], support[1][task]), start=start)
        assert_same({name: value[task] for name, value in tasks.params.items()}, alone.params)


def test_per_step_takes_one_batch_after_the_other() -> None:
    model = classifier()
    one, three = compiled(model, k=1), compiled(model, k=3, per_step=True)
    xs, ys = torch.randn(3, 6, 4), torch.randint(3, (3, 6))
    result: adaptrt.Adapted | None = None
    for x, y in zip(xs, ys, strict=True):
        result = one.adapt((x, y), start=result)
    assert result is not None
    assert_same(three.adapt((xs, ys)).params, result.params)


# --- predictions and the forms of inputs and outputs


@dataclasses.dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None
    name: str = "output"


class Named(NamedTuple):
    logits: Tensor
    hidden: list[Tensor]


class Two(nn.Module):
    """Takes two tensors, by position or keyword; returns what `form` says."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.form = form

    def forward(self, x: Tensor, shift: Tensor, target: Tensor | None = None) -> Any:
        logits = self.layer(x) + shift
        loss = None if target is None else F.cross_entropy(logits, target)
        if self.form == "dataclass":
            return Output(logits, loss)
        if self.form == "dict":
            return {"logits": logits, "loss": loss}
        if self.form == "named":
            return Named(logits, [x * 2])
        return logits if loss is None else loss


def two_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 4), torch.randn(6, 3), torch.randint(3, (6,))


@over_pairs(
    support_form=by_name(["positional", "keyword"]), call_form=by_name(["positional", "keyword", "tuple", "dict"]), vmap=SINGLE_AND_TASKS
)
def test_inputs_by_position_and_by_keyword(support_form: str, call_form: str, vmap: bool) -> None:
    x, shift, y = two_inputs()
    if vmap:
        x, shift, y = (torch.stack([value, value.flip(0)]) for value in (x, shift, y))
    model = Two()
    unroll = compiled(model)
    unroll = unroll.vmap() if vmap else unroll
    inputs: Any = (x, shift) if support_form == "positional" else {"shift": shift, "x": x}
    adapted = unroll.adapt((inputs, y))
    if call_form == "positional":
        found = adapted(x, shift)
    elif call_form == "keyword":
        found = adapted(shift=shift, x=x)
    else:
        found = adapted((x, shift)) if call_form == "tuple" else adapted({"x": x, "shift": shift})
    weight, bias = adapted.params["layer.weight"], adapted.params["layer.bias"]
    expected = x @ weight.mT + (bias.unsqueeze(-2) if vmap else bias) + shift
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", ["dataclass", "dict", "named"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_outputs_keep_their_form(form: str, grad: bool) -> None:
    x, shift, y = two_inputs()
    model = Two(form)
    unroll = compiled(model, loss=lambda output, target: F.cross_entropy(output["logits"] if form == "dict" else output.logits, target))
    with torch.set_grad_enabled(grad):
        found = unroll.adapt(((x, shift), y))(x, shift)
    if form == "dict":
        assert found["loss"] is None
        logits = found["logits"]
    else:
        logits = found.logits
        assert isinstance(found, Output if form == "dataclass" else Named)
        assert (found.name, found.loss) == ("output", None) if isinstance(found, Output) else torch.equal(found.hidden[0], x * 2)
    assert logits.shape == (6, 3)
    assert logits.requires_grad == grad


def test_predictions_with_a_task_axis_are_those_of_each_task() -> None:
    model = normed().eval()
    unroll = compiled(model, k=2)
    xs, ys, queries = torch.randn(3, 6, 4), torch.randint(3, (3, 6)), torch.randn(3, 5, 4)
    adapted = unroll.vmap().adapt((xs, ys))
    found = adapted(queries)
    assert found.shape == (3, 5, 3)
    for task in range(3):
        alone = unroll.adapt((xs[task], ys[task]))
        torch.testing.assert_close(found[task], alone(queries[task]))
        torch.testing.assert_close(adapted.losses[task], alone.losses)


def test_the_meta_loss_of_tasks_is_their_mean() -> None:
    model = classifier()
    unroll = compiled(model)
    xs, ys = torch.randn(3, 6, 4), torch.randint(3, (3, 6))
    found = unroll.vmap()((xs, ys), (xs.flip(1), ys.flip(1)))
    alone = [unroll((x, y), (x.flip(0), y.flip(0))) for x, y in zip(xs, ys, strict=True)]
    assert found.shape == ()
    torch.testing.assert_close(found, torch.stack(alone).mean())


def test_predictions_do_not_update_buffers() -> None:
    model = normed()
    adapted = compiled(model).adapt(data())
    before = {name: value.clone() for name, value in adapted.buffers.items()}
    adapted(torch.randn(9, 4))
    assert all(torch.equal(value, before[name]) for name, value in adapted.buffers.items())


# --- randomness


@pytest.mark.parametrize("vmap", [False, True], ids=["single", "vmap"])
def test_a_generator_reproduces(vmap: bool) -> None:
    model = normed()
    unroll = compiled(model, k=2)
    support = (torch.randn(2, 6, 4), torch.randint(3, (2, 6))) if vmap else data()
    unroll = unroll.vmap() if vmap else unroll
    state = torch.get_rng_state()

    def run(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        adapted = unroll.adapt(support, generator=generator)
        return [adapted.losses, adapted(support[0], generator=generator), unroll(support, support, generator=generator)]

    for one, other, third in zip(run(1), run(1), run(2), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, third)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not used"


def test_the_global_generator_is_used_without_one() -> None:
    unroll = compiled(normed(), k=2)
    support = data()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(unroll.adapt(support).losses)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_steps_and_tasks_have_noise_of_their_own() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 1))
    x, y = torch.ones(1, 40), torch.ones(1, 1)
    losses = compiled(model, adaptrt.optim.sgd(0.0), k=3).adapt((x, y)).losses
    assert len(set(losses.tolist())) == 3
    tasks = compiled(model, adaptrt.optim.sgd(0.0), k=1).vmap().adapt((x.expand(3, 1, 40), y.expand(3, 1, 1))).losses
    assert len(set(tasks.flatten().tolist())) == 3


# --- which parameters adapt


SELECTIONS: list[tuple[str, Any, set[str]]] = [
    ("all", None, {"0.weight", "0.bias", "2.weight", "2.bias"}),
    ("glob", "2.*", {"2.weight", "2.bias"}),
    ("glob across", "*.bias", {"0.bias", "2.bias"}),
    ("name", "0.weight", {"0.weight"}),
    ("list", ["0.weight", "2.b*"], {"0.weight", "2.bias"}),
    ("tuple", ("0.*", "nothing.*"), {"0.weight", "0.bias"}),
    ("predicate", lambda name, param: param.dim() == 1, {"0.bias", "2.bias"}),
]


@pytest.mark.parametrize(("select", "expected"), [row[1:] for row in SELECTIONS], ids=[row[0] for row in SELECTIONS])
def test_forms_of_params(select: Any, expected: set[str]) -> None:
    model = classifier()
    adapted = compiled(model, params=select).adapt(data())
    assert set(adapted.params) == expected
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) == (name not in expected)


def test_an_optimiser_of_the_head_adapts_the_head() -> None:
    model = classifier()
    model[0].bias.requires_grad_(False)
    unroll = compiled(model, torch.optim.SGD(model[2].parameters(), lr=0.1))
    assert set(unroll.adapt(data()).params) == {"2.weight", "2.bias"}
    unroll(data(), data()).backward()
    assert model[0].weight.grad is not None, "what does not adapt is still learned"
    assert model[0].bias.grad is None, "what is frozen is not"


def test_frozen_parameters_do_not_adapt() -> None:
    model = classifier()
    model[0].requires_grad_(False)
    assert set(compiled(model).adapt(data()).params) == {"2.weight", "2.bias"}
    assert set(compiled(model, torch.optim.SGD(model.parameters(), lr=0.1)).adapt(data()).params) == {"2.weight", "2.bias"}


# --- losses


def test_default_losses() -> None:
    x, y = data()
    model = classifier()
    found = compiled(model).adapt((x, y)).losses[0]
    torch.testing.assert_close(found, F.cross_entropy(model(x), y), check_dtype=True)
    found = compiled(model).adapt((x, y.int())).losses[0]
    torch.testing.assert_close(found, F.cross_entropy(model(x), y))
    t = torch.randn(6, 3)
    torch.testing.assert_close(compiled(model).adapt((x, t)).losses[0], F.mse_loss(model(x), t))


@pytest.mark.parametrize("form", ["scalar", "dataclass", "dict"])
def test_models_that_return_their_loss(form: str) -> None:
    x, shift, y = two_inputs()
    model = Two(form)
    unroll = compiled(model)
    inputs = {"x": x, "shift": shift, "target": y}
    adapted = unroll.adapt((inputs,))
    torch.testing.assert_close(adapted.losses[0], F.cross_entropy(model.layer(x) + shift, y))
    assert adapted.losses[1] < adapted.losses[0]
    unroll((inputs,), (inputs,)).backward()
    assert model.layer.weight.grad is not None


def entropy(output: Tensor) -> Tensor:
    return -(output.softmax(-1) * output.log_softmax(-1)).sum(-1).mean()


def test_label_free_losses() -> None:
    """Entropy minimisation (Wang et al. 2021): adaptation without targets, here of the normalisation layer alone."""
    model = normed()
    model[2].eval()
    x, y = data(16)
    unroll = compiled(model, adaptrt.optim.sgd(0.5), k=4, loss=entropy, params="1.*")
    adapted = unroll.adapt((x,))
    assert set(adapted.params) == {"1.weight", "1.bias"}
    torch.testing.assert_close(adapted.losses[0], entropy(copy.deepcopy(model)(x)))
    assert (adapted.losses.diff() < 0).all()
    unroll((x,), (x,)).backward()
    assert model[0].weight.grad is not None
    F.cross_entropy(adapted(x), y).backward()
    tasks = unroll.vmap().adapt((torch.stack([x, x.flip(0)]),))
    torch.testing.assert_close(tasks.losses[0], adapted.losses)


class Learned(nn.Module):
    """A loss with a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return F.cross_entropy(output * self.weight, target)


def test_a_loss_that_is_a_module_is_meta_learned_and_left_alone() -> None:
    model, loss = classifier(), Learned()
    unroll = compiled(model, loss=loss)
    adapted = unroll.adapt(data())
    assert set(adapted.buffers) == set()
    unroll(data(), data()).backward()
    assert loss.weight.grad is not None
    assert loss.weight.grad.abs().sum() > 0
    assert float(loss.calls) == 0


# --- gradients on and off


def test_inference_mode_and_training_share_an_unroll() -> None:
    """Nothing that was made in inference mode is in the way of autograd later, and the other way round."""
    model = normed()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    unroll = compiled(model, opt)
    support, query = data(), data()
    for _ in range(2):
        with torch.inference_mode():
            adapted = unroll.adapt(support)
            logits = adapted(query[0])
            loss = unroll(support, query)
        assert not any(value.requires_grad for value in (logits, loss, adapted.losses, *adapted.params.values()))
        with torch.no_grad():
            assert not unroll.adapt(support).losses.requires_grad
        loss = unroll(support, query)
        assert loss.requires_grad
        loss.backward()
        result = unroll.adapt(support)
        F.cross_entropy(result(query[0]), query[1]).backward()
        with torch.inference_mode():
            unroll.adapt(support, start=result)


def test_backward_of_adapt_and_of_the_meta_loss_agree() -> None:
    model = classifier()
    unroll = compiled(model)
    support, query = data(), data(7)
    unroll(support, query).backward()
    found = [param.grad for param in model.parameters()]
    model.zero_grad()
    F.cross_entropy(unroll.adapt(support)(query[0]), query[1]).backward()
    for one, param in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, param.grad)


def test_a_loss_scaled_by_the_caller_scales_the_gradient() -> None:
    model = classifier()
    unroll = compiled(model)
    support, query = data(), data()
    (one,) = torch.autograd.grad(unroll(support, query), [model.get_parameter("0.weight")])
    (three,) = torch.autograd.grad(3 * unroll(support, query) + 1, [model.get_parameter("0.weight")])
    torch.testing.assert_close(three, 3 * one)


# --- processes of their own


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in an empty environment."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": root, "HOME": "/nonexistent", "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_compiler_there_is_one_warning_and_the_eager_backend(tmp_path: Path) -> None:
    done = python(
        """
        import warnings
        import torch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import adaptrt
            from torch import nn
            model = nn.Linear(4, 3)
            batch = torch.randn(6, 4), torch.randint(3, (6,))
            for _ in range(3):
                unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 2)
                unroll(batch, batch).backward()
                unroll.adapt(batch)(batch[0])
        ours = [entry for entry in caught if issubclass(entry.category, adaptrt.errors.CompilerUnavailable)]
        print(len(ours), unroll.explain().backend, model.weight.grad is not None)
        print(ours[0].message)
        print(ours[0].filename)
        """,
        PATH="/nonexistent",
        CXX="/nonexistent",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),  # nothing was built there
    )
    assert done.returncode == 0, done.stderr
    first, message, filename = done.stdout.splitlines()
    assert first == "1 eager True"
    assert "/nonexistent" in message or "C++ compiler" in message
    assert "eager backend" in message
    assert "Install" in message
    assert filename == "<string>", "the warning points at the caller of compile_unroll"


def test_asking_for_eager_without_a_compiler_warns_of_nothing() -> None:
    done = python(
        """
        import warnings
        import torch, adaptrt
        from torch import nn
        warnings.simplefilter("error")
        batch = torch.randn(6, 4), torch.randint(3, (6,))
        adaptrt.compile_unroll(nn.Linear(4, 3), adaptrt.optim.sgd(0.1), 2, backend="eager").adapt(batch)
        """,
        PATH="/nonexistent",
        CXX="/nonexistent",
    )
    assert done.returncode == 0, done.stderr


def test_importing_compiles_nothing_and_touches_no_device() -> None:
    done = python(
        """
        import subprocess, sys, warnings
        import torch
        if torch.version.cuda is not None and torch.__version__ < (2, 14):
            torch._subclasses.FakeTensorMode()  # adaptrt.graph.capture says why it makes one; some versions import Triton for it
        of_torch = set(sys.modules)
        before = torch.get_rng_state()
        threads = torch.get_num_threads()
        warnings.simplefilter("error")

        def refuse(*args, **kwargs):
            raise AssertionError(f"a process was started: {args}")

        subprocess.Popen.__init__ = refuse
        import adaptrt
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == threads
        assert torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32
        assert not torch.cuda.is_initialized()
        for name in ("torch._inductor.compile_fx", "triton", "sklearn", "matplotlib"):
            assert name in of_torch or name not in sys.modules, name
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_start_knows_its_leaves_in_their_order() -> None:
    """Gradients go back by that order."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    opt = torch.optim.Adam(model[0].parameters(), lr=0.1)
    params = dict(model.named_parameters())
    adapted = {name: param for name, param in params.items() if name.startswith("0.")}
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.ones(2))
    reader = Reader(model, loss, nn.GaussianNLLLoss(), frozenset(adapted), source(opt, adapted), torch.device("cpu"))
    for _ in range(2):
        start = reader.read()
        assert [list(map(id, leaves)) for leaves in (start.carry_leaves, start.fixed_leaves)] == [
            list(map(id, tree.leaves(part))) for part in (start.carry, start.fixed)
        ]
        model(torch.randn(5, 3)).sum().backward()
        opt.step()  # which gives it a state


def test_a_state_names_its_tensors() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    opt = adaptrt.optim.sgd(lr=0.1, momentum=0.9)
    state = adaptrt.compile_unroll(model, opt, 1, loss=F.mse_loss, backend="eager").adapt((torch.randn(4, 3), torch.randn(4, 2))).state
    named = state.named_tensors()
    assert named["params.0.weight"] is state.params["0.weight"]
    assert named["buffers.1.running_mean"] is state.buffers["1.running_mean"]
    assert "opt_state.0.weight.momentum_buffer" in named
    assert list(map(id, named.values())) == list(map(id, tree.leaves(state.carry)))
