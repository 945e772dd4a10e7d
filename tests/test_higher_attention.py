"""Attention has a second derivative in every method of a handle, although PyTorch chooses kernels that have none.

Each use computes attention in another way than by a call of the handle. The oracle is a loop by hand with the kernels that have a second
derivative.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.higher_cases import adapted_by_hand, adapted_by_handle, assert_same, batch, ours

pytestmark = pytest.mark.usefixtures("double")

KERNELS = ["flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled"]


def attend(x: Tensor) -> Tensor:
    """Attention of the rows of `x` to each other, in two heads."""
    heads = x.reshape(1, -1, 2, x.shape[-1] // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)


class Mixin:
    """A base that is no module, as `GenerationMixin` of transformers."""

    first: nn.Module

    def from_mixin(self, x: Tensor) -> Tensor:
        return attend(self.first(x))

    def overridden(self, x: Tensor) -> Tensor:
        raise AssertionError("the model overrides it")


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def encode(self, x: Tensor) -> Tensor:
        return attend(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


class Heads(nn.MultiheadAttention):
    """A subclass of PyTorch's own, with a method that does not call it."""

    def self_attention(self, x: Tensor) -> Tensor:
        weights = (self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias)
        return F.multi_head_attention_forward(x, x, x, self.embed_dim, self.num_heads, *weights, need_weights=False)[0]


class Model(Mixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.part = Part()
        self.heads = Heads(4, 2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(self.layer, 1, enable_nested_tensor=False)

    def encode(self, x: Tensor) -> Tensor:
        return attend(torch.tanh(self.first(x)))

    def overridden(self, x: Tensor) -> Tensor:
        return self.from_mixin(x).sin()

    def _hidden(self, x: Tensor, scale: float) -> Tensor:
        return scale * attend(self.first(x))

    halved = functools.partialmethod(_hidden, scale=0.5)

    @property
    def of_weights(self) -> Tensor:
        return attend(self.part.inner.weight)

    @staticmethod
    def among(x: Tensor) -> Tensor:
        return attend(x)

    kind_of_layer = staticmethod(nn.Linear)

    @classmethod
    def among_twice(cls, x: Tensor) -> Tensor:
        return cls.among(attend(x))

    def rollout(self, x: Tensor, steps: int) -> Iterator[Tensor]:
        for _ in range(steps):
            x = attend(self.part.inner(attend(x)))
            yield x

    def lazily(self, x: Tensor) -> Any:
        return (attend(self.first(scale * x)) for scale in (1.0, 2.0))

    def generate(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self.encode(torch.cat([x[:, :1], self(x)[:, :2]], dim=1))[:, :3]
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.encode(x))


def with_own_methods() -> nn.Module:
    """A model with methods of its own instance, `forward` included."""
    model: Any = Model()
    model.own = types.MethodType(lambda self, x: attend(self.first(x)), model)
    model.forward = types.MethodType(lambda self, x: attend(self.first(x)).cos(), model)
    return model


def of(value: Tensor) -> Tensor:
    return value.square().mean() + value.mean()


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a method": lambda model, x: of(model.encode(x)),
    "a method of a base": lambda model, x: of(model.from_mixin(x)),
    "an overridden method": lambda model, x: of(model.overridden(x)),
    "a partial method": lambda model, x: of(model.halved(x)),
    "a property": lambda model, x: of(model.of_weights) + of(model.first(x)),
    "a static method": lambda model, x: of(model.among(model.first(x))),
    "a class method": lambda model, x: of(model.among_twice(model.first(x))),
    "a generator": lambda model, x: torch.stack([of(y) for y in model.rollout(model.first(x), 2)]).sum(),
    "a generator expression": lambda model, x: torch.stack([of(y) for y in model.lazily(x)]).sum(),
    "a loop of calls and methods": lambda model, x: of(model.generate(x, 2)),
    "a method of a part": lambda model, x: of(model.part.encode(model.first(x))),
    "a part": lambda model, x: of(model.part(model.first(x))),
    "a method of a subclass of PyTorch's": lambda model, x: of(model.heads.self_attention(model.first(x))),
    "multi-head attention": lambda model, x: of(model.heads(*3 * [model.first(x)], need_weights=False)[0]),
    "an encoder": lambda model, x: of(model.encoder(model.first(x)[None])[0, :, :2]),
    "a layer's own method": lambda model, x: of(model.layer._sa_block(model.first(x)[None], None, None)),
    "a method of an instance": lambda model, x: of(model.own(x)),
    "forward of an instance": lambda model, x: of(model.forward(x)) + of(model(x)),
}


def build() -> Any:
    torch.manual_seed(2)
    return with_own_methods()


@pytest.mark.parametrize("name", USES)
def test_attention_in_methods_has_a_second_derivative(name: str) -> None:
    net = build()
    mine = adapted_by_handle(net, USES[name])
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(mine, adapted_by_hand(net, USES[name]))


def test_a_copied_handle_keeps_it() -> None:
    net = build()
    handle = copy.deepcopy(ours.monkeypatch(net))
    weights = [p for p in handle.parameters() if p.requires_grad]

    def second(model: Any, values: list[Tensor]) -> tuple[Tensor, ...]:
        loss = USES["a method of an instance"](model, batch(1)[0]) + USES["a method"](model, batch(2)[0])
        first = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(of(g) for g in first if g is not None), values, allow_unused=True, materialize_grads=True)  # pyright: ignore

    with sdpa_kernel(SDPBackend.MATH):
        wanted = second(net, list(net.parameters()))
    assert_same(second(handle, weights), wanted)


