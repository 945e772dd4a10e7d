"""Files of compiled programs that are damaged, incomplete, or cannot be written: right numbers or the eager backend, and never a crash."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import naive
from tests.zygote import Zygote, data, mean_of_squares


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    found = Zygote()
    yield found
    found.close()


@pytest.fixture(scope="module")
def built(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the programs of size 5. Tests copy it."""
    folder = tmp_path_factory.mktemp("built")
    run(zygote, folder, [5])
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "cache")


@functools.cache
def right(size: int) -> list[float]:
    """What an eager loop computes."""
    model, support, query = data(size)
    loop = naive.Loop(model, mean_of_squares, naive.sgd, {"lr": 0.1}, 2)
    params = dict(model.named_parameters())
    loss = naive.meta_loss(loop, naive.Start(params), support, query)
    return [float(x) for value in (loss, *torch.autograd.grad(loss, list(params.values()))) for x in value.detach().flatten()]


def run(zygote: Zygote, folder: Path, sizes: list[int], **request: Any) -> dict[str, Any]:
    """What a process answers whose cache is `folder`. Its numbers are right."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder), **request.pop("environment", {})}
    answer = zygote.run(sizes=sizes, environment=environment, **request)
    assert "numbers" in answer, answer
    for size, found in zip(sizes, answer["numbers"], strict=True):
        assert found == pytest.approx(right(size), rel=1e-10, abs=1e-12)
    return answer


def only(folder: Path, pattern: str) -> list[Path]:
    found = [path for path in folder.rglob(pattern) if path.is_file()]
    assert found, pattern
    return found


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content), 97):
        content[place] ^= 0xFF
    path.write_bytes(content)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [emptied, halved, flipped, removed])
@pytest.mark.parametrize("pattern", ["library.so", "*.py", "fxgraph/**/*", "record.json"])
def test_a_damaged_file_is_made_again(pattern: str, damage: Callable[[Path], None], folder: Path, zygote: Zygote) -> None:
    for path in only(folder, pattern):
        damage(path)
    answer = run(zygote, folder, [5])
    # Where there is no file, nothing is damaged, unless others say that there should be one.
    of_a_record = pattern in ("library.so", "record.json")
    assert len(answer["warnings"]) == (damage is not removed or of_a_record), answer["warnings"]
    assert all("is not what was written there" in text for text in answer["warnings"])
    assert answer["libraries"] > 0
    assert run(zygote, folder, [5])["warnings"] == []
