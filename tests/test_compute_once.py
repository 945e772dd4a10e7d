"""What is small and costly is computed once, before the loop over what is large: the same numbers, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrt import optim
from adaptrt.backend import Inductor
from adaptrt.backend.inductor import compile as inductor
from adaptrt.backend.inductor.rewrites.compute_once import compute_once, computed_once
from adaptrt.graph.capture import capture
from adaptrt.graph.passes.base import apply
from tests.graphs import targets
from tests.tolerances import EQUAL, KERNEL, SECOND_DERIVATIVE, assert_close

pytestmark = pytest.mark.usefixtures("empty_cache")

LARGE = (1 << 8, 1 << 8)

CASES: dict[str, tuple[Callable[..., Any], list[Tensor], int]] = {
    "a power for all": (lambda x, a: x * (1.0 - a**1.5), [torch.rand(LARGE), torch.rand(())], 1),
    "of a row": (lambda x, a: (x - a) / (a.square() + 1.0).sqrt().unsqueeze(1), [torch.rand(LARGE), torch.rand(LARGE[0])], 1),
    "by way of views": (lambda x, a: x + (a.log() / 3.0).view(1, -1).expand(LARGE), [torch.rand(LARGE), torch.rand(LARGE[1])], 1),
    "once for two": (lambda x, a: (lambda once: (x * once, x + once))(a.exp()), [torch.rand(LARGE), torch.rand(())], 1),
    "two parts": (lambda x, a, b: x * a.exp() + b.log(), [torch.rand(LARGE), torch.rand(()), torch.rand(LARGE[1])], 2),
    "and a result": (lambda x, a: (lambda once: (x * once, once))(a.exp()), [torch.rand(LARGE), torch.rand(())], 1),
    "in double": (lambda x, a: x * (a**2.5).float(), [torch.rand(LARGE), torch.rand((), dtype=torch.float64)], 1),
    "cheap": (lambda x, a: x * a**2.0, [torch.rand(LARGE), torch.rand(())], 0),
    "for little": (lambda x, a: x * a.exp(), [torch.rand(8, 8), torch.rand(())], 0),
    "as large": (lambda x, a: x * a.exp().t(), [torch.rand(LARGE), torch.rand(LARGE)], 0),
    "an input": (lambda x, a: x * a, [torch.rand(LARGE), torch.rand(())], 0),
    "positions": (lambda x: x > torch.arange(LARGE[1], dtype=x.dtype) * 3.0 + 1.0, [torch.rand(LARGE)], 0),
    "a function of positions": (lambda x: x + torch.arange(LARGE[1], dtype=x.dtype).sin(), [torch.rand(LARGE)], 1),
    "positions and an input": (lambda x, a: x * (torch.arange(LARGE[1]) / a / a), [torch.rand(LARGE), torch.rand(())], 1),
    "a sum": (lambda x, a: x * a.sum(), [torch.rand(LARGE), torch.rand(9)], 0),
}


@pytest.mark.parametrize("fn, values, count", CASES.values(), ids=CASES)
def test_what_is_computed_once(fn: Callable[..., Any], values: list[Tensor], count: int) -> None:
    graph = capture(fn, *values)
    marked = apply([compute_once], Inductor().lower(graph))
    assert targets(marked).count(computed_once) == count
    wanted = graph.run(*values)
    assert_close(marked.run(*values), wanted, EQUAL)
    found = Inductor().compile(graph)(list(values))
    assert_close(list(found), list(wanted) if isinstance(wanted, tuple) else [wanted], KERNEL)


def test_second_derivatives_of_pools_write_no_choices() -> None:
    """Whether an element was chosen is used several times, and read from four; with one tensor more it became a tensor of its own."""

    def fn(x: Tensor, v: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = F.max_pool2d(torch.tanh(x), 2)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad((gradient * v).sum(), x)[0]

    args = torch.randn(16, 16, 32, 32), torch.randn(16, 16, 32, 32)
    graph = apply(inductor.PASSES, capture(fn, *args, for_fusion=True))
    assert computed_once not in targets(graph)
    doubles = [arg.double() for arg in args]
    assert_close(Inductor().compile(capture(fn, *doubles, for_fusion=True))(list(doubles))[0], fn(*doubles), SECOND_DERIVATIVE)


def adam(size: int) -> tuple[Any, list[Tensor]]:
    """An update of a parameter with `size` elements, by gradient, first and second moment, and bias corrections."""
    optimizer = optim.adam(lr=1e-3)
    params = {"w": torch.randn(size)}

    def update(w: Tensor, gradient: Tensor, state: Any, hyper: Any) -> Any:
        return optimizer.update({"w": gradient}, state, {"w": w}, hyper)

    return update, [params["w"], torch.randn(size), optimizer.init(params), optimizer.hyper]  # type: ignore[list-item]


def test_adams_bias_corrections_are_in_no_loop_over_parameters(libraries: list[str]) -> None:
    update, values = adam(1 << 14)
    Inductor().compile(capture(update, *values))
    loops = [loop for source in libraries for loop in source.split("for(int64_t") if "16384" in loop.split("{")[0]]
    assert loops and not any("std::pow" in loop for loop in loops)