def kernels() -> list[bool]:
    return [getattr(torch.backends.cuda, name)() for name in KERNELS]


class Watching(nn.Module):
    """Notes which kernels are allowed where its methods run."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[list[bool]] = []
        self.given: list[Any] = []

    def look(self) -> None:
        self.seen.append(kernels())

    def fail(self) -> None:
        self.seen.append(kernels())
        raise KeyError("a")

    def steps(self) -> Iterator[int]:
        try:
            for i in range(3):
                self.seen.append(kernels())
                try:
                    self.given.append((yield i))
                except ValueError as error:
                    self.given.append(str(error))
            return 7
        finally:
            self.seen.append(kernels())

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(kernels())
        return self.scale * x


MATH_ALONE = [False, False, True, False]


def test_the_kernels_are_the_users_outside_of_methods() -> None:
    """Also between the steps of a generator, and after an error."""
    before = kernels()
    handle: Any = ours.monkeypatch(Watching())
    handle.look()
    with pytest.raises(KeyError):
        handle.fail()
    assert kernels() == before
    steps = handle.steps()
    assert [next(steps), kernels(), steps.send("b"), kernels(), steps.throw(ValueError("c")), kernels()] == [
        0,
        before,
        1,
        before,
        2,
        before,
    ]
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == 7
    stopped = handle.steps()
    next(stopped)
    stopped.close()
    assert kernels() == before
    assert handle.given == ["b", "c", None]
    assert handle.seen == 7 * [MATH_ALONE] + [before], "closing computes nothing that is differentiated"


@pytest.mark.parametrize("where", ["no_grad", "no tracking"])
def test_the_kernels_are_the_users_where_no_second_derivative_can_be_asked_for(where: str) -> None:
    handle: Any = ours.monkeypatch(Watching(), track_higher_grads=where == "no_grad")
    with torch.set_grad_enabled(where != "no_grad"):
        handle.look()
        list(handle.steps())
    assert handle.seen == 5 * [kernels()]


def test_methods_look_like_those_of_the_model() -> None:
    """Libraries look at the signatures of methods."""
    net, handle = build(), ours.monkeypatch(build())
    for name in ("encode", "generate", "among", "among_twice", "own", "forward"):
        assert inspect.signature(getattr(handle, name)) == inspect.signature(getattr(net, name))
        assert getattr(handle, name).__doc__ == getattr(net, name).__doc__
    assert handle.encode.__self__ is handle and handle.encode.__name__ == "encode" and callable(type(handle).among)
    assert handle.kind_of_layer is nn.Linear
