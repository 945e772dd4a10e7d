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
    loss = naive.meta_loss(loop, naive.Start(params, {}, {}, {}), support, query)
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


DAMAGES = {
    "library.so": (halved, flipped, removed),
    "record.json": (halved,),
    "*.py": (emptied, halved, flipped, removed),
    "fxgraph/**/*": (halved, flipped, removed),
}


@pytest.mark.parametrize(("pattern", "damage"), [(pattern, damage) for pattern, damages in DAMAGES.items() for damage in damages])
def test_a_damaged_file_is_made_again(pattern: str, damage: Callable[[Path], None], folder: Path, zygote: Zygote) -> None:
    for path in only(folder, pattern):
        damage(path)
    answer = run(zygote, folder, [5])
    # Where there is no file, nothing is damaged, unless a record says that there should be one.
    assert len(answer["warnings"]) == (damage is not removed or pattern == "library.so"), answer["warnings"]
    assert all("is not what was written there" in text for text in answer["warnings"])
    assert answer["libraries"] > 0
    if damage is halved:  # what was made again is right, whatever was damaged
        assert run(zygote, folder, [5])["warnings"] == []


def test_a_source_is_not_read_again(folder: Path, zygote: Zygote) -> None:
    for path in [*only(folder, "source.cpp"), *only(folder, "library.so")]:
        flipped(path)
    assert run(zygote, folder, [5])["libraries"] > 0


def test_without_a_compiler_what_was_built_runs(folder: Path, zygote: Zygote) -> None:
    nothing = {"PATH": "", "HOME": None}
    answer = run(zygote, folder, [5], environment=nothing)
    assert answer["libraries"] > 0 and answer["warnings"] == []
    answer = run(zygote, folder, [6], environment=nothing)
    assert answer["libraries"] == 0 and len(answer["warnings"]) == 1 and "no c++ compiler" in answer["warnings"][0].lower()


def test_a_folder_of_any_name(tmp_path: Path, zygote: Zygote) -> None:
    answer = run(zygote, tmp_path / 'it\'s a "cache" $HOME' / "кэш 日本 ü", [5])
    assert answer["libraries"] > 0 and answer["warnings"] == []


def test_a_full_disk(folder: Path, zygote: Zygote) -> None:
    answer = run(zygote, folder, [5], file_size=8192)
    assert answer["libraries"] > 0 and answer["warnings"] == []
    answer = run(zygote, folder, [6], file_size=8192)
    assert answer["libraries"] == 0 and len(answer["warnings"]) == 1 and "could not be built" in answer["warnings"][0]
    answer = run(zygote, folder, [6])
    assert answer["libraries"] > 0 and answer["warnings"] == []


def test_a_folder_that_cannot_be_made(tmp_path: Path, zygote: Zygote) -> None:
    (tmp_path / "file").touch()
    answer = run(zygote, tmp_path / "file" / "cache", [5])
    assert len(answer["warnings"]) == 1 and "set TORCHINDUCTOR_CACHE_DIR to another" in answer["warnings"][0]


def test_a_folder_that_is_read_only(folder: Path, zygote: Zygote) -> None:
    folders = [folder, *[path for path in folder.rglob("*") if path.is_dir()]]
    for path in folders:
        path.chmod(0o555)
    try:
        answer = run(zygote, folder, [5], powerless=True)
        assert answer["libraries"] > 0 and answer["warnings"] == []
        answer = run(zygote, folder, [6], powerless=True)
        assert len(answer["warnings"]) == 1 and "Permission denied" in answer["warnings"][0]
        for path in only(folder, "library.so"):  # nor can it be removed
            halved(path)
        answer = run(zygote, folder, [5], powerless=True)
        assert len(answer["warnings"]) == 1 and "Permission denied" in answer["warnings"][0]
    finally:
        for path in folders:
            path.chmod(0o755)


def test_a_folder_that_is_removed(folder: Path, zygote: Zygote) -> None:
    answer = run(zygote, folder, [5, 5], then=str(folder))
    assert answer["libraries"] > 0 and answer["warnings"] == []


def test_two_processes_at_once(tmp_path: Path, zygote: Zygote) -> None:
    answer = run(zygote, tmp_path, [5], children=2)
    assert [other["numbers"] for other in answer["others"]] == [answer["numbers"]]
    assert not only(tmp_path, "record.json")[0].parent.name.startswith(".")


def test_a_process_that_is_killed_leaves_a_cache_that_the_next_can_use(tmp_path: Path, zygote: Zygote) -> None:
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for moment_s in (0.5, 1.0, 1.5):
        zygote.run(sizes=[5], environment=environment, kill_after_s=moment_s)
    answer = run(zygote, tmp_path, [5])
    assert answer["libraries"] > 0
    assert not list((tmp_path / "adaptrt").glob(".*"))
