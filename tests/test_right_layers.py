"""Layers, wrappers and losses that need care: each has the numbers of the naive loop in float64, or an error that says the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from adaptrt import FirstOrder, Replay, Stash, Unrolled, compile_unroll, optim
from adaptrt.adjoint import Adjoint
from adaptrt.errors import (
    AdaptrtError,
    DataDependentControlFlow,
    InvalidArgument,
    InvalidType,
    NotDifferentiable,
    NotTraceable,
    UnsupportedParameter,
)
from tests import naive
from tests.bad_input import anything

pytestmark = [
    pytest.mark.usefixtures("double"),
    # PyTorch's own, of making scripts and of wrapping models.
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
]

LR = 0.1
TOLERANCE = 1e-10
EXACT: tuple[Adjoint, ...] = (Unrolled(), Replay(), Stash())
Batch = tuple[Tensor, Tensor]


def batches(num: int = 2) -> list[Batch]:
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(num)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def gradients(meta_loss: Tensor, model: nn.Module) -> list[Tensor]:
    return [meta_loss.detach(), *torch.autograd.grad(meta_loss, list(model.parameters()))]


def by_hand(model: nn.Module, loss: Callable[..., Tensor], support: Batch, query: Batch, k: int, first_order: bool = False) -> list[Tensor]:
    loop = naive.Loop(model, loss, naive.sgd, {"lr": LR}, k, first_order=first_order)
    start = naive.Start(dict(model.named_parameters()), {}, dict(model.named_buffers()), {})
    return gradients(naive.meta_loss(loop, start, support, query), model)


def assert_equal(
    made: nn.Module,
    plain: nn.Module,
    loss: Callable[..., Tensor] = F.cross_entropy,
    plain_loss: Callable[..., Tensor] | None = None,
    data: Sequence[Batch] | None = None,
    adjoints: Sequence[Adjoint] = EXACT,
    backend: str = "eager",
    k: int = 2,
) -> None:
    """The meta-gradient of `made` is that of a loop over `plain`, which has the same parameters in the same order."""
    support, query = data or batches()
    for adjoint in adjoints:
        unroll = compile_unroll(made, optim.sgd(lr=LR), k, loss=loss, adjoint=adjoint, backend=backend)
        found = gradients(unroll(support, query), made)
        wanted = by_hand(plain, plain_loss or loss, support, query, k, isinstance(adjoint, FirstOrder))
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


# --- activation checkpointing


class Checkpointed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = mlp()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "not":
            return self.layers(x)
        if self.how == "sequential":
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)
        hidden: Any = checkpoint(self.layers[:2], x, use_reentrant=self.how == "reentrant")
        return self.layers[2](hidden)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["reentrant", "without", "sequential"])
def test_a_checkpoint_is_the_identity(how: str, backend: str) -> None:
    if backend == "inductor" and how != "without":
        pytest.skip("its graph is the same, as the eager backend shows")
    made, plain = Checkpointed(how), Checkpointed("not")
    plain.load_state_dict(made.state_dict())
    assert_equal(made, plain, adjoints=EXACT if backend == "eager" else EXACT[:1], backend=backend)


def test_checkpoints_work_outside_of_programs_afterwards() -> None:
    model = Checkpointed("without")
    compile_unroll(model, optim.sgd(lr=LR), 1, loss=F.cross_entropy, backend="eager").adapt(batches()[0])
    x = torch.randn(6, 4)
    calls: list[int] = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for how in ("without", "reentrant"):
        model.how = how
        model(x.requires_grad_()).sum().backward()
    assert len(calls) == 4, "each is computed again for its backward pass"


# --- torch.compile


def compiled_model() -> nn.Module:
    made: Any = torch.compile(mlp(), backend="eager")
    return made


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


def compiled_parts() -> nn.Module:
    first: Any = torch.compile(nn.Linear(4, 5), backend="eager")
    last = nn.Linear(5, 3)
    last.compile(backend="eager")
    return nn.Sequential(first, nn.Tanh(), last)


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    @torch.compile(backend="eager")
    def act(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(x))


COMPILED = [compiled_model, compiled_in_place, compiled_parts, WithFunction]


@pytest.mark.parametrize("build", COMPILED)
def test_what_torch_compile_made_runs_as_it_was(build: Callable[[], nn.Module]) -> None:
    made, plain = build(), mlp()
    with torch.no_grad():
        for own, other in zip(plain.parameters(), made.parameters(), strict=True):
            own.copy_(other)
    loss = torch.compile(F.cross_entropy, backend="eager")
    assert_equal(made, plain, loss, F.cross_entropy)


def test_names_are_those_that_the_compiled_model_has() -> None:
    model = compiled_model()
    adapted = compile_unroll(model, optim.sgd(lr=LR), 1, loss=F.cross_entropy, backend="eager").adapt(batches()[0])
    assert list(adapted.params) == [name for name, _ in model.named_parameters()]
    before = torch.get_default_dtype()
    assert model(torch.randn(2, 4)).dtype is before, "and it still runs by itself"


# --- batch normalisation with cumulative statistics


def normalised(kind: type[Any], **options: Any) -> nn.Module:
    layers = [nn.Linear(4, 3), kind(3, momentum=None, **options)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("backend, adjoints", [("eager", EXACT), pytest.param("inductor", EXACT[:1], marks=pytest.mark.slow)])
def test_cumulative_batch_norm(backend: str, adjoints: Sequence[Adjoint]) -> None:
    model = normalised(nn.BatchNorm1d)
    model(torch.randn(6, 4))
    plain = copy.deepcopy(model)
    assert_equal(model, plain, adjoints=adjoints, backend=backend, k=3)
    support, _ = batches()
    adapted = compile_unroll(model, optim.sgd(lr=LR), 3, loss=F.cross_entropy, backend=backend).adapt(support)
    loop = naive.Loop(plain, F.cross_entropy, naive.sgd, {"lr": LR}, 3)
    wanted = naive.adapt(loop, naive.Start(dict(plain.named_parameters()), {}, dict(plain.named_buffers()), {}), support)
    for name, value in wanted.buffers.items():
        torch.testing.assert_close(adapted.buffers[name], value, rtol=TOLERANCE, atol=TOLERANCE)
    assert adapted.buffers["1.num_batches_tracked"] == 4
    # Predictions use the new statistics.
    x = torch.randn(5, 4)
    model.eval()
    plain.eval()
    wanted_output, _ = naive.call(plain, wanted.params, wanted.buffers, x)
    torch.testing.assert_close(adapted(x), wanted_output, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm2d, (6, 2, 4, 4)), (nn.BatchNorm3d, (6, 2, 3, 3, 3))])
def test_cumulative_batch_norm_of_images(kind: Any, shape: tuple[int, ...]) -> None:
    norm = kind(2, momentum=None, affine=False)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(torch.Size(shape[1:]).numel(), 3))
    data = [(torch.randn(shape), torch.randint(3, (6,))) for _ in range(2)]
    assert_equal(model, copy.deepcopy(model), data=data, adjoints=EXACT[:1])


# --- wrappers for several devices


def test_data_parallel_is_unwrapped() -> None:
    inner = mlp()
    made = nn.DataParallel(inner)
    unroll = compile_unroll(made, torch.optim.SGD(made.parameters(), LR), 2, loss=F.cross_entropy, backend="eager")
    support, query = batches()
    for got, want in zip(gradients(unroll(support, query), inner), by_hand(inner, F.cross_entropy, support, query, 2), strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    assert list(unroll.adapt(support).params) == [name for name, _ in inner.named_parameters()]
    part: Any = nn.Sequential(nn.DataParallel(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    plain = mlp()
    plain.load_state_dict(dict(zip(plain.state_dict(), part.state_dict().values(), strict=True)))
    assert_equal(part, plain, adjoints=EXACT[:1])


# --- buffers


class TwoBuffers(nn.Module):
    base: Tensor
    view: Tensor

    def __init__(self, write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        base = torch.ones(4)
        self.write = write
        self.register_buffer("base", base)
        self.register_buffer("view", base[:3])

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return self.layer(x * self.base) + self.view


def test_buffers_that_share_memory_may_be_read() -> None:
    model = TwoBuffers(lambda module, x: None)
    assert_equal(model, copy.deepcopy(model))


def _assign(module: Any, x: Tensor) -> None:
    module.base = module.base + 1.0


def _add(module: Any, x: Tensor) -> None:
    module.base.add_(1.0)


def _normalise(module: Any, x: Tensor) -> None:
    F.batch_norm(x, module.base, torch.ones(4), training=True)


@pytest.mark.parametrize("write", [_assign, _add, _normalise])
def test_buffers_that_share_memory_must_not_be_written(write: Callable[[Any, Tensor], None]) -> None:
    unroll = compile_unroll(TwoBuffers(write), optim.sgd(lr=LR), 2, loss=F.cross_entropy, backend="eager")
    with pytest.raises(UnsupportedParameter, match=r"buffers 'view' and 'base' share memory, and TwoBuffers writes to 'base'.*clone one"):
        unroll.adapt(batches()[0])


class Membrane(nn.Module):
    """A buffer that gets its shape in the first call, as spiking networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.current = nn.Linear(4, 3)
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        current = self.current(x)
        if self.mem.shape != current.shape:
            self.mem = torch.zeros_like(current)
        self.mem = 0.9 * self.mem + current
        return self.mem


