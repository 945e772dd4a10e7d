"""Processes that are forked while another thread captures or compiles: child and parent compute right numbers, and neither hangs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.processes import run_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

HELD = """
def held(backend, fork):
    '''Calls `fork` while another thread is in the middle of a capture.'''
    inside, leaves = threading.Event(), threading.Event()

    def waits():
        inside.set()
        assert leaves.wait(100)

    model, unroll = make(backend, waits)
    thread = threading.Thread(target=check, args=(model, unroll, 4))
    thread.start()
    assert inside.wait(100)
    try:
        fork(model, unroll)
    finally:
        leaves.set()
        thread.join()
    check(model, unroll, 4)
"""

BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_thread_captures(backend: str) -> None:
    script = """
    before = state()

    def child(model, unroll):
        now = state()
        assert now["inductor"] is None or before["inductor"] is None or now["inductor"] == before["inductor"]
        now["inductor"] = before["inductor"]
        assert now == before, (now, before)
        check(model, unroll, 4)
        other, own = make("eager")
        check(other, own, 4)

    def fork(model, unroll):
        assert in_child(lambda: child(model, unroll)) == 0

    held(BACKEND, fork)
    """
    run_script(HELD + _dedent(script).replace("BACKEND", repr(backend)))


def test_the_capturing_thread_forks_itself() -> None:
    """The child goes on with the capture, under the lock that it holds."""
    script = """
    children = queue.SimpleQueue()

    def forks():
        child = os.fork()
        children.put(child)
        if not child:
            signal.alarm(100)

    model, unroll = make("eager", forks)
    try:
        check(model, unroll, 4)
        check(model, unroll, 5)
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    child = children.get()
    if not child:
        os._exit(code)
    assert code == 0 and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    run_script(script)


def test_workers_of_a_data_loader() -> None:
    """Each worker is forked while a thread of the parent captures, and adapts on its own."""
    script = """
    class Adapted(torch.utils.data.Dataset):
        def __init__(self, model, unroll):
            self.model, self.unroll = model, unroll

        def __len__(self):
            return 4

        def __getitem__(self, index):
            torch.manual_seed(index)
            check(self.model, self.unroll, 7 + index)
            return index

    def fork(model, unroll):
        settings = {"num_workers": 2, "batch_size": 2, "multiprocessing_context": "fork", "timeout": 60}
        loader = torch.utils.data.DataLoader(Adapted(model, unroll), **settings)
        assert sorted(index for batch in loader for index in batch.tolist()) == [0, 1, 2, 3]

    held("eager", fork)
    """
    run_script(HELD + _dedent(script))


def test_warning_filters_of_a_thread_that_compiles() -> None:
    script = """
    from adaptrt.backend.inductor import compile
    from adaptrt.graph.capture import capture

    inside, leaves = threading.Event(), threading.Event()

    def stops(compile_once):
        inside.set()
        assert leaves.wait(100)
        raise SystemExit  # nothing needs to be compiled

    compile.trusting_the_processor = stops
    graph = capture(torch.sin, torch.zeros(2))
    before = warnings.filters[:]
    thread = threading.Thread(target=compile._compile, args=(graph, None))
    thread.start()
    assert inside.wait(100)

    def child():
        assert warnings.filters == before

    code = in_child(child)
    leaves.set()
    thread.join()
    assert code == 0 and warnings.filters == before
    """
    run_script(_dedent(script))


@pytest.mark.slow
def test_a_background_compiler_is_at_work() -> None:
    """What was still to be compiled when the process was forked is compiled in the child, by a thread of its own."""
    script = """
    from adaptrt.backend import Eager, Tiered

    started, leaves = threading.Event(), threading.Event()

    class Slow(Eager):
        name = "slow"

        def compile(self, graph):
            if os.getpid() == parent:
                started.set()
                assert leaves.wait(100)
            return super().compile(graph)

    parent = os.getpid()
    model, unroll = make(Tiered(Slow()))
    with torch.no_grad():
        unroll.adapt(data(4))
    assert started.wait(100)

    def child():
        assert not any(thread.name == "adaptrt compiler" for thread in threading.enumerate())
        check(model, unroll, 4)
        unroll.warmup(data(4), data(5))
        assert not any(program.run.is_pending for _, program in unroll._execution.planner.programs())
        check(model, unroll, 4)

    assert in_child(child) == 0
    leaves.set()
    unroll.warmup(data(4), data(5))
    check(model, unroll, 4)
    """
    run_script(script)


@pytest.mark.slow
def test_kernels_are_being_built(tmp_path: Path) -> None:
    """The threads that run g++ do not exist in the child, which builds again what it needs."""
    script = """
    from adaptrt.backend.inductor import cpp

    run, building, leaves, parent = cpp._run, threading.Event(), threading.Event(), os.getpid()

    def slow(*args):
        if os.getpid() == parent:
            building.set()
            assert leaves.wait(100)
        return run(*args)

    cpp._run = slow
    model, unroll = make("inductor")
    thread = threading.Thread(target=check, args=(model, unroll, 4))
    thread.start()
    assert building.wait(100)

    def child():
        leaves.set()
        check(model, unroll, 5)
        check(model, unroll, 4)

    timer = threading.Timer(3.0, leaves.set)
    timer.start()  # the child waits for the lock of the file that the parent builds
    assert in_child(child) == 0
    thread.join()
    timer.join()
    check(model, unroll, 5)
    """
    run_script(script, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))


def _dedent(script: str) -> str:
    return "\n" + "\n".join(line[4:] for line in script.splitlines())
