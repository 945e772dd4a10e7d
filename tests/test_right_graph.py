"""Operations that were refused or crashed while a function was captured: now right against the oracle, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptrt import Adjoint, Replay, Stash, Unrolled, compile_unroll, optim
from adaptrt.errors import DataDependentControlFlow, InvalidType, LabelOutOfRange, NotTraceable
from adaptrt.graph.capture import capture
from adaptrt.graph.indices import index_bounds
from adaptrt.graph.passes.batch import batch
from adaptrt.inner import check
from adaptrt.inner.step import Batch
from tests import naive
from tests.tolerances import LONG_SUM, META_GRADIENT, assert_close, relative_error

pytestmark = pytest.mark.usefixtures("double")

private: Any = torch
K = 3
TASKS = 2


class Apply(nn.Module):
    """Parameters and buffers, and a function of the module and its input."""

    def __init__(self, fn: Callable[[Any, Any], Tensor], params: dict[str, Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def linear(fn: Callable[[Any, Any], Tensor], **buffers: Tensor) -> Apply:
    return Apply(fn, {"w": torch.randn(4, 3)}, **buffers)


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    target: Callable[[], Tensor] = lambda: torch.randint(3, (6,))
    data_gradient: bool = True


def vectors() -> Tensor:
    return torch.randn(6, 4)


def images() -> Tensor:
    return torch.randn(6, 2, 5, 5)


def in_place_noise(m: Any, x: Tensor) -> Tensor:
    return (x + torch.randn(x.shape).mul_(0.1)) @ m.w + torch.empty(6, 3).normal_().abs_() * 0.1


def dropped(m: Any, x: Tensor) -> Tensor:
    keep = torch.rand(6, 1).add_(0.7).floor_()
    return (x * keep.div_(0.7)) @ m.w + torch.rand_like(x[:, :3]).sub_(0.5)[:, :1].mul_(0.2)


def of_constants(m: Any, x: Tensor) -> Tensor:
    steps = torch.linspace(0, 1, 4)
    assert (steps[1:] > steps[:-1]).all()
    table = torch.zeros(4)
    table[1:3] = 2.0
    table.add_(steps)
    count = torch.arange(1, 3).tolist()[1] + int(torch.linspace(0, 3, 3)[1]) + torch.tensor([3]).item()
    if torch.equal(torch.ones(2), torch.tensor([1.0, 1.0])) and table.bool().any():
        count += float(table.sum())
    return (x @ m.w) * count + table.nonzero().sum()


def by_mask_of_constants(m: Any, x: Tensor) -> Tensor:
    lower = torch.ones(4, 4).tril().bool()
    products = (x[:, :, None] * x[:, None, :])[:, lower]
    return x @ m.w + products.sum(1, keepdim=True) * m.w[lower[0]]


def item(m: Any, x: Tensor) -> Tensor:
    return x @ m.p[m.i] + m.p[m.last, 1:2, ..., None, m.i].sum() + m.p[None, ..., m.i, :].sum()


def item_of_constants(m: Any, x: Tensor) -> Tensor:
    table = torch.zeros(3, 4)
    for i in torch.arange(2):
        table[i + 1].add_(x[i])  # a view
    table[torch.tensor(0), m.i] = 1.0
    return (x + table[m.i - 1]) @ m.w


def stepping(m: Any, x: Tensor) -> Tensor:
    m.memory[m.i] = m.memory[m.i] * 0.5 + x.mean()
    used = m.memory[m.i]
    m.i.add_(1).remainder_(2)
    return x @ (m.p[m.i] + m.p[0]) * (1 + used + m.memory.sum())


def channels_last(m: Any, x: Tensor) -> Tensor:
    y = F.conv2d(x.to(memory_format=torch.channels_last), m.c).contiguous(memory_format=torch.channels_last)
    y = y + torch.zeros_like(y, memory_format=torch.channels_last) + y.clone(memory_format=torch.channels_last)
    return y.tanh().mean((2, 3)) + y.to(torch.double, memory_format=torch.channels_last).flatten(1)[:, :3]


def asks_for_gradient(m: Any, x: Tensor) -> Tensor:
    hidden = x[:, None]
    hidden.requires_grad = True
    return hidden.tanh()[:, 0] @ m.w


def transposed(dims: int, groups: int = 1, dilation: int = 1) -> nn.Module:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    padded = {"stride": 2, "padding": 1, "output_padding": 1}
    return nn.Sequential(kind(2, 2, 3, groups=groups, dilation=dilation, **padded), nn.Tanh(), kind(2, 1, 3, **padded))


def transposed_case(dims: int, groups: int = 1, dilation: int = 1) -> Case:
    with torch.no_grad():
        shape = transposed(dims, groups, dilation)(torch.zeros(2, 2, *[3] * dims, dtype=torch.get_default_dtype())).shape
    return Case(lambda: transposed(dims, groups, dilation), lambda: torch.randn(2, 2, *[3] * dims), F.mse_loss, lambda: torch.randn(shape))


CASES: dict[str, Case] = {
    "in-place operations on noise": Case(lambda: linear(in_place_noise), vectors),
    "dropout written out": Case(lambda: linear(dropped), vectors),
    "values of constants": Case(lambda: linear(of_constants), vectors),
    "selection by a constant mask": Case(lambda: linear(by_mask_of_constants), vectors),
    "p[i]": Case(
        lambda: Apply(item, {"p": torch.randn(5, 4, 3)}, i=torch.tensor(1), last=torch.tensor(-1)),
        vectors,
    ),
    "p[i] = v": Case(
        lambda: Apply(stepping, {"p": torch.randn(2, 4, 3)}, i=torch.tensor(0), memory=torch.zeros(2)),
        vectors,
    ),
    "p[i] of constants": Case(lambda: linear(item_of_constants, i=torch.tensor(2)), vectors),
    "channels last": Case(lambda: Apply(channels_last, {"c": torch.randn(3, 2, 3, 3)}), images),
    "requires_grad set on data": Case(lambda: linear(asks_for_gradient), vectors, data_gradient=False),
    "loss times a number": Case(lambda: linear(lambda m, x: x @ m.w), vectors, lambda out, y: F.cross_entropy(out, y) * 0.3 + 0.1),
}
TRANSPOSED = {
    f"{dims} axes, {groups} groups, dilation {dilation}": (dims, groups, dilation)
    for dims in (1, 2, 3)
    for groups, dilation in ((1, 1), (2, 1), (1, 2))
}


def check_case(case: Case, adjoint: Adjoint, backend: str, tasks: bool, opt: Any = None, rule: Any = naive.sgd, **hyper: Any) -> None:
    """Compares the meta-loss and its gradients by parameters and support inputs with the oracle's."""
    torch.manual_seed(0)
    model = case.model()
    count = TASKS if tasks else 1
    supports = [(case.inputs().requires_grad_(case.data_gradient), case.target()) for _ in range(count)]
    queries = [(case.inputs(), case.target()) for _ in range(count)]
    loop = naive.Loop(model, case.loss, rule, hyper or {"lr": 0.1}, K)
    start = naive.Start(dict(model.named_parameters()), {}, dict(model.named_buffers()), {})
    torch.manual_seed(1)
    wanted = torch.stack([naive.meta_loss(loop, start, s, q) for s, q in zip(supports, queries, strict=True)]).mean()
    wrt = [*model.parameters(), *[x for x, _ in supports if case.data_gradient]]
    expected = torch.autograd.grad(wanted, wrt)

    unroll = compile_unroll(model, opt or optim.sgd(lr=0.1), K, loss=case.loss, adjoint=adjoint, backend=backend)
    torch.manual_seed(1)
    if tasks:
        join = lambda batches: tuple(torch.stack(values) for values in zip(*batches, strict=True))  # noqa: E731
        found = unroll.vmap()(join(supports), join(queries))
    else:
        found = unroll(supports[0], queries[0])
    tolerance = META_GRADIENT[torch.float64]
    assert relative_error(found, wanted) < tolerance
    for got, want in zip(torch.autograd.grad(found, wrt), expected, strict=True):
        assert relative_error(got, want) < tolerance


