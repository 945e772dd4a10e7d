"""The fingerprint of the sources under which compiled graphs are kept on disk."""

from __future__ import annotations

import ast
import compileall
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptrt
from adaptrt.backend.inductor import compile as inductor
from adaptrt.backend.inductor import sources

PACKAGE = Path(adaptrt.__file__).parent

OF_GRAPHS = {
    # What only changes the graph, which the key knows.
    *("adaptrt.graph.passes", "adaptrt.graph.ir", "adaptrt.graph.cost", "adaptrt.graph.indices", "adaptrt.graph.operations"),
    # What says how a program is found, run or built, but not what it consists of.
    *(
        "adaptrt.backend.base",
        "adaptrt.backend.eager",
        "adaptrt.backend.engine",
        "adaptrt.backend.entry_points",
        "adaptrt.backend.guards",
        "adaptrt.graph.pytrees",
        "adaptrt.graph.plain",
        "adaptrt.graph.forgetting",
        "adaptrt.graph.defaults",
        "adaptrt.graph.surroundings",
        "adaptrt.process",
    ),
    # Exchanged or not: that is part of the key itself.
    *("adaptrt.graph.exchange", "adaptrt.graph.collector", "adaptrt.errors"),
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package in a folder of its own."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "adaptrt", ignore=shutil.ignore_patterns("__pycache__")))


def in_process(path: Path) -> str:
    """The tag that a process finds that imports the package from `path`."""
    code = "import adaptrt; from adaptrt.backend.inductor.sources import tag; print(adaptrt.__file__, tag(), sep='|')"
    environment = os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-P", "-c", code], env=environment, text=True, capture_output=True, check=True)
    file, found = result.stdout.strip().split("|")
    assert file.startswith(str(path))
    return found


def test_equal_sources_have_one_tag_in_every_process_and_from_an_archive(copied: Path, tmp_path: Path) -> None:
    wanted = sources.tag()
    assert wanted is not None
    assert in_process(copied.parent) == wanted
    archive = tmp_path / "library.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(copied.rglob("*.py"), reverse=True):  # in another order than the file system's
            file.write(path, path.relative_to(tmp_path))
    assert in_process(archive) == wanted


def files_that_decide() -> Iterator[Path]:
    yield from (PACKAGE / "backend" / "inductor").rglob("*.py")


@pytest.mark.parametrize("path", [str(path.relative_to(PACKAGE)) for path in files_that_decide()])
def test_a_change_of_a_source_changes_the_tag(path: str, copied: Path) -> None:
    before = sources.fingerprint(copied)
    source = (copied / path).read_text()
    (copied / path).write_text(source + "\nADDED = 1\n")
    assert sources.fingerprint(copied) != before == sources.tag()
    (copied / path).write_text(source)
    assert sources.fingerprint(copied) == before


def test_other_changes(copied: Path) -> None:
    before, folder = sources.fingerprint(copied), copied / "backend" / "inductor"
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "compile.cpython-311.pyc").write_bytes(b"1")
    (copied / "runtime" / "unroll.py").write_text("")
    (folder / "notes.txt").write_text("no source")
    assert sources.fingerprint(copied) == before
    (folder / "more.py").write_text("")
    more = sources.fingerprint(copied)
    (folder / "more.py").rename(folder / "rewrites" / "more.py")
    moved = sources.fingerprint(copied)
    assert len({before, more, moved}) == 3


def test_a_package_without_sources(copied: Path) -> None:
    """Compiled modules in their place are taken; without them nothing is said to be known."""
    compileall.compile_dir(copied, quiet=2, legacy=True)
    for path in copied.rglob("*.py"):
        path.unlink()
    compiled = sources.fingerprint(copied)
    assert compiled not in (None, sources.tag())
    for path in (copied / "backend" / "inductor").rglob("*.pyc"):
        path.unlink()
    assert sources.fingerprint(copied) is None
    with pytest.raises(OSError):
        sources.fingerprint(copied / "not there")


def test_whatever_the_sources_import_decides_too_or_is_known_not_to() -> None:
    for path in files_that_decide():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("adaptrt"):
                continue
            module = str(node.module)
            part_of_tag = module.startswith("adaptrt.backend.inductor")
            assert part_of_tag or any(module == other or module.startswith(f"{other}.") for other in OF_GRAPHS), f"{path}: {module}"


@pytest.mark.usefixtures("empty_cache")
def test_nothing_is_kept_on_disk_where_the_sources_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch._dynamo.utils import counters

    from adaptrt.backend import Inductor
    from adaptrt.graph.capture import capture

    x = torch.randn(5)

    def hits_of_second(tag: str | None) -> int:
        monkeypatch.setattr(inductor, "tag", lambda: tag)
        before = counters["inductor"]["fxgraph_cache_hit"]
        for _ in range(2):
            torch.testing.assert_close(Inductor().compile(capture(lambda x: (12.5 * x).sin(), x))([x])[0], (12.5 * x).sin())
        return counters["inductor"]["fxgraph_cache_hit"] - before

    assert hits_of_second(None) == 0
    assert hits_of_second("one") == 1
    assert hits_of_second("two") == 1
