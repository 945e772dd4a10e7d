"""`adaptrt.trace` of every model in the table against the model itself, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import adaptrt
from adaptrt import tree
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.lift_noise import lift_noise
from adaptrt.graph.signature import Role
from adaptrt.graph.verify import verify
from tests import naive
from tests.models import MODELS, Entry
from tests.tolerances import assert_ulps

over_models = pytest.mark.parametrize("entry", MODELS.values(), ids=MODELS)


def positional(inputs: Any) -> tuple[Any, ...]:
    if isinstance(inputs, dict):
        return tuple(inputs.values())
    return inputs if isinstance(inputs, tuple) else (inputs,)


def noise_for(graph: Graph) -> tuple[Tensor, ...]:
    """Some noise: zeros and ones for masks, permutations for indices."""
    specs = [entry.spec for entry in graph.signature.inputs if entry.role is Role.NOISE]
    generator = Generator().manual_seed(7)
    return tuple(
        torch.empty(spec.shape, dtype=spec.dtype).bernoulli_(0.7, generator=generator)
        if spec.dtype.is_floating_point
        else torch.randperm(spec.shape[0], generator=generator)
        for spec in specs
    )


def hooks(model: nn.Module) -> list[int]:
    """How many hooks each module has, of each kind."""
    return [len(held) for part in model.modules() for name, held in vars(part).items() if name.endswith("_hooks")]


@over_models
def test_forward_equals_eager(entry: Entry) -> None:
    model, args = entry.model(), positional(entry.data(1, 4)[0])
    graph = adaptrt.trace(model, *args)
    noise, other = noise_for(graph), positional(entry.data(2, 4)[0])
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    got, got_buffers = graph.run(params, buffers, noise, other)
    twin = entry.model()
    with torch.no_grad(), lift_noise(noise):
        wanted, wanted_buffers = naive.call(twin, params, buffers, other)
    assert tree.paths(got) == tree.paths(wanted)
    for value, expected in zip(tree.leaves(got), tree.leaves(wanted), strict=True):
        assert_ulps(value, expected)
    assert list(got_buffers) == list(buffers)
    for name, expected in wanted_buffers.items():
        assert_ulps(got_buffers[name], expected)


@over_models
def test_module_itself_agrees(entry: Entry) -> None:
    # The test above calls the model as a function, this one as users do: buffers change in place.
    if entry.random:
        pytest.skip("a module called on its own draws its own noise")
    model, args = entry.model(), positional(entry.data(1, 4)[0])
    params, buffers = dict(model.named_parameters()), {name: value.clone() for name, value in model.named_buffers()}
    got, got_buffers = adaptrt.trace(model, *args).run(params, buffers, (), args)
    wanted = model(*args)
    for value, expected in zip(tree.leaves(got), tree.leaves(wanted), strict=True):
        assert_ulps(value, expected.detach())
    for name, expected in model.named_buffers():
        assert_ulps(got_buffers[name], expected.detach())


@over_models
def test_signature_and_text(entry: Entry) -> None:
    model, args = entry.model(), positional(entry.data(1, 4)[0])
    graph = adaptrt.trace(model, *args)
    assert verify(graph) is graph
    by_role = {role: [row for row in graph.signature.inputs if row.role is role] for role in Role}
    assert [row.name for row in by_role[Role.PARAM]] == [f"params.{name}" for name, _ in model.named_parameters()]
    assert [row.name for row in by_role[Role.BUFFER]] == [f"buffers.{name}" for name, _ in model.named_buffers()]
    assert [row.spec for row in by_role[Role.DATA]] == [tree.Spec.of(leaf) for leaf in tree.leaves(args)]
    assert [row.name for row in by_role[Role.DATA]] == tree.paths(args, "inputs")
    assert bool(by_role[Role.NOISE]) == entry.random
    assert len(by_role[Role.CONST]) == len(graph.constants)
    text, table = str(graph), str(graph.signature)
    assert text.splitlines()[0] == (
        f"graph of {graph.num_nodes} operations, {len(graph.signature.inputs)} inputs, {len(graph.signature.outputs)} outputs"
    )
    assert text.splitlines()[-1].startswith("  return result.0")
    assert len(text.splitlines()) == graph.num_nodes + len(graph.signature.inputs) + 2
    for row in graph.signature.inputs:
        assert row.name in text and row.name in table and row.role.value in table
    for row in graph.signature.outputs:
        assert row.name in text and row.name in table
    assert "?" not in text and " at 0x" not in text


@over_models
def test_model_is_untouched(entry: Entry) -> None:
    model, args = entry.model(), positional(entry.data(1, 4)[0])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    keys = [sorted(vars(part)) for part in model.modules()]
    attributes = [dict(vars(part)) for part in model.modules()]
    tensors = [*map(id, model.parameters()), *map(id, model.buffers())]
    modes, hooked, random = [part.training for part in model.modules()], hooks(model), torch.get_rng_state()
    graph = adaptrt.trace(model, *args)
    graph.run(dict(model.named_parameters()), dict(model.named_buffers()), noise_for(graph), args)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [sorted(vars(part)) for part in model.modules()] == keys
    for part, before in zip(model.modules(), attributes, strict=True):
        assert all(vars(part)[name] is value for name, value in before.items() if isinstance(value, Tensor))
    assert [*map(id, model.parameters()), *map(id, model.buffers())] == tensors
    assert [part.training for part in model.modules()] == modes
    assert hooks(model) == hooked
    assert all(param.grad is None for param in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_constants_are_lifted_by_reference() -> None:
    model = MODELS["attributes"].model()
    graph = adaptrt.trace(model, MODELS["attributes"].data(1, 4)[0])
    assert isinstance(model.scale, Tensor)
    assert [row.role for row in graph.signature.inputs].count(Role.CONST) == 3
    assert any(value is model.scale for value in graph.constants)


def test_tied_tensor_is_one_input() -> None:
    model = MODELS["tied"].model()
    graph = adaptrt.trace(model, MODELS["tied"].data(1, 4)[0])
    names = [row.name for row in graph.signature.inputs if row.role is Role.PARAM]
    assert names == ["params.embed.weight", "params.hidden.weight", "params.hidden.bias", "params.head.bias"]


def test_run_refuses_another_structure() -> None:
    entry = MODELS["mlp"]
    model, (x, _) = entry.model(), entry.data(1, 4)
    graph = adaptrt.trace(model, x)
    with pytest.raises(ValueError, match="structure"):
        graph.run(dict(model.named_parameters()), {}, (), (x, x))


def test_run_records_nothing_for_autograd() -> None:
    entry = MODELS["mlp"]
    model, (x, _) = entry.model(), entry.data(1, 4)
    output, _ = adaptrt.trace(model, x).run(dict(model.named_parameters()), {}, (), (x,))
    assert not output.requires_grad


def test_history_tells_what_each_pass_did() -> None:
    entry = MODELS["in-place"]
    graph = adaptrt.trace(entry.model(), entry.data(1, 4)[0])
    assert [record.name for record in graph.history] == [
        "functionalise",
        "numbers_as_tensors",
        "relax_views",
        "remove_identities",
        "convolution_gradients",
        "merge_duplicates",
        "merge_sums",
        "own_outputs",
    ]
    assert graph.history[-1].num_nodes_after == graph.num_nodes
    assert all(a.num_nodes_after == b.num_nodes_before for a, b in zip(graph.history, graph.history[1:], strict=False))
