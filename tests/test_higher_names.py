"""The names that programs import from the original's modules, also those that it does not document: each is here and means the same."""

from __future__ import annotations

import collections
import importlib
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt.errors import AdaptrtError
from tests.higher_cases import STEPS, Shared, assert_same, batch, loss_of, make, ours, over_both, quietly, theirs

pytestmark = pytest.mark.usefixtures("double")

MODULES = ["", ".patch", ".optim", ".utils"]


def _names_of(module: types.ModuleType) -> list[str]:
    """The names that the original's modules define: not those that they import from elsewhere, nor type variables."""

    def is_its_own(value: Any) -> bool:
        if isinstance(value, types.ModuleType):
            return value.__name__.startswith("higher")
        if isinstance(value, typing.TypeVar):
            return False
        return not (inspect.isclass(value) or inspect.isfunction(value)) or value.__module__.startswith("higher")

    return [name for name, value in vars(module).items() if not name.startswith("__") and is_its_own(value)]


@pytest.mark.parametrize("suffix", MODULES)
def test_every_name_of_the_original_is_here(suffix: str) -> None:
    names = _names_of(importlib.import_module(f"higher{suffix}"))
    assert len(names) > 7
    mine = importlib.import_module(f"adaptrt.higher{suffix}")
    assert [name for name in names if not hasattr(mine, name)] == []


def test_type_aliases_can_be_used_in_signatures() -> None:
    base: Any = ours.optim.DifferentiableOptimizer

    class Update(base):
        def _update(self, grouped_grads: ours.optim._GroupedGradsType, **kwargs: Any) -> None:
            pass

    def function(
        state: ours.optim._StateType,
        closure: ours.optim._GradClosureType,
        override: ours.optim._OverrideType | None,
        callback: typing.Optional[ours.optim._GradCallbackType],  # noqa: UP045  # as programs of its time write it
        versions: ours.optim._OptMappingType,
        buffers: ours.patch._BufferType,
        encapsulator: ours.patch._EncapsulatorType,
        model: ours.patch._MonkeyPatchBase,
    ) -> None: ...

    hints = typing.get_type_hints(function, {"ours": ours, "typing": typing})
    assert len(hints) == 9
    assert Update.__mro__[1] is ours.optim.DifferentiableOptimizer


# --- handles


@over_both
def test_handles_and_their_parts_are_instances_of_the_base(package: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Tanh()))
    handle = package.monkeypatch(net)
    assert isinstance(handle, package.patch._MonkeyPatchBase)
    assert all(isinstance(part, package.patch._MonkeyPatchBase) for part in handle.modules())
    assert not any(isinstance(part, package.patch._MonkeyPatchBase) for part in net.modules())
    assert issubclass(package.patch._MonkeyPatchBase, nn.Module)


@over_both
def test_roots(package: Any) -> None:
    handle = package.monkeypatch(make("lstm"))
    assert [part.is_root for part in handle.modules()] == [True, False, False]
    assert all(part.root is handle for part in handle.modules())
    assert all(part.direct_submodule_call for part in handle.modules())


@over_both
def test_a_call_of_a_part_is_told_from_one_within_a_call(package: Any) -> None:
    handle = package.monkeypatch(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    seen = []
    handle[1].register_forward_hook(lambda *_: seen.append(handle.direct_submodule_call))
    handle(batch(0)[0])
    assert (seen, handle.direct_submodule_call) == ([False], True)


def test_boxed_forward() -> None:
    def run(package: Any) -> list[Tensor]:
        net = make("shared")
        x = batch(0)[0]
        found = []
        with package.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1), copy_initial_weights=False) as (handle, diffopt):
            for step in range(STEPS):
                handle._refill_params_box(None)
                found.append(handle.boxed_forward(x))
                diffopt.step(loss_of(handle, step))
            handle._refill_params_box(handle.init_fast_params)
            found.append(handle.boxed_forward(x))
            doubled = [2 * p for p in handle.parameters(time=2)]
            handle._refill_params_box(doubled)
            found.append(handle(x, params=doubled))
            grads = torch.autograd.grad(handle(x).sum() + found[1].sum(), list(net.parameters()))
            return [*found, *grads, *handle._expand_params(handle.fast_params), torch.tensor(handle._param_mapping)]

    assert_same(run(ours), quietly(lambda: run(theirs)))


