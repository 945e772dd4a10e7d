"""What is exchanged in PyTorch, and that another PyTorch is none the worse for it: nothing fails, and the numbers are right."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import inspect
import threading
import types
import warnings
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt.backend import Eager, Inductor, guards
from adaptrt.backend.base import Building, rehearsal
from adaptrt.backend.inductor import small_matmuls
from adaptrt.backend.inductor.exchange import COMPILER, FEW_LIBRARIES, TABLE, active, in_use
from adaptrt.errors import UnknownPyTorch
from adaptrt.graph import exchange, tracing_state
from adaptrt.graph.capture import capture
from adaptrt.graph.exchange import FX_TRACING, FX_TRACING_OF_OLD, Entry, Target, exchanged

TARGETS = [(entry, target) for entry in TABLE for target in (*entry.exchanged, *entry.needed) if entry is not FX_TRACING]


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a process of its own, as far as warnings and giving up are concerned."""
    monkeypatch.setattr(exchange, "_warned", set[str]())
    monkeypatch.setattr(exchange, "_given_up", None)


def fn(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w) @ w


def arguments() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 18, dtype=torch.float64), torch.randn(18, 18, dtype=torch.float64)


def check(factor: float) -> None:
    """Compiles something, anew, and compares."""
    x, w = arguments()
    (found,) = Inductor().compile(capture(lambda x, w: factor * fn(x, w), x, w))([x, w])
    torch.testing.assert_close(found, factor * fn(x, w))


# --- the table


def test_every_entry_holds_in_this_pytorch() -> None:
    """In versions that were looked at. Of the two ways to say that a thread traces there is one."""
    faults = {entry.name: entry.fault() for entry in TABLE if entry not in (FX_TRACING, FX_TRACING_OF_OLD)}
    assert not any(faults.values()), faults
    assert FX_TRACING.holds or FX_TRACING_OF_OLD.holds
    assert set(active()) == {entry.name for entry in TABLE}
    assert set(in_use()) == {entry.name for entry in TABLE if entry.exchanged}


def test_entries_say_what_they_are_for() -> None:
    for entry in TABLE:
        assert entry.purpose.endswith(".") and entry.otherwise and entry.versions and (entry.exchanged or entry.needed)
    named = [(entry.name, entry) for entry in TABLE]
    assert len({name for name, _ in named}) == len(named) - 1, "but for the two ways to say that a thread traces"


@pytest.mark.parametrize("entry, target", TARGETS, ids=str)
def test_a_name_that_is_missing(entry: Entry, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Target(target.module, f"{target.attribute}_of_another_name", target.parameters, target.keywords)
    assert missing.fault() == f"there is no {missing}"
    assert Target("torch.not_there", target.attribute).fault() is not None
    broken = Entry(entry.name, entry.purpose, entry.otherwise, entry.exchanged, (*entry.needed, missing), warns=entry.warns)
    if entry.warns:
        with pytest.warns(UnknownPyTorch, match=r"there is no .* so "):
            assert not broken.holds
    assert not broken.holds, "and says so once"


def test_a_function_with_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("another_torch")
    monkeypatch.setitem(__import__("sys").modules, "another_torch", module)
    target = Target("another_torch", "Class.method", ("self", "a", "b"), keywords=("a",))
    faults: list[str | None] = []
    for method in (lambda self, a, b: 0, lambda self, a, b, c=1: 0, lambda self, b, a: 0, lambda *args, **kwargs: 0, 3, max):
        module.Class = types.SimpleNamespace(method=method)
        faults.append(target.fault())
    assert faults[0] is None and all(faults[1:])
    assert faults[1] == "another_torch.Class.method takes (self, a, b, c)"
    by_name = Target("another_torch", "Class.method", keywords=("a",))
    found: list[bool] = []
    for method in (lambda self, a: 0, lambda *args, **kwargs: 0, lambda *args: 0, lambda b: 0, 3):
        module.Class = types.SimpleNamespace(method=method)
        found.append(by_name.fault() is None)
    assert found == [True, True, False, False, False]


# --- exchanged functions


def test_exchanged_for_one_block_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    owner: Any = types.ModuleType("another_torch")
    owner.name = lambda: "original"
    monkeypatch.setitem(__import__("sys").modules, "another_torch", owner)
    entry = Entry("name", "", "", exchanged=(Target("another_torch", "name", ()),))
    found: list[str] = []
    with exchanged(entry, lambda original: lambda: f"not {original()}"):
        kept = owner.name
        thread = threading.Thread(target=lambda: found.append(owner.name()))
        thread.start()
        thread.join()
        assert owner.name() == "not original" and found == ["original"]
    assert owner.name() == kept() == "original"
    with pytest.raises(KeyError), exchanged(entry, lambda original: lambda: "other"):
        raise KeyError
    assert owner.name() == "original"


class Parent:
    @classmethod
    def made(cls, text: str) -> str:
        return f"{cls.__name__}: {text}"

    @staticmethod
    def plain(text: str) -> str:
        return text


class Owner(Parent):
    @classmethod
    def own(cls, text: str) -> str:
        return f"{cls.__name__}: {text}"


class Child(Owner):
    pass


@pytest.mark.parametrize("name", ["made", "own", "plain"])
def test_exchanged_methods_of_classes(name: str) -> None:
    """Afterwards each is what it was and where it was; subclasses get their own class at all times."""
    before, calls = dict(vars(Owner)), [lambda: getattr(Owner, name)("x"), lambda: getattr(Owner(), name)("x")]
    of_child = getattr(Child, name)("x")
    wanted = [call() for call in calls]
    with exchange.exchanged_attribute(Owner, name, lambda text: f"other {text}"):
        assert list(inspect.signature(getattr(Owner, name)).parameters) == ["text"]
        assert [call() for call in calls] == ["other x"] * 2
        assert name == "plain" or getattr(Child, name)("x") == of_child
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.extend(call() for call in calls))
        thread.start()
        thread.join()
        assert found == wanted
    assert dict(vars(Owner)) == before and getattr(Child, name)("x") == of_child
    assert [call() for call in calls] == wanted


