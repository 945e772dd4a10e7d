"""What a program cannot do is refused by name, with the way out, and leaves the user's tensors, modules and generators as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, is_grad_enabled, is_inference_mode_enabled, nn

import adaptrt
from adaptrt import optim
from adaptrt.errors import (
    DataDependentControlFlow,
    NotTraceable,
    UnsupportedParameter,
    UnsupportedRandomness,
)
from tests import naive
from tests.bad_input import Attempt, Case, Forward, check_refused, data

LR, K = 0.1, 2


def unrolled(model: nn.Module, loss: Any = F.cross_entropy, **options: Any) -> adaptrt.CompiledUnroll:
    return adaptrt.compile_unroll(model, optim.sgd(lr=LR), K, loss=loss, **{"backend": "eager", **options})


def looped(model: nn.Module, loss: Any = F.cross_entropy) -> tuple[naive.Loop, naive.Start]:
    loop = naive.Loop(model, loss, naive.sgd, {"lr": LR}, K)
    return loop, naive.Start(dict(model.named_parameters()), {}, dict(model.named_buffers()), {})


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def double() -> tuple[Tensor, Tensor]:
    x, y = data()
    return x.double(), y


# --- writes to the user's tensors


def written(write: Callable[[Tensor, Tensor], Any], held: Tensor | None = None) -> Attempt:
    """A model that does something to a plain tensor attribute, and goes on with what it gives."""
    held = torch.arange(3.0) if held is None else held

    def forward(module: Forward, h: Tensor) -> Tensor:
        found = write(held, h)
        return h + (found if isinstance(found, Tensor | float) else held)

    model = Forward(forward, held=held)
    return Attempt(lambda: unrolled(model).adapt(data()), (model, held))


def in_no_grad(write: Callable[[], Any]) -> None:
    with torch.no_grad():
        write()


ARRAY = numpy.zeros(3, numpy.float32)

WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "adds a number": lambda held, h: held.add_(1.0),
    "adds data": lambda held, h: held.add_(h.mean()),
    "fills without reading": lambda held, h: (held.fill_(7.0), 0.0)[1],
    "sets an item": lambda held, h: held.__setitem__(0, 5.0),
    "sets an item to data": lambda held, h: held.__setitem__(0, h[0, 0]),
    "a view": lambda held, h: held[1:].mul_(2.0).sum(),
    "a view of a view": lambda held, h: held.view(3, 1)[1:].squeeze(1).mul_(2.0).sum(),
    "by data": lambda held, h: held.data.add_(1.0),
    "by detach": lambda held, h: held.detach().copy_(h.detach()[0]),
    "out=": lambda held, h: torch.add(torch.ones(3), 1.0, out=held),
    "resize_": lambda held, h: held.resize_(1),
    "set_": lambda held, h: held.set_(torch.ones(3)),  # type: ignore[call-overload]
    "unsqueeze_": lambda held, h: held.unsqueeze_(0),
    "of a list": lambda held, h: torch._foreach_add_([held], 1.0),  # pyright: ignore
    "running statistics": lambda held, h: F.batch_norm(h, held, torch.ones(3), training=True),
}

TENSORS: list[Case] = [
    *[
        Case(
            f"writes to a constant: {name}", lambda write=write: written(write), NotTraceable, r"test_refusals\.py:\d+: .*in place .*buffer"
        )
        for name, write in WRITES.items()
    ],
    Case(
        "assigns .data",
        lambda: written(lambda held, h: setattr(held, "data", torch.ones(3))),
        NotTraceable,
        r"test_refusals\.py:\d+.*\.data",
    ),
    Case(
        "lets a constant require grad",
        lambda: written(lambda held, h: held.requires_grad_()),
        UnsupportedParameter,
        r"shape \[3\] require grad.*nn\.Parameter",
    ),
    Case(
        "writes to an array",
        lambda: written(lambda held, h: torch.from_numpy(ARRAY).add_(1.0), torch.from_numpy(ARRAY)),
        NotTraceable,
        r"shares its memory with an array.*torch\.tensor\(array\)",
    ),
    Case(
        "writes to a parameter",
        lambda: in_forward(lambda module, h: in_no_grad(lambda: module.layer.weight.clamp_(-1.0, 1.0))),
        NotTraceable,
        r"test_refusals\.py:\d+: .*one of its inputs in place \(clamp_\).*x\.clone\(\)",
    ),
    *[
        Case(
            f"reads the values of a constant: {name}",
            lambda read=read: written(read),
            DataDependentControlFlow,
            r"test_refusals\.py:\d+: .*depends on the value of a tensor.*before the model is called",
        )
        for name, read in {
            "tolist": lambda held, h: sum(held.tolist()),
            "numpy": lambda held, h: float(held.numpy().sum()),
            "asarray": lambda held, h: float(numpy.asarray(held).sum()),
            "writes by numpy": lambda held, h: held.numpy().__setitem__(0, 1.0),
            "item": lambda held, h: held.sum().item(),
        }.items()
    ],
]


def in_forward(act: Callable[[Forward, Tensor], Any], *watched: Any) -> Attempt:
    """A model that does something beside what it computes."""
    model = Forward(lambda module, h: (act(module, h), h)[1])
    return Attempt(lambda: unrolled(model).adapt(data()), (model, *watched))


# --- generators


def own_generator() -> Attempt:
    generator = Generator()
    return in_forward(lambda module, h: generator.manual_seed(5), generator)


def drawn_anew() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randn(3)


GENERATORS: list[Case] = [
    Case(name, build, UnsupportedRandomness, r"test_refusals\.py:\d+ seeds a generator.*before the call.*register_buffer")
    for name, build in {
        "seeds the global generator": lambda: in_forward(lambda module, h: torch.manual_seed(5)),
        "seeds and draws": lambda: in_forward(lambda module, h: drawn_anew()),
        "sets the state of the global generator": lambda: in_forward(lambda module, h: torch.set_rng_state(Generator().get_state())),
        "seeds a generator of its own": own_generator,
    }.items()
]


# --- questions to tensors


def doubled_if(asked: Callable[[Forward, Tensor], bool]) -> nn.Module:
    return Forward(lambda module, h: h * 2.0 if asked(module, h) else h)


QUESTIONS: dict[str, Callable[[Forward, Tensor], bool]] = {
    "requires_grad": lambda module, h: h.requires_grad,
    "requires_grad of a parameter": lambda module, h: module.layer.weight.requires_grad,
    "is_leaf": lambda module, h: h.is_leaf,
    "grad_fn": lambda module, h: h.grad_fn is not None,
    "is_inference": lambda module, h: h.is_inference(),
    "torch.is_inference": lambda module, h: torch.is_inference(h),
}

ASKED: list[Case] = [
    *[
        Case(
            f"branches on {name}",
            lambda asked=asked: (lambda model: Attempt(lambda: unrolled(model).adapt(data()), (model,)))(doubled_if(asked)),
            NotTraceable,
            r"test_refusals\.py:\d+ asks whether.*self\.training, on torch\.is_grad_enabled\(\)",
        )
        for name, asked in QUESTIONS.items()
    ],
    Case(
        "a hook that scales gradients",
        lambda: in_forward(lambda module, h: h.register_hook(lambda grad: grad / 2) if h.requires_grad else None),
        NotTraceable,
        r"asks whether",
    ),
]


@pytest.mark.parametrize("case", [*TENSORS, *GENERATORS, *ASKED], ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
    assert not ARRAY.any()


def test_a_question_on_which_nothing_depends() -> None:
    def forward(module: Forward, h: Tensor) -> Tensor:
        if h.requires_grad and module.training:
            h.register_hook(lambda grad: None)
        return h * 2.0 if h.is_leaf else 2.0 * h

    model = Forward(forward).double()
    found = unrolled(model)(double(), double())
    close(found, naive.meta_loss(*looped(model), double(), double()))


MODES: dict[str, Callable[[], Any]] = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
IMPORTED: dict[str, Callable[[], bool]] = {
    "is_grad_enabled": lambda: is_grad_enabled(),
    "torch.is_grad_enabled": lambda: torch.is_grad_enabled(),
    "torch._C.is_grad_enabled": lambda: torch._C.is_grad_enabled(),
    "torch.is_inference_mode_enabled": lambda: torch.is_inference_mode_enabled(),
    "is_inference_mode_enabled": lambda: is_inference_mode_enabled(),
}


@pytest.mark.parametrize("asked", IMPORTED)
def test_the_gradient_mode_may_be_asked_by_any_name(asked: str) -> None:
    model = doubled_if(lambda module, h: IMPORTED[asked]()).double()
    (x, y), (loop, start) = double(), looped(model)
    unroll = unrolled(model)
    adapted, wanted = unroll.adapt((x, y)).detach(), naive.adapt(loop, start, (x, y))
    for mode, entered in MODES.items():
        with entered():
            if (asked, mode) == ("is_inference_mode_enabled", "inference"):  # it cannot be given the answer
                for call in (lambda: adapted(x), lambda: unroll((x, y), (x, y))):
                    with pytest.raises(NotTraceable, match=r"imported; write torch\.is_inference_mode_enabled\(\)"):
                        call()
                continue
            close(adapted(x), naive.call(model, wanted.params, {}, x)[0])
            close(unroll((x, y), (x, y)), naive.evaluate(loop, wanted.params, {}, (x, y))[0])