def test_boxed_forward_needs_weights() -> None:
    with pytest.raises(ValueError, match="params must be given"):
        ours.patch.make_functional(nn.Linear(3, 2)).boxed_forward(torch.ones(1, 3))
    with pytest.raises(ValueError, match="params must be given"):
        ours.patch.make_functional(nn.Linear(3, 2))._refill_params_box(None)


def test_versions_may_be_cut_and_replaced() -> None:
    """Programs drop what they do not differentiate through."""

    def run(package: Any) -> list[Tensor]:
        net = make("mlp")
        with package.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1), copy_initial_weights=False) as (handle, diffopt):
            for step in range(STEPS):
                diffopt.step(loss_of(handle, step))
            latest = [p.detach().requires_grad_() for p in handle._fast_params[-1]]
            handle._fast_params = [latest]
            diffopt.step(loss_of(handle, 8))
            grads = torch.autograd.grad(loss_of(handle, 9), latest)
            return [*grads, *handle.parameters(), *handle.init_fast_params, torch.tensor(len(handle._fast_params))]

    assert_same(run(ours), quietly(lambda: run(theirs)))


def test_weights_written_into_the_list_of_the_latest() -> None:
    def run(package: Any) -> list[Tensor]:
        net = make("mlp")
        handle: Any = package.monkeypatch(net, copy_initial_weights=False)
        x = batch(0)[0]
        found = [handle(x)]
        handle.fast_params[1] = torch.full((5,), 0.5, requires_grad=True)
        found.append(handle(x))
        handle.fast_params[:] = [p * 2 for p in handle.fast_params]
        found.append(handle(x))
        return [*found, *torch.autograd.grad(found[-1].sum(), [*handle.init_fast_params])]

    assert_same(run(ours), quietly(lambda: run(theirs)))


class OwnNames(nn.Module):
    """A model with attributes of the names in question, of which it sets one only in its forward pass."""

    is_root = "a class attribute"

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Linear(3, 2)
        self.direct_submodule_call = 3.0

    def forward(self, x: Tensor) -> Tensor:
        self.boxed_forward = x.sum().item()
        return self.root(x) * self.direct_submodule_call

    def twice(self, x: Tensor) -> Tensor:
        return self.root(x) * self.direct_submodule_call * self.boxed_forward


def test_a_models_own_names_come_first() -> None:
    net = OwnNames()
    handle: Any = ours.monkeypatch(net)
    handle.update_params([2 * p for p in net.parameters()])
    x = batch(0)[0]
    assert_same([handle(x), handle.twice(x)], [2 * net(x), 2 * net.twice(x)])
    assert (handle.is_root, handle.root.is_root) == ("a class attribute", False)


# --- functions of patch


@over_both
def test_assignments_that_are_only_shown(package: Any) -> None:
    net = nn.Linear(3, 2)
    handle: Any = package.monkeypatch(net)
    x, shown = batch(0)[0], torch.zeros(2)
    with package.patch._modify_internally(handle):
        handle.bias = shown
    assert handle.bias is shown
    assert len(handle._fast_params) == 1
    torch.testing.assert_close(handle(x), net(x))
    handle.bias = shown
    torch.testing.assert_close(handle(x), net(x) - net.bias)


def test_patched_parameters() -> None:
    def run(package: Any) -> list[Tensor]:
        net = make("mlp")
        handle: Any = package.monkeypatch(net)
        handle.update_params([2 * p for p in handle.fast_params])
        return [*package.patch._patched_parameters(handle), *package.patch._patched_parameters(handle, time=0)]

    assert_same(run(ours), run(theirs))


def test_placeholders() -> None:
    mine, wanted = (package.patch._ParameterPlaceholder("weight") for package in (ours, theirs))
    assert repr(mine) == repr(wanted)
    assert mine._param_name == wanted._param_name == "weight"


def test_internal_attributes_are_those_of_every_module() -> None:
    assert ours.patch._internal_attrs >= theirs.patch._internal_attrs
    assert ours.patch._internal_attrs - {"_backend"} <= vars(nn.Module()).keys()
    assert "training" not in ours.patch._internal_attrs


def test_updates_that_are_only_shown() -> None:
    def run(package: Any) -> list[Tensor]:
        handle: Any = package.monkeypatch(Shared())
        shown = [torch.full_like(p, i) for i, p in enumerate(handle._expand_params(handle.fast_params))]
        end = package.patch._update_patched_params(handle, [[torch.zeros(()), *shown]], 1)
        last = list(handle.last._parameters.values())
        return [*last, torch.tensor(end), handle(batch(0)[0])]

    torch.manual_seed(0)
    mine = run(ours)
    torch.manual_seed(0)
    assert_same(mine, run(theirs))


