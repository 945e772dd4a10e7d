"""`python -O` removes assertions, on which PyTorch's compiler relies before 2.14: numbers are right, or compiling is refused by name.

The covering set under `-O` is a script, `tests/covering.py`, which CI runs: assertions of tests would say nothing there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from adaptrt import optim
from adaptrt.backend.inductor import available
from adaptrt.errors import CompilerUnavailable, InvalidArgument
from tests import covering

ROOT = Path(__file__).parent.parent

# The meta-gradient of this model was 1e30, or NaN.
SCRIPT = """
    import sys, warnings
    import torch, torch.nn.functional as F
    from torch import nn
    warnings.simplefilter("ignore", DeprecationWarning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import adaptrt
        from tests import covering, naive
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        model = nn.Sequential(nn.Linear(2, 25), nn.Tanh(), nn.Linear(25, 3))
        unroll = adaptrt.compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.4), k=3, loss=F.cross_entropy)
        support, query = (torch.randn(15, 2), torch.arange(15) % 3), (torch.randn(6, 2), torch.arange(6) % 3)
        found = torch.autograd.grad(unroll(support, query), list(model.parameters()))
    loop = naive.Loop(model, F.cross_entropy, naive.sgd, {"lr": 0.4}, 3)
    start = naive.Start(dict(model.named_parameters()), {}, {}, {})
    wanted = torch.autograd.grad(naive.meta_loss(loop, start, support, query), list(model.parameters()))
    ours = [str(entry.message) for entry in caught if issubclass(entry.category, adaptrt.errors.CompilerUnavailable)]
    print(max(map(covering.relative_error, found, wanted)))
    print(unroll.explain().backend, len(ours), *ours)
"""


def python(flags: tuple[str, ...], code: str, cache: Path, **env: str) -> list[str]:
    """Runs code in a fresh interpreter; returns the lines that it prints."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_numbers_are_right_and_what_an_optimised_process_leaves_on_disk_harms_nobody(tmp_path: Path) -> None:
    error, backend = python(("-O",), SCRIPT, tmp_path)
    assert float(error) < 1e-10
    if torch.__version__ < (2, 14):  # pyright: ignore[reportOperatorIssue]
        assert backend.startswith("eager 1 before PyTorch 2.14") and "Run Python without -O" in backend
    else:
        assert backend == "inductor 0"
    error, backend = python((), SCRIPT, tmp_path)
    assert float(error) < 1e-10 and backend == "inductor 0"


REFUSED = """
    import torch, adaptrt
    from torch import nn
    from adaptrt.backend import CudaGraph, Inductor, Tiered
    model = nn.Linear(2, 2)
    compile = lambda **options: adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 1, **options)
    for make in (Inductor, Tiered, CudaGraph, lambda: compile(backend="inductor"), lambda: compile(backend="cudagraph"),
                 lambda: compile(backend="inductor", tiered=True)):
        try:
            make()
        except adaptrt.errors.InvalidArgument as error:
            print(error)
    from tests import covering
    print(covering.compare(covering.CASES[1], "eager"))
"""


@pytest.mark.skipif(torch.__version__ >= (2, 14), reason="PyTorch's compiler needs no assertions")  # pyright: ignore[reportOperatorIssue]
def test_a_compiler_that_was_asked_for_is_refused_by_name(tmp_path: Path) -> None:
    *lines, error = python((), REFUSED, tmp_path, PYTHONOPTIMIZE="2")
    assert len(lines) == 6 and float(error) < 1e-10
    assert all("under `python -O`" in line and "backend='eager'" in line for line in lines)


def test_the_compiler_is_used_as_soon_as_it_needs_no_assertions(monkeypatch: pytest.MonkeyPatch) -> None:
    available.refuse_without_assertions()
    monkeypatch.setattr(available, "assertions_count", lambda: False)
    monkeypatch.setattr(available, "_WARNED", set())
    with pytest.raises(InvalidArgument, match="some of its `assert` statements have effects"):
        available.refuse_without_assertions()
    with pytest.warns(CompilerUnavailable, match="PYTHONOPTIMIZE, or pass backend='eager'"):
        assert available.warn_if_missing(torch.device("cpu"))


def test_the_covering_set_fails_where_a_number_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["covering"])
    monkeypatch.setattr(covering, "CASES", covering.CASES[1:2])
    threads = torch.get_num_threads()
    try:
        covering.main()
        assert capsys.readouterr().out.startswith("3 cases")
        monkeypatch.setattr(covering.optim, "sgd", lambda lr, momentum=0.0: optim.adam(lr=lr + momentum))
        with pytest.raises(SystemExit, match="mlp FirstOrder: relative error"):
            covering.main()
    finally:
        torch.set_num_threads(threads)
