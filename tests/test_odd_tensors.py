"""Tensors that are not what they look like: of other layouts and classes, quantised, without memory, with tangents, made in odd modes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor

from adaptrt import compile_unroll, optim
from adaptrt.errors import (
    AdaptrtError,
    DeviceMismatch,
    InvalidBatch,
    InvalidType,
    NotDifferentiable,
    UnsupportedParameter,
    WithinTransform,
)
from tests import naive
from tests.tolerances import assert_near

private: Any = torch
Batch = tuple[Tensor, Tensor]


def batch(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, dtype=torch.float64, generator=generator), torch.arange(6) % 3


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def unrolled(model: nn.Module, loss: Any = F.cross_entropy, backend: str = "eager", **options: Any) -> Any:
    return compile_unroll(model, optim.sgd(lr=0.4), 2, loss=loss, backend=backend, **options)


def require_right(unroll: Any, model: nn.Module, given: tuple[Batch, Batch], loss: Any = F.cross_entropy, plain: Any = None) -> None:
    """Compares adaptation, meta-loss and meta-gradient with the oracle's, on the same data or on `plain`, which is equal to it."""
    params = dict(model.named_parameters())
    loop = naive.Loop(model, loss, naive.sgd, {"lr": 0.4}, 2)
    start = naive.Start(params, {}, dict(model.named_buffers()), {})
    support, query = plain or given
    wanted = naive.meta_loss(loop, start, support, query)
    found = unroll(*given)
    assert_near({"loss": found}, {"loss": wanted})
    grads, wanted_grads = (dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)) for loss in (found, wanted))
    assert_near(grads, wanted_grads)
    assert_near(dict(unroll.adapt(given[0]).params), naive.adapt(loop, start, support).params)


# --- data whose values are where they should be, in an unusual way


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(6, 2)


def overlapping(x: Tensor) -> Tensor:
    return x.flatten().as_strided((6, 2), (1, 1))


def shared(x: Tensor) -> Tensor:
    return x.clone().share_memory_()


def unaligned(x: Tensor) -> Tensor:
    memory = torch.frombuffer(bytearray(8 * 12 + 8), dtype=torch.uint8)[1 : 8 * 12 + 1]
    moved = torch.frombuffer(memory.numpy().data, dtype=torch.float64).view(6, 2)
    moved.copy_(x)
    assert moved.data_ptr() % 8
    return moved


def hooked(x: Tensor) -> Tensor:
    value = x.clone().requires_grad_()
    value.register_hook(torch.zeros_like)
    return value


class Plain(Tensor):
    """A class that changes nothing."""


def of_a_class(x: Tensor) -> Tensor:
    return x.as_subclass(Plain)


def zeros(x: Tensor) -> Tensor:
    return private._efficientzerotensor(tuple(x.shape), dtype=x.dtype)