def test_parameters_from_a_box() -> None:
    net: Any = Shared()
    x = batch(0)[0]

    def run(package: Any) -> list[Tensor]:
        box: list[Any] = [None]
        end, handle, kind = package.patch._make_functional(net, box, 2)
        assert type(handle) is kind
        assert isinstance(handle, package.patch._MonkeyPatchBase)
        slots = package.utils._get_param_mapping(net, [], [])
        given = [3 * p for p in net.parameters()]
        box[0] = [None, None, *[given[index] for index in slots]]
        return [handle(x), torch.tensor(end)]

    assert_same(run(ours), run(theirs))


# --- functions of optim

a, b, c = (torch.arange(1.0, 4.0) * scale for scale in (1.0, 0.3, -2.0))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("_add", (a, b)),
        ("_add", (a, 2)),
        ("_add", (a, 0.5, b)),
        ("_add", (a, b, c)),
        ("_addcdiv", (a, b, c)),
        ("_addcdiv", (a, 3.0, c)),
        ("_addcdiv", (a, -0.5, b, c)),
        ("_addcdiv", (a, c, b, c)),
        ("_addcmul", (a, b, c)),
        ("_addcmul", (a, 3.0, c)),
        ("_addcmul", (a, -0.5, b, c)),
        ("_addcmul", (a, c, b, c)),
    ],
)
def test_arithmetic(name: str, args: tuple[Any, ...]) -> None:
    def run(package: Any) -> list[Tensor]:
        inputs = [arg.clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args]
        result = getattr(package.optim, name)(*inputs)
        tensors = [arg for arg in inputs if isinstance(arg, Tensor)]
        first = torch.autograd.grad(result.pow(3).sum(), tensors, create_graph=True)
        return [result, *first, *torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), tensors)]

    assert_same(run(ours), run(theirs), tolerance=0.0)


def test_masks_of_gradients() -> None:
    def run(package: Any) -> list[Tensor]:
        p = torch.tensor([1.0, 0.0, 2.0], requires_grad=True)
        root = p.sin() + p
        package.optim._maybe_mask(root, p == 0)
        package.optim._maybe_mask(torch.ones(3), p == 0)  # which needs no gradient
        (grad,) = torch.autograd.grad((root**3).sum(), p, create_graph=True)
        return [grad, *torch.autograd.grad(grad.sum(), p)]

    assert_same(run(ours), run(theirs))


@pytest.mark.parametrize(
    ("replacement", "target"),
    [
        (torch.tensor(0.3), 1.0),
        (torch.tensor(3.0), 1),
        ((torch.tensor(0.3), torch.tensor(0.4)), (0.9, 0.99)),
        ([torch.tensor(0.3)], [1]),
        ({"a": (torch.tensor(0.3), torch.tensor(7.0))}, {"a": (1.0, 2)}),
    ],
)
def test_settings_are_replaced(replacement: Any, target: Any) -> None:
    mine, wanted = ours.optim._recursive_apply(replacement, target), theirs.optim._recursive_apply(replacement, target)
    assert mine == wanted
    assert list(map(type, ours.utils.flatten(mine))) == list(map(type, ours.utils.flatten(wanted)))


@over_both
def test_tensors_in_settings_are_replaced_in_place(package: Any) -> None:
    target = [torch.tensor(1.0), torch.tensor(2.0)]
    replacement = [torch.tensor(0.3, requires_grad=True), torch.tensor(0.4)]
    result = package.optim._recursive_apply(replacement, target)
    assert all(new is old for new, old in zip(result, target, strict=True))
    assert list(map(float, target)) == pytest.approx([0.3, 0.4])
    assert replacement[0].data_ptr() != target[0].data_ptr() or package is theirs
    with pytest.raises(ValueError):
        package.optim._recursive_apply([torch.tensor(1.0)], 1.0)


class Plain(torch.optim.SGD):
    """A class that the mapping does not know yet."""