def test_a_buffer_without_its_shape() -> None:
    model = Membrane()
    support, query = batches()
    with pytest.raises(
        InvalidArgument, match=r"buffer 'mem' is float64\[0\].*float64\[6, 3\].*call the model once, under no_grad, on a batch"
    ):
        compile_unroll(model, optim.sgd(lr=LR), 2, loss=F.cross_entropy, backend="eager").adapt(support)
    with torch.no_grad():
        model(torch.randn(6, 4))
    assert_equal(model, model, data=(support, query))


# --- what is refused


class Around(nn.Module):
    """A layer and a function after it."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.layer(x))


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        x.view(-1)[0] = 1.0
        return grad * ctx.saved_tensors[0]


@torch.library.custom_op("adaptrt_layers::no_fake", mutates_args=())
def no_fake(x: Tensor) -> Tensor:
    return 2.0 * x


@torch.library.custom_op("adaptrt_layers::once", mutates_args=())
def once(x: Tensor) -> Tensor:
    return 2.0 * x


@torch.library.custom_op("adaptrt_layers::once_backward", mutates_args=())
def once_backward(x: Tensor) -> Tensor:
    return 2.0 * x


once.register_fake(torch.empty_like)
once_backward.register_fake(torch.empty_like)
once.register_autograd(lambda ctx, grad: once_backward(grad), setup_context=lambda ctx, inputs, output: None)


def with_buffer(value: Tensor) -> nn.Module:
    model = mlp()
    model.register_buffer("table", value)
    return model


SPARSE = torch.eye(6, dtype=torch.float64).to_sparse()


class Refused(NamedTuple):
    build: Callable[[], nn.Module]
    error: type[AdaptrtError]
    message: str
    loss: Any = F.cross_entropy
    inputs: Callable[[], Any] = lambda: torch.randn(6, 4)


def _normal(output: Tensor, target: Tensor) -> Tensor:
    return -torch.distributions.Normal(output, 1.0, validate_args=True).log_prob(F.one_hot(target, 3).to(output)).mean()


def _chosen(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output[target > 0], target[target > 0])


HERE = r"test_right_layers\.py:\d+: "
REFUSED = {
    "script": Refused(lambda: torch.jit.script(mlp()), InvalidType, r"the model was made by torch\.jit.*pass the Python module"),
    "traced part": Refused(
        lambda: nn.Sequential(anything(torch.jit.trace(nn.Linear(4, 4), torch.randn(6, 4))), nn.Linear(4, 3)),
        InvalidType,
        r"module '0' was made by torch\.jit.*load_state_dict",
    ),
    "scripted loss": Refused(mlp, InvalidType, r"the loss was made by torch\.jit", lambda: torch.jit.script(nn.CrossEntropyLoss())),
    "meta device": Refused(
        lambda: mlp().to("meta"), UnsupportedParameter, r"parameter '0\.weight' is on the meta device.*load the model's"
    ),
    "meta buffer": Refused(
        lambda: with_buffer(torch.zeros(2, device="meta")), UnsupportedParameter, r"buffer 'table' is on the meta device.*load"
    ),
    "sparse buffer": Refused(lambda: with_buffer(SPARSE), UnsupportedParameter, r"buffer 'table' has layout torch\.sparse_coo.*to_dense"),
    "sparse constant": Refused(
        lambda: Around(lambda h: torch.sparse.mm(SPARSE, h)),
        NotTraceable,
        r"tensor of layout torch\.sparse_coo \(shape \[6, 6\]\).*to_dense",
    ),
    "nested buffer": Refused(
        lambda: with_buffer(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        UnsupportedParameter,
        r"buffer 'table' is a nested tensor.*pad it",
    ),
    "nested data": Refused(
        mlp,
        InvalidType,
        r"support input 0 is a nested tensor.*pad it",
        inputs=lambda: torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(4, 4)]),
    ),
    "nested within": Refused(
        lambda: Around(lambda h: torch.nested.nested_tensor([h[:2], h[2:]]).to_padded_tensor(0.0)[0]),
        NotTraceable,
        HERE + r".*makes a nested tensor.*Pad it",
    ),
    "max_norm": Refused(
        lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 3)),
        UnsupportedParameter,
        r"module '0' was built with max_norm=1\.0.*max_norm=None",
        inputs=lambda: torch.randint(5, (6,)),
    ),
    "operator without fake kernel": Refused(
        lambda: Around(no_fake), NotTraceable, r"calls a custom operator.*not known without running it.*torch\.library\.register_fake"
    ),
    "operator with one derivative": Refused(
        lambda: Around(once), NotDifferentiable, r"'once_backward'.*has no derivative.*adjoint=FirstOrder\(\)"
    ),
    "custom function in place": Refused(
        lambda: Around(lambda h: InPlace.apply(h)),  # pyright: ignore[reportArgumentType]
        NotDifferentiable,
        HERE + r"(.|\n)*custom autograd functions: InPlace(.|\n)*return new tensors",
    ),
    "distribution": Refused(mlp, DataDependentControlFlow, HERE + r".*Normal\(.*validate_args=False", _normal),
    "rows by a mask": Refused(mlp, DataDependentControlFlow, HERE + r".*weight 0.*\(losses \* mask\)\.sum\(\) / mask\.sum\(\)", _chosen),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    case = REFUSED[name]
    loss = case.loss() if name == "scripted loss" else case.loss
    with pytest.raises(case.error, match=case.message) as raised:
        unroll = compile_unroll(case.build(), optim.sgd(lr=LR), 2, loss=loss, adjoint=Unrolled(), backend="eager")
        batch = case.inputs(), torch.randint(3, (6,))
        unroll(batch, batch)
    assert type(raised.value) is case.error


def test_exported_programs() -> None:
    model = mlp()
    program = torch.export.export(model, (torch.randn(6, 4),))
    wrong: Any = program
    with pytest.raises(InvalidType, match=r"got ExportedProgram; pass its \.module\(\)"):
        compile_unroll(wrong, optim.sgd(lr=LR), 2)
    made: Any = program.module()
    assert_equal(made, model, adjoints=EXACT[:1])


def test_the_advice_about_distributions_and_masks() -> None:
    def likelihood(output: Tensor, target: Tensor) -> Tensor:
        return -torch.distributions.Normal(output, 1.0, validate_args=False).log_prob(F.one_hot(target, 3).to(output)).mean()

    def weighted(output: Tensor, target: Tensor) -> Tensor:
        mask = (target > 0).to(output)
        return (F.cross_entropy(output, target, reduction="none") * mask).sum() / mask.sum()

    for loss, plain_loss in ((likelihood, likelihood), (weighted, _chosen)):
        model = mlp()
        assert_equal(model, model, loss, plain_loss, adjoints=EXACT[:1])


# --- losses by formulas


class Frames(nn.Module):
    """Examples [N, T, F] to log-probabilities [T, N, C], as CTC takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).log_softmax(-1).transpose(0, 1)