RANDOM = ("in-place operations on noise", "dropout written out")
"""The oracle draws task after task, and a batch of tasks draws step after step, so these are compared for one task only."""


@pytest.mark.parametrize(("name", "tasks"), [*[(name, False) for name in CASES], *[(name, True) for name in CASES if name not in RANDOM]])
def test_they_are_right(name: str, tasks: bool) -> None:
    for adjoint in (Unrolled(), Stash()):
        check_case(CASES[name], adjoint, "eager", tasks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in-place operations on noise", "selection by a constant mask", "p[i]", "p[i] = v"])
def test_they_are_right_compiled(name: str) -> None:
    check_case(CASES[name], Replay(), "inductor", False)


@pytest.mark.parametrize("name", ["channels last", "loss times a number"])
def test_they_are_right_compiled_over_tasks(name: str) -> None:
    check_case(CASES[name], Stash(), "inductor", True)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_padded_transposed_convolutions(name: str) -> None:
    for adjoint in (Unrolled(), Replay(), Stash()):
        check_case(transposed_case(*TRANSPOSED[name]), adjoint, "eager", False)
    check_case(transposed_case(*TRANSPOSED[name]), Unrolled(), "eager", True)


def test_padded_transposed_convolutions_compiled() -> None:
    check_case(transposed_case(2, 2), Replay(), "inductor", False)


def adagrad(p: Tensor, g: Tensor, state: Any, lr: float, lr_decay: float, eps: float) -> tuple[Tensor, dict[str, Any]]:
    step, total = (state["step"], state["sum"]) if state else (0, torch.full_like(p, 0.1))
    total = total + g * g
    return p - lr / (1 + step * lr_decay) * g / (total.sqrt() + eps), {"step": step + 1, "sum": total}


def test_counts_of_tasks_meet_numbers() -> None:
    """What a step keeps of a count and a number has the dtype that the next program expects."""
    hyper = {"lr": 0.1, "lr_decay": 0.3, "eps": 0.1}
    opt = optim.adagrad(lr=0.1, lr_decay=0.3, eps=0.1, initial_accumulator_value=0.1)
    check_case(CASES["loss times a number"], Stash(), "inductor", True, opt, adagrad, **hyper)


READS: dict[str, Callable[[Any, Any], Any]] = {
    "data": lambda m, x: x.sum().item(),
    "parameter": lambda m, x: m.w.sum().tolist(),
    "buffer": lambda m, x: bool(m.b.any()),
    "noise": lambda m, x: float(torch.rand(())),
    "uninitialised": lambda m, x: float(torch.empty(2)[0]),
    "data written to a constant": lambda m, x: bool(torch.zeros(3).copy_(x[0, :3]).any()),
    "data written to a view": lambda m, x: float(written(torch.zeros(3), x)[1]),
    "data in a mask": lambda m, x: x[x > 0].sum(),
    "equal": lambda m, x: torch.equal(x, torch.zeros(6, 4)),
}


def written(constant: Tensor, x: Tensor) -> Tensor:
    constant.view(3)[1:].add_(x[0, 0])
    return constant


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_values_that_depend_on_inputs_are_refused(read: Callable[[Any, Any], Any]) -> None:
    model = linear(lambda m, x: (x @ m.w) * (2.0 if read(m, x) else 1.0), b=torch.ones(3))
    unroll = compile_unroll(model, optim.sgd(lr=0.1), K, loss=F.cross_entropy, backend="eager")
    with pytest.raises(DataDependentControlFlow, match=r"value of a tensor"):
        unroll.adapt((vectors(), torch.randint(3, (6,))))


def write_to_item(m: Any, x: Tensor) -> Tensor:
    m.b[m.i].add_(1.0)
    return x @ m.w


def write_before_use(m: Any, x: Tensor) -> Tensor:
    before = m.b[m.i]
    m.b.mul_(2.0)
    return x @ m.w + before


@pytest.mark.parametrize("forward", [write_to_item, write_before_use])
def test_writes_that_a_copy_would_lose_are_refused(forward: Callable[[Any, Any], Tensor]) -> None:
    model = linear(forward, b=torch.ones(3), i=torch.tensor(1))
    unroll = compile_unroll(model, optim.sgd(lr=0.1), K, loss=F.cross_entropy, backend="eager")
    with pytest.raises(NotTraceable, match=r"p\[i\] .*is a copy"):
        unroll.adapt((vectors(), torch.randint(3, (6,))))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_an_item_out_of_range_is_refused(backend: str) -> None:
    model = Apply(lambda m, x: x @ m.p[m.i], {"p": torch.randn(5, 4, 3)}, i=torch.tensor(7))
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 1, loss=F.cross_entropy, backend=backend)
    with pytest.raises(LabelOutOfRange, match=r"a kernel was given an index that does not exist \(.*out of bounds.*keep it within"):
        unroll.adapt((vectors(), torch.randint(3, (6,))))


