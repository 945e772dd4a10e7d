"""The README and the pages in docs/: their code runs as a reader would paste it, their links lead somewhere, and their tables are true."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrt import errors

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = ("common-mistakes.md", "distributed.md", "export.md", "higher.md", "recipes.md", "serve-per-user.md", "serving.md", "tasks.md")
"""Pages whose blocks run here. `test_optimiser_docs.py` runs those of optimisers.md."""

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:\w+/)+\w+\.py)`")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Every fenced Python block, with the number of the line before its first."""
    return [(text[: found.start(1)].count("\n"), found.group(1)) for found in BLOCK.finditer(text)]


def run_blocks(page: Path) -> dict[str, Any]:
    """The names that the page's blocks define. The random state and the number of threads are put back."""
    blocks = python_blocks(page.read_text())
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {"__name__": "page"}
    num_threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for line, source in blocks:
                # The line numbers of a traceback are those of the page.
                exec(compile("\n" * line + source, str(page), "exec"), namespace)
    finally:
        torch.set_num_threads(num_threads)
    return namespace


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found = set[str]()
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # a link in a heading shows its text
        name = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found.add(next(name + suffix for number in range(100) if name + (suffix := f"-{number}" if number else "") not in found))
    return found


def links() -> Iterator[tuple[Path, str, str]]:
    """Every relative link of the README, docs/ and benchmarks/: the page, the path (empty for the page itself) and the anchor."""
    for page in (README, *sorted(DOCS.glob("**/*.md")), *sorted(ROOT.glob("benchmarks/**/*.md"))):
        for target in LINK.findall(FENCED.sub("", page.read_text())):
            if "://" not in target:
                path, _, anchor = target.partition("#")
                yield page, path, anchor


# --- the tools above


def test_blocks_are_found() -> None:
    assert python_blocks("a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = x\n```\n") == [(2, "x = 1\n"), (8, "y = x\n")]


def test_anchors_are_those_of_github() -> None:
    text = "# One\n```python\n# no heading\n```\n## Stack `vmap()` tasks\n### torch.optim, again\n## One\n## [A link](b.md#c)\n"
    assert anchors(text) == {"one", "stack-vmap-tasks", "torchoptim-again", "one-1", "a-link"}


# --- the pages


@pytest.mark.slow
def test_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(README)
    assert "adjoint" in capsys.readouterr().out


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A page's name, and what its blocks define."""
    return request.param, run_blocks(DOCS / request.param)


def test_pages_run(page: tuple[str, dict[str, Any]]) -> None:
    name, namespace = page
    if name == "higher.md":
        assert isinstance(namespace["diffopt"], namespace["DifferentiableSignDescent"])
    if name == "tasks.md":
        assert all(lr.grad is not None and float(lr.grad) != 0 for lr in namespace["lrs"])
        assert len(namespace["curve"]) == 10


def test_no_page_with_code_is_forgotten() -> None:
    with_code = {page.relative_to(DOCS).as_posix() for page in DOCS.glob("*.md") if python_blocks(page.read_text())}
    assert with_code == {*PAGES, "optimisers.md"}


def test_mistakes_raise_what_the_table_says() -> None:
    page = DOCS / "common-mistakes.md"
    rows = re.findall(
        r"^\| `(.+)` \| `(\w+)` \| (.+) \|$", page.read_text().split("## Mistakes that raise")[1].split("\nOther errors")[0], re.MULTILINE
    )
    assert len(rows) > 20
    namespace = run_blocks(page)
    for what, name, remedy in rows:
        assert remedy
        expected: type[Exception] = TypeError if name == "TypeError" else getattr(errors, name)
        with pytest.raises(expected) as raised:
            eval(what, dict(namespace))
        assert type(raised.value) is expected, what


def test_links_lead_somewhere() -> None:
    found = list(links())
    assert any(anchor for _, _, anchor in found)
    for page, path, anchor in found:
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}, which does not exist"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name} links to #{anchor}, which {target.name} does not have"


def test_files_that_pages_name_exist() -> None:
    named = [(page, path) for page in (README, *sorted(DOCS.glob("**/*.md"))) for path in FILE.findall(page.read_text())]
    assert len(named) > 20
    for page, path in named:
        assert (ROOT / path).exists() or (ROOT / "adaptrt" / path).exists(), f"{page.name} names {path}, which does not exist"