LASTING, SPELT = torch.tensor([7, 6, 7]), torch.tensor([3, 1, 2])


def ctc_constant(output: Tensor, target: Tensor) -> Tensor:
    lengths: Any = (7, 6, 7), (3, 1, 2)
    return F.ctc_loss(output, target, *lengths)


def ctc_by_data(output: Tensor, target: Any) -> Tensor:
    labels, lasting, spelt = target
    return nn.CTCLoss(reduction="sum", zero_infinity=True)(output, labels, lasting, spelt)


def ctc_in_a_row(output: Tensor, target: Any) -> Tensor:
    return F.ctc_loss(output, target[:6], torch.tensor([7, 6, 7]), SPELT, reduction="none").mean()


def by_all_paths(output: Tensor, target: Any) -> Tensor:
    """The mean loss of CTC, from the probabilities of all sequences of frames that spell the target."""
    losses: list[Tensor] = []
    for example, (lasting, spelt) in enumerate(zip((4, 3), (2, 1), strict=True)):
        classes = torch.cartesian_prod(*[torch.arange(output.shape[2])] * lasting)
        wanted = target[example, :spelt].tolist()
        spells = [_collapsed(path) == wanted for path in classes.tolist()]
        paths = output[torch.arange(lasting), example].gather(1, classes.T).sum(0)
        losses.append(-torch.logsumexp(paths[torch.tensor(spells)], 0) / spelt)
    return torch.stack(losses).mean()