# --- products of groups


GROUPED = {"rows": ((8, 4), (3, 4, 8)), "columns": ((3, 4, 8), (8, 8)), "terms": ((4, 8), (8, 4)), "all": ((3, 4, 8), (3, 8, 4))}


@pytest.mark.parametrize("name", GROUPED)
def test_products_of_groups_and_their_derivatives(name: str) -> None:
    """In float32, since PyTorch's kernel takes no float64: values, gradients and second derivatives, also over tasks."""
    ends = None if name == "all" else torch.tensor([2, 5, 8], dtype=torch.int32)

    def fn(left: Tensor, right: Tensor, *offs: Tensor) -> tuple[Tensor, ...]:
        left, right = left.detach().requires_grad_(), right.detach().requires_grad_()
        found = private._grouped_mm(left, right, offs=offs[0] if offs else None)
        grads = torch.autograd.grad(found.square().sum(), (left, right), create_graph=True)
        return (found, *grads, *torch.autograd.grad((grads[0].square().sum() + grads[1].sin().sum()), (left, right)))

    values = [torch.randn(2, *shape, dtype=torch.float32) for shape in GROUPED[name]]
    rest = [] if ends is None else [ends]
    graph = capture(fn, *[value[0] for value in values], *rest)
    over_tasks = batch(graph, [True, True, *[False for _ in rest]], [False] * 5, 2)
    stacked = over_tasks.run(*values, *rest)
    for task in range(2):
        wanted = fn(*[value[task] for value in values], *rest)
        found = graph.run(*[value[task] for value in values], *rest)
        for alone, together, want in zip(found, stacked, wanted, strict=True):
            assert_close(alone, want, LONG_SUM)
            assert_close(together[task], want, LONG_SUM)


