"""`adaptrt.higher.install` and `python -m adaptrt.higher`, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import adaptrt

ROOT = Path(adaptrt.__file__).parent.parent
LIBRARY = """
import higher
import higher.optim
from higher import innerloop_ctx
from higher.patch import _MonkeyPatchBase
from higher.utils import flatten
"""


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, check=False, timeout=120)


def check(code: str) -> None:
    found = run("-c", code)
    assert found.returncode == 0, found.stderr


def test_importing_changes_nothing() -> None:
    check("""
import sys
from adaptrt import higher
import adaptrt.higher.optim
assert not [name for name in sys.modules if name.split(".")[0] == "higher"]
import higher as other
assert other is not higher and other.__name__ == "higher"
""")


def test_installed_modules_are_ours() -> None:
    check(f"""
import importlib, sys
from adaptrt import higher as ours
ours.install()
ours.install()
{LIBRARY}
assert higher is ours and higher.optim is ours.optim and innerloop_ctx is ours.innerloop_ctx
assert _MonkeyPatchBase is ours.patch._MonkeyPatchBase and flatten is ours.utils.flatten
assert importlib.import_module("higher.patch") is ours.patch
import higher.twins, adaptrt.higher.twins
assert higher.twins is adaptrt.higher.twins
ours.uninstall()
ours.uninstall()
assert not [name for name in sys.modules if name.split(".")[0] == "higher"]
import higher.optim
assert higher.__name__ == "higher" and higher.optim.__name__ == "higher.optim"
""")


@pytest.mark.parametrize("statement", ["import higher", "import higher.optim as optim", "from higher.utils import flatten"])
def test_an_imported_original_is_an_error_unless_forced(statement: str) -> None:
    check(f"""
{statement}
import sys
original = sys.modules["higher"]
from adaptrt import errors
from adaptrt import higher as ours
try:
    ours.install()
except errors.AlreadyImported as error:
    assert isinstance(error, errors.AdaptrtError) and isinstance(error, ImportError)
    assert "python -m adaptrt.higher" in str(error) and "force=True" in str(error)
else:
    raise AssertionError("no error")
assert sys.modules["higher"] is original
ours.install(force=True)
ours.install()
import higher, higher.patch
assert higher is ours and higher.patch is ours.patch
ours.uninstall()
assert sys.modules["higher"] is original and sys.modules["higher.patch"] is original.patch
""")


PROGRAM = """
import sys
import pickle
import library
from torch import nn
import torch

class Point:
    pass

model = nn.Linear(2, 1)
with library.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (handle, diffopt):
    diffopt.step(handle(torch.ones(1, 2)).sum())
    assert isinstance(handle, library._MonkeyPatchBase)
assert isinstance(pickle.loads(pickle.dumps(Point())), Point)
print(__name__, library.higher.__name__, *sys.argv[1:])
print(sys.argv[0])
print(sys.path[0])
print(__file__)
raise SystemExit(3)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "library.py").write_text(LIBRARY)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def test_a_script_runs_as_under_python(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = str(folder / "program.py")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    found = run("-m", "adaptrt.higher", script, "-m", "--flag", "value", cwd=elsewhere)
    assert found.returncode == 3, found.stderr
    assert found.stdout.splitlines() == ["__main__ adaptrt.higher -m --flag value", script, str(folder), script]
    original = run(script, "-m", "--flag", "value", cwd=elsewhere)
    assert original.returncode == 3, original.stderr
    assert original.stdout.splitlines()[1:] == found.stdout.splitlines()[1:]


def test_a_module_runs_as_under_python(folder: Path) -> None:
    found = run("-m", "adaptrt.higher", "-m", "program", "--flag", cwd=folder)
    assert found.returncode == 3, found.stderr
    assert found.stdout.splitlines()[0] == "__main__ adaptrt.higher --flag"
    assert found.stdout.splitlines()[1:] == run("-m", "program", "--flag", cwd=folder).stdout.splitlines()[1:]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [([], 2, "usage"), (["-m"], 2, "usage"), (["--unknown"], 2, "usage"), (["missing.py"], 2, "missing.py"), (["--help"], 0, "usage")],
)
def test_command_lines_that_run_nothing(folder: Path, arguments: list[str], code: int, message: str) -> None:
    found = run("-m", "adaptrt.higher", *arguments, cwd=folder)
    assert found.returncode == code
    assert message in found.stdout + found.stderr
    assert "Traceback" not in found.stderr