def _collapsed(path: Sequence[int]) -> list[int]:
    return [label for index, label in enumerate(path) if label and (index == 0 or path[index - 1] != label)]


def test_ctc_has_a_second_derivative() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        lengths: Any = (4, 3), (2, 1)
        return F.ctc_loss(output, target, *lengths)

    data: list[Any] = [(torch.randn(2, 4, 4), torch.tensor([[2, 2], [4, 0]])), (torch.randn(2, 4, 4), torch.tensor([[1, 3], [2, 0]]))]
    model = Frames()
    assert_equal(model, model, loss, by_all_paths, data=data)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", [ctc_constant, ctc_by_data, ctc_in_a_row])
def test_ctc_is_pytorchs(loss: Callable[..., Tensor], backend: str) -> None:
    if backend == "inductor" and loss is not ctc_constant:
        pytest.skip("one is enough")
    padded = torch.randint(1, 5, (3, 3))
    targets = {ctc_constant: padded, ctc_in_a_row: torch.randint(1, 5, (7,)), ctc_by_data: (padded, LASTING, SPELT)}
    data: list[Any] = [(torch.randn(3, 7, 4), targets[loss]) for _ in range(2)]
    model = Frames()
    assert_equal(model, model, loss, data=data, adjoints=(FirstOrder(),), backend=backend)