# --- another PyTorch


@pytest.fixture
def other_parameters(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """A PyTorch in which every function that is exchanged takes anything."""
    for entry in TABLE:
        for target in entry.exchanged:
            owner, name = target.owner()
            original = getattr(owner, name)

            def takes_anything(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                return original(*args, **kwargs)

            monkeypatch.setattr(owner, name, takes_anything)
    yield


@pytest.mark.usefixtures("empty_cache", "other_parameters")
def test_a_pytorch_whose_functions_take_other_arguments(libraries: list[str]) -> None:
    assert in_use() == ("garbage collection while compiling", "checkpoints"), "which do not look at their arguments"
    with pytest.warns(UnknownPyTorch, match="other threads draw again what they drew meanwhile"):
        check(2.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(3.5)  # the warning was given
    assert "small_matmul<" not in "".join(libraries)


@pytest.mark.usefixtures("empty_cache", "other_parameters")
def test_a_rehearsal_in_such_a_pytorch() -> None:
    x, w = arguments()
    with rehearsal(), pytest.warns(UnknownPyTorch):
        building = Inductor().compile(capture(lambda x, w: 4.5 * fn(x, w), x, w))
    assert isinstance(building, Building)
    torch.testing.assert_close(building([x, w])[0], 4.5 * fn(x, w))


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("in_rehearsal", [False, True])
def test_what_is_exchanged_makes_compiling_fail(in_rehearsal: bool, monkeypatch: pytest.MonkeyPatch, libraries: list[str]) -> None:
    """Functions have kept name and arguments, and do something else."""

    def fails(*args: Any) -> Any:
        raise AttributeError("'KernelGroup' object has no attribute 'loops_code'")

    monkeypatch.setattr(small_matmuls, "_finalize", fails)
    x, w = arguments()
    factor = 5.5 + in_rehearsal
    with pytest.warns(UnknownPyTorch, match="made it fail .*loops_code"):
        if in_rehearsal:
            with rehearsal():
                run = Inductor().compile(capture(lambda x, w: factor * fn(x, w), x, w))
        else:
            run = Inductor().compile(capture(lambda x, w: factor * fn(x, w), x, w))
    torch.testing.assert_close(run([x, w])[0], factor * fn(x, w))
    assert not in_use() and "small matrix products" not in active() and "recorded kernels" in active()
    count = len(libraries)
    check(7.5 + in_rehearsal)
    assert len(libraries) > count and "small_matmul<" not in "".join(libraries[count:])


@pytest.mark.usefixtures("empty_cache")
def test_code_without_what_is_exchanged_is_not_found_again(libraries: list[str]) -> None:
    with exchange.nothing_exchanged():
        check(9.5)
    count = len(libraries)
    check(9.5)
    assert len(libraries) > count and "small_matmul<" in "".join(libraries[count:])


@pytest.mark.usefixtures("empty_cache")
def test_a_lowering_that_another_inductor_does_not_take(monkeypatch: pytest.MonkeyPatch, libraries: list[str]) -> None:
    from torch._inductor import ir

    def other(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("Reduction.__init__() got an unexpected keyword argument 'reduction_ranges'")

    original = small_matmuls._as_reduction

    def lower(a: Any, b: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(ir, "Reduction", other)
            return original(a, b)

    monkeypatch.setattr(small_matmuls, "_as_reduction", lower)
    check(10.5)
    x = torch.randn(3, 5, 18, dtype=torch.float64)
    (found,) = Inductor().compile(capture(lambda x: 11.5 * (x @ x.mT), x))([x])
    torch.testing.assert_close(found, 11.5 * (x @ x.mT))
    assert "small_matmul<" not in "".join(libraries)


def test_without_a_compiler_that_is_known_programs_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptrt.backend.inductor import compile as inductor

    broken = Entry(COMPILER.name, "", COMPILER.otherwise, needed=(Target("torch._inductor.compile_fx", "gone"),), warns=True)
    monkeypatch.setattr(inductor, "COMPILER", broken)
    monkeypatch.setattr(inductor, "_compile", lambda *args: pytest.fail("compiled"))
    x, w = arguments()
    graph = capture(fn, x, w)
    with pytest.warns(UnknownPyTorch, match="there is no torch._inductor.compile_fx.gone .* programs run on the eager backend"):
        run = Inductor().compile(graph)
    assert Inductor().lower(graph) is graph
    torch.testing.assert_close(run([x, w])[0], fn(x, w))


def test_without_guards_no_call_is_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3)
    assert guards.alike([x])(x)

    def other(*tensors: Tensor, sizes: Any) -> None: ...

    for namespace in (types.SimpleNamespace(TensorGuards=other), types.SimpleNamespace()):
        monkeypatch.setattr(torch._C._dynamo, "guards", namespace)  # pyright: ignore[reportAttributeAccessIssue]
        assert not guards.alike([x])(x) and not guards.alike([x, x])(x, x)


def test_a_capture_where_nothing_tells_that_a_thread_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptrt.graph import tracing_state as module

    nowhere = (Target("torch.fx._symbolic_trace", "_gone"),)
    monkeypatch.setattr(module, "FX_TRACING", Entry("x", "", "", needed=nowhere))
    monkeypatch.setattr(module, "FX_TRACING_OF_OLD", Entry("x", "", FX_TRACING_OF_OLD.otherwise, needed=nowhere, warns=True))
    with pytest.warns(UnknownPyTorch, match="may be captured wrongly"):
        graph = capture(torch.sin, torch.zeros(2))
    assert graph.num_nodes == 1


def test_flags_of_modes_are_put_back_where_one_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import _python_dispatch

    monkeypatch.delattr(_python_dispatch, "_is_in_any_mode_without_ignore_compile_internals")
    undo = tracing_state.flags_of_modes()
    monkeypatch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", True)
    undo()
    assert not vars(_python_dispatch)["_is_in_torch_dispatch_mode"]
    assert tracing_state.FLAGS_OF_MODES.fault() is not None


def test_signatures_are_those_of_functions_that_are_exchanged() -> None:
    """Within a block an entry still holds, as another thread may ask."""
    with exchanged(FEW_LIBRARIES, lambda original: functools.partial(original), lambda original: functools.partial(original)):
        assert FEW_LIBRARIES.fault() is None
    owner, name = FEW_LIBRARIES.exchanged[0].owner()
    assert list(inspect.signature(getattr(owner, name)).parameters) == ["self", "argtypes", "source_code"]


def test_explain_names_what_is_in_use() -> None:
    model = nn.Linear(2, 1)
    batch = torch.randn(4, 2), torch.randn(4, 1)
    for backend, expected in ((Eager(), ()), (Inductor(), active())):
        unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 1, loss=F.mse_loss, backend=backend)
        assert unroll.explain().exchanged == ()
        unroll.adapt(batch)
        assert unroll.explain().exchanged == expected
        assert all(name in str(unroll.explain()) for name in expected)