# --- bounds of indices


class Tables(nn.Module):
    def __init__(self, small: int, columns: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.a, self.b, self.columns = nn.Embedding(small, 3), nn.Embedding(5, 3), columns

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.columns(x)
        return self.a(first) + self.b(second)


COLUMNS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "select": lambda x: (x[:, 0], x[:, 1]),
    "unbind": lambda x: tuple(x.unbind(1)),  # type: ignore[return-value]
    "chunk": lambda x: tuple(part[:, 0] for part in x.chunk(2, dim=1)),  # type: ignore[return-value]
    "transposed": lambda x: (x.t()[0].flip(0), x.t().contiguous()[1].flip(0)),
    "stacked": lambda x: (torch.stack([x[:, 0], x[:, 0]])[0], torch.cat([x[:, 1:], x[:, 1:]], 1)[:, 1]),
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_each_column_has_the_bound_of_its_table(columns: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def ids() -> Tensor:
        return torch.stack([torch.randint(3, (6,)), torch.tensor([4, 3, 2, 1, 0, 4])], 1)

    labels, queried = torch.randint(3, (6,)), torch.randint(3, (6,))
    model = Tables(3, columns)
    support, query = (ids(), labels), (ids(), queried)
    loop = naive.Loop(model, F.cross_entropy, naive.sgd, {"lr": 0.1}, K)
    start = naive.Start(dict(model.named_parameters()), {}, {}, {})
    wanted = naive.meta_loss(loop, start, support, query)
    unroll = compile_unroll(model, optim.sgd(lr=0.1), K, loss=F.cross_entropy, backend="eager")
    assert relative_error(unroll(support, query), wanted) < META_GRADIENT[torch.float64]

    for column, value, table in ((0, 3, 3), (1, 5, 5), (0, -1, 3)):
        wrong = support[0].clone()
        wrong[2, column] = value
        with pytest.raises(LabelOutOfRange, match=rf"support inputs holds {value}; rows of the embedding are 0 to {table - 1}"):
            unroll.adapt((wrong, labels))
        stacked = torch.stack([support[0], wrong])
        with pytest.raises(LabelOutOfRange, match=rf"holds {value}; "):
            unroll.vmap().adapt((stacked, torch.stack([labels, labels])))


def test_bounds_within_a_launch_hold_for_the_same_part() -> None:
    graph = capture(lambda table, x: F.embedding(x[:, 0], table), torch.zeros(3, 2), torch.zeros(4, 2, dtype=torch.long))
    bounds = [bound._replace(position=0) for bound in index_bounds(graph)]
    fine = torch.tensor([[0, 9], [2, -7], [1, 5], [2, 2]])
    found, valid = check.validated(Batch(fine, None), bounds, finite=False)
    assert valid is not None and valid
    assert torch.equal(found.inputs, fine)
    wrong = fine.clone()
    wrong[1, 0] = 3
    found, valid = check.validated(Batch(wrong, None), bounds, finite=False)
    assert valid is not None and not valid
    assert found.inputs[1, 0] == 0


# --- tensors whose memory does not hold their values


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "negative bit": lambda value: private._neg_view(-value),
    "imaginary part of a conjugate": lambda value: torch.complex(value, -value).conj().imag,
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_kernels_read_the_values_of_views(backend: str) -> None:
    x, y = vectors(), torch.randint(3, (6,))
    model = nn.Linear(4, 3)
    lr = torch.tensor(0.1)
    plain = compile_unroll(model, optim.sgd(lr=lr), 2, loss=F.cross_entropy, backend=backend).adapt((x, y)).losses
    unroll = compile_unroll(model, optim.sgd(lr=lr), 2, loss=F.cross_entropy, backend=backend)
    for view in UNUSUAL.values():
        unroll = compile_unroll(model, optim.sgd(lr=view(lr)), 2, loss=F.cross_entropy, backend=backend)
        for inputs in (view(x), x, view(x)):
            assert relative_error(unroll.adapt((inputs, y)).losses, plain) < META_GRADIENT[torch.float64]
    zeros = private._efficientzerotensor((6, 4))
    losses = unroll.adapt((zeros, y)).losses
    assert relative_error(losses, unroll.adapt((torch.zeros(6, 4), y)).losses) < META_GRADIENT[torch.float64]


def test_tensors_without_values_are_refused() -> None:
    x, y = vectors(), torch.randint(3, (6,))
    unroll = compile_unroll(nn.Linear(4, 3), optim.sgd(lr=0.1), 2, loss=F.cross_entropy, backend="eager")
    with FakeTensorMode():
        fake = torch.ones(6, 4)
    with pytest.raises(InvalidType, match=r"class FakeTensor, float64\[6, 4\], has no values of its own"):
        unroll.adapt((fake, y))
    with pytest.raises(InvalidType, match=r"is being functionalised"):
        unroll.adapt((private._to_functional_tensor(x), y))
