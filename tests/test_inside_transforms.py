"""Calls within transformations of `torch.func` and within `torch.compile`: right, or refused by name."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptrt
from adaptrt.errors import WithinTransform
from tests import naive
from tests.bad_input import normal
from tests.test_refusals import close, double, looped, unrolled

BACKENDS = ("eager", pytest.param("inductor", marks=pytest.mark.slow))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def transformed(apply: Callable[[Callable[[Tensor], Tensor], Tensor], Any]) -> list[Callable[[], Any]]:
    """The transformation of a meta-loss, of losses, of a prediction, and of a function around one that is no function of the argument."""
    unroll, (x, y) = unrolled(linear()), double()
    adapted = unroll.adapt((x, y)).detach()
    unroll((x, y), (x, y))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda value: unroll((value, y), (x, y)),
        lambda value: unroll.adapt((value, y)).losses.sum(),
        lambda value: adapted(value).sum(),
        lambda value: unroll((x, y), (x, y)) * value.sum(),
    ]
    return [lambda function=function: apply(function, x) for function in functions]


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda function, x: torch.func.vmap(function)(torch.stack([x, x])),
    "vmap without gradients": lambda function, x: torch.no_grad()(torch.func.vmap(function))(torch.stack([x, x])),
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vjp": lambda function, x: torch.func.vjp(function, x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "hessian": lambda function, x: torch.func.hessian(function)(x),
    "functionalize": lambda function, x: torch.func.functionalize(function)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by which PyTorch loads its rules for forward mode
def test_transformations_are_refused(name: str) -> None:
    for run in transformed(TRANSFORMS[name]):
        with pytest.raises(WithinTransform, match=r"unroll\.vmap\(\).*torch\.autograd\.grad"):
            run()


def test_a_transformation_within_a_model_is_none_of_the_call() -> None:
    model = linear()
    unroll, batch = unrolled(model, lambda output, y: torch.func.vmap(lambda row: row.square().sum())(output).mean()), double()
    loop, start = looped(model, lambda output, y: output.square().sum(1).mean())
    close(unroll(batch, batch), naive.meta_loss(loop, start, batch, batch))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_cotangents_at_once(backend: str) -> None:
    """`is_grads_batched=True`, by which vectorised Jacobians are computed, and backward passes within `vmap`."""
    model, (x, y) = linear(), double()
    x.requires_grad_()
    unroll = unrolled(model, backend=backend)
    adapted = naive.adapt(*looped(model), (x, y))
    predicted = naive.call(model, adapted.params, {}, x)[0]
    pairs = [
        (unroll((x, y), (x, y)), naive.meta_loss(*looped(model), (x, y), (x, y))),
        (unroll.adapt((x, y)).losses, adapted.losses),
        (unroll.adapt((x, y))(x), predicted),
    ]
    for found, wanted in pairs:
        cotangents = normal(2, *found.shape).double()
        each = [torch.autograd.grad(wanted, (model.weight, x), one, retain_graph=True) for one in cotangents]
        at_once = torch.autograd.grad(found, (model.weight, x), cotangents, is_grads_batched=True, retain_graph=True)
        mapped = torch.func.vmap(lambda one, found=found: torch.autograd.grad(found, (model.weight, x), one, retain_graph=True))(cotangents)
        for got, also, *rest in zip(at_once, mapped, *each, strict=True):
            close(got, torch.stack(rest))
            close(also, torch.stack(rest))


WITHIN = """
    import logging, sys, warnings
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
    import torch
    import torch.nn.functional as F
    import adaptrt
    if torch.version.cuda is None or torch.__version__ >= (2, 14):  # otherwise adaptrt.graph.capture makes a fake tensor at once
        assert "torch._dynamo" not in sys.modules
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 2, loss=F.cross_entropy, backend="eager")
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3

    def step(x, y):
        h = 2 * x.sin()
        loss = unroll((h, y), (x, y))
        loss.backward()
        adapted = unroll.adapt((h, y))
        return loss.detach() + adapted(x).square().sum() + adapted.losses.sum()

    wanted, gradient = step(x, y), model.weight.grad
    model.weight.grad = None
    graphs = []

    def count(module, examples):
        graphs.append(module)
        return module.forward

    records = []
    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())
    for name in ("torch._dynamo", "torch"):
        logging.getLogger(name).addHandler(Handler())
    fresh = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 2, loss=F.cross_entropy, backend="eager")
    for again in range(2):
        found = torch.compile(step, backend=count)(x, y)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.weight.grad, gradient, rtol=1e-10, atol=1e-10)
        model.weight.grad = None
        unroll = fresh  # the second time programs are captured within the compiled function
    print(len(graphs), len(records), records[:1])
    mine = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert 3 <= len(graphs) <= 8 and len(mine) <= 20, [node.target for node in mine]
    assert not records
"""


def test_within_torch_compile() -> None:
    """PyTorch compiles the user's lines and leaves ours alone: no warning, and no graph of ours. It takes a process without Dynamo."""
    script = textwrap.dedent(WITHIN)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "Graph break" not in found.stderr, found.stderr[-2000:]


def test_entry_points_are_functions_and_no_wrappers() -> None:
    assert adaptrt.CompiledUnroll.adapt.__qualname__ == "CompiledUnroll.adapt"
    assert not hasattr(adaptrt.CompiledUnroll.adapt, "__wrapped__")