def test_ctc_of_what_cannot_be_spelt() -> None:
    data: list[Any] = [(torch.randn(3, 7, 4), (torch.tensor([[1, 2, 3], [1, 1, 1], [2, 1, 4]]), torch.tensor([7, 3, 7]), SPELT * 0 + 3))]
    model = Frames()
    assert_equal(model, model, ctc_by_data, data=data * 2, adjoints=(FirstOrder(),))


@pytest.mark.parametrize("full, eps, reduction", [(False, 1e-6, "mean"), (True, 0.9, "sum")])
def test_gaussian_likelihood(full: bool, eps: float, reduction: str) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        likelihood = nn.GaussianNLLLoss(full=full, eps=eps, reduction=reduction)
        return 0.1 * likelihood(output[:, 0], target.to(output), output[:, 1].exp())

    model = mlp()
    assert_equal(model, model, loss)


def test_a_negative_variance_makes_the_loss_nan() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.gaussian_nll_loss(output[:, 0], target.to(output), -output[:, 1].exp())

    unroll = compile_unroll(mlp(), optim.sgd(lr=LR), 1, loss=loss, backend="eager")
    assert unroll.adapt(batches()[0]).losses.isnan().all()


# --- torch.func within a model


def _energy(weight: Tensor, x: Tensor) -> Tensor:
    return (torch.tanh(x @ weight.T) ** 3).sum()


def _jvp(weight: Tensor, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda a: torch.tanh(a @ weight.T), (x,), (torch.ones_like(x),))[1]


TRANSFORMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hessian": lambda w, x: torch.func.hessian(lambda a: _energy(w, a))(x[0]).sum(0)[:3],
    "jacrev": lambda w, x: torch.func.jacrev(lambda a: torch.tanh(a @ w.T))(x[0]).sum(1),
    "jacfwd": lambda w, x: torch.func.jacfwd(lambda a: torch.tanh(a @ w.T))(x[0]).sum(1),
    "grad": lambda w, x: torch.func.grad(lambda a: _energy(a, x))(w).sum(1),
    "vmap": lambda w, x: torch.func.vmap(torch.func.hessian(lambda a: _energy(w, a)))(x).sum(1)[:, :3],
    "jvp": _jvp,
}


class Transformed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.function = TRANSFORMED[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.function(self.layer.weight, x)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_func_within_a_model(name: str) -> None:
    model = Transformed(name)
    assert_equal(model, model, adjoints=(*EXACT, FirstOrder()))
    tasks = batches(4)
    support, query = [tuple(torch.stack(parts) for parts in zip(*tasks[start : start + 2], strict=True)) for start in (0, 2)]
    for adjoint in EXACT:
        unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=F.cross_entropy, adjoint=adjoint, backend="eager").vmap()
        found = gradients(unroll(support, query), model)
        each = [by_hand(model, F.cross_entropy, tasks[index], tasks[index + 2], 2) for index in range(2)]
        for got, *wanted in zip(found, *each, strict=True):
            torch.testing.assert_close(got, sum(wanted) / 2, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated")  # by which Inductor compiles a diagonal
def test_a_hessian_within_a_model_compiled() -> None:
    model = Transformed("hessian")
    assert_equal(model, model, adjoints=EXACT[:1], backend="inductor", k=1)
