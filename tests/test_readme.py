"""The code of the README and of docs/higher.md runs as it stands, block after block, as a reader would paste it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
HIGHER = README.parent / "docs" / "higher.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Every fenced Python block, with the number of the line before its first."""
    return [(text[: found.start(1)].count("\n"), found.group(1)) for found in BLOCK.finditer(text)]


def test_blocks_are_found() -> None:
    assert python_blocks("a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = x\n```\n") == [(2, "x = 1\n"), (8, "y = x\n")]


@pytest.mark.slow
def test_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(README)
    assert "adjoint" in capsys.readouterr().out


def test_migration_page_runs() -> None:
    names = run_blocks(HIGHER)
    assert isinstance(names["diffopt"], names["DifferentiableSignDescent"])


def run_blocks(page: Path) -> dict[str, Any]:
    """The names that the page's blocks define."""
    blocks = python_blocks(page.read_text())
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {"__name__": "readme"}
    with torch.random.fork_rng(devices=[]):
        for line, source in blocks:
            # The line numbers of a traceback are those of the page.
            exec(compile("\n" * line + source, str(page), "exec"), namespace)
    return namespace


def test_links_lead_somewhere() -> None:
    for page in (README, *sorted(README.parent.glob("docs/**/*.md")), *sorted(README.parent.glob("benchmarks/**/*.md"))):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