def test_the_mapping_of_versions_is_live() -> None:
    assert set(theirs.optim._opt_mapping) <= set(ours.optim._opt_mapping)
    assert all(version is getattr(ours.optim, f"Differentiable{kind.__name__}") for kind, version in ours.optim._opt_mapping.items())
    count = len(ours.optim._opt_mapping)
    assert Plain not in ours.optim._opt_mapping
    ours.optim._opt_mapping[Plain] = ours.optim.DifferentiableSGD
    try:
        assert ours.optim._opt_mapping[Plain] is ours.optim.DifferentiableSGD
        assert len(ours.optim._opt_mapping) == count + 1
        net = make("mlp")
        assert isinstance(ours.get_diff_optim(Plain(net.parameters(), lr=0.1), net.parameters()), ours.optim.DifferentiableSGD)
    finally:
        del ours.optim._opt_mapping[Plain]
    with pytest.raises(KeyError):
        ours.optim._opt_mapping[Plain]
    with pytest.raises(AdaptrtError, match="no differentiable version"):
        ours.get_diff_optim(Plain(make("mlp").parameters(), lr=0.1), [])


def test_an_optimiser_that_overrides_step() -> None:
    """Programs repeat the original's `step` in subclasses, with the attributes that it uses."""

    def run(package: Any) -> list[Tensor]:
        class Normalised(package.optim.DifferentiableSGD):
            def step(self, loss: Tensor, params: Any = None, override: Any = None, grad_callback: Any = None, **kwargs: Any) -> Any:
                if override is not None:
                    self._apply_override(override)
                params = list(self._fmodel.fast_params if params is None else params)
                grads: Any = torch.autograd.grad(loss, params, create_graph=self._track_higher_grads, allow_unused=True)
                if self._grad_callback is not None:
                    grads = self._grad_callback(grads)
                grouped = []
                for group, mapping in zip(self.param_groups, self._group_to_param_list, strict=True):
                    for i, index in enumerate(mapping):
                        group["params"][i] = params[index]
                    grouped.append([F.normalize(grads[index], dim=0) for index in mapping])
                self._update(grouped)
                for group, mapping in zip(self.param_groups, self._group_to_param_list, strict=True):
                    for p, index in zip(group["params"], mapping, strict=True):
                        params[index] = p
                self._fmodel.update_params(params)
                return params

        net = make("mlp")
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        handle = package.monkeypatch(net, copy_initial_weights=False)
        lr = torch.tensor(0.2, requires_grad=True)
        halve: Any = lambda grads: [g / 2 for g in grads]  # noqa: E731
        diffopt = Normalised(opt, net.parameters(), handle, grad_callback=halve)
        for step in range(STEPS):
            diffopt.step(loss_of(handle, step), override={"lr": [lr]} if step == 1 else None)
        return [*handle.parameters(), *torch.autograd.grad(loss_of(handle, 9), [*net.parameters(), lr])]

    assert_same(run(ours), quietly(lambda: run(theirs)))


# --- functions of utils


@over_both
@pytest.mark.parametrize("safe_copy", [True, False])
def test_copies_of_tensors(package: Any, safe_copy: bool) -> None:
    source = torch.ones(2, requires_grad=True)
    copied = package.utils._copy_tensor(source, safe_copy)
    assert copied.requires_grad
    assert copied.is_leaf
    assert (copied.data_ptr() == source.data_ptr()) is not safe_copy
    assert package.utils._copy_tensor(source, safe_copy, torch.device("cpu")).device.type == "cpu"


@over_both
def test_copies_of_nests(package: Any) -> None:
    tensor = torch.ones(2)
    made = package.utils._recursive_copy_and_cast({"a": [tensor, 3], "b": (tensor, "c")}, None)
    assert made["a"][1] == 3
    assert made["b"][1] == "c"
    assert made["a"][0] is not tensor
    torch.testing.assert_close(made["b"][0], tensor)


@over_both
@pytest.mark.parametrize("make_value", [list, tuple, dict, set, collections.OrderedDict, int, str, lambda: torch.ones(1)])
def test_what_is_a_container(package: Any, make_value: Callable[[], Any]) -> None:
    value = make_value()
    assert package.utils._is_container(value) is isinstance(value, list | tuple | dict | set)


@over_both
def test_positions_of_parameters(package: Any) -> None:
    first, second = torch.ones(2), torch.ones(2)
    assert package.utils._find_param_in_list(second, [first, second]) == 1
    assert package.utils._find_param_in_list(torch.ones(2), [first, second]) is None
    net = Shared()
    seen: list[Any] = []
    mapping = package.utils._get_param_mapping(net, seen, [])
    assert mapping == theirs.utils._get_param_mapping(net, [], [])
    assert all(one is other for one, other in zip(seen, net.parameters(), strict=True))