def negated(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def of_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x + 0


READABLE = {fn.__name__: fn for fn in (expanded, overlapping, shared, unaligned, hooked, of_a_class, zeros, negated, of_inference)}


@pytest.mark.parametrize("kind", READABLE)
def test_data_in_unusual_memory(kind: str) -> None:
    make, (x, y) = READABLE[kind], batch()
    model = net()
    unroll = unrolled(model)
    given = (make(x), y), (make(x)[:4] if kind != "zeros" else make(x[:4]), y[:4])
    plain = tuple((values.detach().as_subclass(Tensor) + 0, labels) for values, labels in given)
    require_right(unroll, model, given, plain=plain)
    require_right(unroll, model, ((x, y), (x[:4], y[:4])))
    require_right(unroll, model, given, plain=plain)


def test_data_that_is_mapped_from_a_read_only_file(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    x, y = batch()
    numpy.save(tmp_path / "x.npy", x.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that it must not be written to
        mapped = torch.from_numpy(numpy.load(tmp_path / "x.npy", mmap_mode="r"))
    model = net()
    require_right(unrolled(model), model, ((mapped, y), (mapped[:4], y[:4])))
    assert (tmp_path / "x.npy").read_bytes()[-96:] == x.numpy().tobytes()


def test_zeros_without_memory_are_read_by_compiled_kernels() -> None:
    x, y = batch()
    model = net()
    unroll = unrolled(model, backend="inductor")
    plain = torch.zeros_like(x)
    for given in ((zeros(x), y), (x, y), (zeros(x), y)):
        require_right(unroll, model, (given, given), plain=((plain, y), (plain, y)) if given[0] is not x else None)
    assert torch.equal(unroll.adapt((x, y))(zeros(x)), unroll.adapt((x, y))(plain))


# --- data that is refused


class Doubling(Tensor):
    """A class whose products are twice as large."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found: Any = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * found.as_subclass(Tensor) if func is F.linear else found


def masked(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        return masked_tensor(x, x > 0)


def nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        return torch.nested.nested_tensor([x[:2], x[2:]])


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def without_memory(x: Tensor) -> Tensor:
    value = x.clone()
    value.untyped_storage().resize_(0)
    return value


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], type[AdaptrtError], str]] = {
    "sparse": (lambda x: x.to_sparse(), InvalidType, r"support input 0 has layout torch\.sparse_coo; call \.to_dense\(\)"),
    "oneDNN's": (lambda x: x.float().to_mkldnn(), InvalidType, r"support input 0 has layout torch\._mkldnn"),
    "nested": (nested, InvalidType, r"support input 0 is a nested tensor; pad it"),
    "quantised": (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), InvalidType, r"is quantised; call \.dequantize\(\)"),
    "on the meta device": (lambda x: x.to("meta"), DeviceMismatch, "is on meta, the model on cpu"),
    "empty": (lambda x: x[:0], InvalidBatch, r"support input 0 is empty"),
    "masked": (masked, InvalidType, "class MaskedTensor.*holds them in other tensors"),
    "fake": (fake, InvalidType, "class FakeTensor.*has no values"),
    "doubling": (lambda x: x.as_subclass(Doubling), InvalidType, r"class Doubling.*__torch_function__.*as_subclass\(torch\.Tensor\)"),
    "complex": (lambda x: x.to(torch.complex128), InvalidBatch, "operands of one dtype"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning", "ignore:.*quantiz:DeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_data_that_is_refused(kind: str) -> None:
    make, error, message = REFUSED[kind]
    x, y = batch()
    model = net().to(make(x).dtype if make(x).dtype is torch.float32 else torch.float64)
    unroll = unrolled(model)
    with pytest.raises(error, match=message):
        unroll.adapt((make(x), y))
    plain = x.to(next(model.parameters()).dtype), y
    adapted = unroll.adapt(plain)
    with pytest.raises(error, match=message):  # where programs are there already, too
        unroll.adapt((make(x), y))
    with pytest.raises(AdaptrtError):
        adapted(make(x))


def test_parameters_and_buffers_that_are_refused() -> None:
    model = net()
    model[0].weight = private.nn.Parameter(model[0].weight.detach().as_subclass(Doubling))
    assert type(model[0].weight) is Doubling
    with pytest.raises(UnsupportedParameter, match=r"'0\.weight' is of class Doubling, which changes by its __torch_function__"):
        unrolled(model)
    model = net()
    model.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    with pytest.raises(UnsupportedParameter, match="buffer 'table' is quantised"):
        unrolled(model)


def test_a_parameter_whose_memory_was_given_back() -> None:
    model = net()
    unroll = unrolled(model)
    weight = model[0].weight
    weight.data = without_memory(weight.data)
    with pytest.raises(InvalidType, match="has no memory any more, because its storage was resized to 0"):
        unroll.adapt(batch())


# --- labels of other dtypes


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", ["int32", "int16", "uint8", "bool", "float64"])
def test_labels_of_other_dtypes_are_refused_by_name(dtype: str, backend: str) -> None:
    x, y = batch()
    with pytest.raises(InvalidBatch, match=rf"class labels must be int64, got {dtype}; call \.long\(\) on the target"):
        unrolled(net(), backend=backend).adapt((x, y.to(getattr(torch, dtype))))


@pytest.mark.parametrize("dtype", ["int32", "int16", "uint8"])
def test_labels_of_other_dtypes_without_a_loss_of_ones_own(dtype: str) -> None:
    x, y = batch()
    model = net()
    given = (x, y.to(getattr(torch, dtype))), (x, y)
    require_right(unrolled(model, loss=None), model, given, plain=((x, y), (x, y)))


@pytest.mark.parametrize("dtype", ["int32", "int16", "int8", "uint8", "bool", "int64"])
def test_targets_of_other_dtypes_that_are_numbers(dtype: str) -> None:
    x, y = batch()
    model = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    given = x, y.to(getattr(torch, dtype))
    try:
        F.mse_loss(model(x), given[1]).backward()
    except RuntimeError as error:
        pytest.skip(f"PyTorch {torch.__version__} refuses such targets: {error}")
    require_right(unrolled(model, loss=F.mse_loss), model, (given, given), loss=F.mse_loss)


# --- tangents


class Scaled(nn.Module):
    """Uses a parameter, a buffer, and an attribute that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.plain = torch.ones(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale * self.plain


def dual(value: Tensor) -> Tensor:
    return forward_ad.make_dual(value.detach(), torch.ones_like(value))


def with_dual_attribute(model: Scaled, unroll: Any) -> None:
    model.plain = dual(model.plain)
    unroll.adapt(batch())


def with_dual_buffer(model: Any, unroll: Any) -> None:
    model.scale = dual(model.scale)
    unroll.adapt(batch())


def with_dual_parameter(model: Any, unroll: Any) -> None:
    model.inner[0]._parameters["weight"] = dual(model.get_parameter("inner.0.weight"))
    unroll.adapt(batch())


def with_dual_data(model: Scaled, unroll: Any) -> None:
    x, y = batch()
    unroll((x, y), (dual(x), y))


def with_dual_input(model: Scaled, unroll: Any) -> None:
    unroll.adapt(batch())(dual(batch()[0]))


DUAL = {fn.__name__: fn for fn in (with_dual_attribute, with_dual_buffer, with_dual_parameter, with_dual_data, with_dual_input)}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which PyTorch calls
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("place", DUAL)
def test_tangents_are_refused_wherever_they_come_from(place: str, is_first: bool) -> None:
    model = Scaled()
    unroll = unrolled(model)
    if not is_first:
        unroll(batch(), batch(2)).backward()
        unroll.adapt(batch())(batch()[0])
    with forward_ad.dual_level(), pytest.raises(NotDifferentiable, match="a tensor with a tangent"):
        DUAL[place](model, unroll)


# --- modes in which nothing is computed


class Closed(nn.Module):
    """Holds an unroll, as the loss of a larger system may."""

    def __init__(self, unroll: Any) -> None:
        super().__init__()
        self.unroll = unroll
        self.support, self.query = batch(), batch(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unroll((x, self.support[1]), self.query)


def within_fake_tensors(function: Closed) -> object:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function(batch()[0])


TRACED: dict[str, Callable[[Closed], object]] = {
    "FakeTensorMode": within_fake_tensors,
    "make_fx": lambda function: make_fx(function)(batch()[0]),
}


@pytest.mark.parametrize("name", TRACED)
def test_calls_within_what_only_records(name: str) -> None:
    model = net()
    unroll = unrolled(model)
    with pytest.raises(WithinTransform, match=f"an unroll was called within {name}"):
        TRACED[name](Closed(unroll))
    require_right(unroll, model, (batch(), batch(2)))


# --- models of inference mode, and tensors that change places


def test_a_model_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, opt = net(), torch.optim.SGD(net().parameters(), lr=0.4)
        opt = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.5)
    twin = net()
    unroll = compile_unroll(model, opt, 2, loss=F.cross_entropy, backend="eager")
    other = compile_unroll(twin, torch.optim.SGD(twin.parameters(), lr=0.4, momentum=0.5), 2, loss=F.cross_entropy, backend="eager")
    for one in (unroll, other):
        one(batch(), batch(2)).backward()
    for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad)
    assert_near(dict(unroll.adapt(batch()).params), dict(other.adapt(batch()).params))


def test_parameters_that_change_places() -> None:
    model = net()
    unroll = unrolled(model)
    require_right(unroll, model, (batch(), batch(2)))
    with torch.no_grad():
        other = nn.Parameter(torch.full((5, 2), 0.3, dtype=torch.float64))
    torch.utils.swap_tensors(model[0].weight, other)
    assert float(model[0].weight.detach()[0, 0]) == 0.3
    require_right(unroll, model, (batch(), batch(2)))
