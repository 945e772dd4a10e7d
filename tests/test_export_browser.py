"""The page that adapts in the browser: its numbers are those of PyTorch, and Chromium can be taught, with real pointer events."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import adaptrt
from export.browser import __main__ as command
from export.browser import learner
from export.browser.__main__ import build, train
from export.browser.serve import server
from export.browser.strokes import in_unit_box, rasterise, redrawn
from export.browser.symbols import KANJIVG, characters, doodle, path_points, sign, training_symbols

SOURCE = Path(__file__).parents[1] / "export" / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js"),
    pytest.mark.skipif(not (SOURCE / "node_modules").is_dir(), reason="needs npm's packages: npm ci --prefix export/browser"),
    pytest.mark.skipif(
        not list(importlib.metadata.distributions(name=KANJIVG)), reason="needs the package kanjivg: pip install 'adaptrt[browser]'"
    ),
]
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium, or its path in CHROMIUM")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was trained a little: for a number of iterations, so that it is the same on a slow computer."""
    folder = tmp_path_factory.mktemp("browser") / "model"
    return train(folder, minutes=60, num_symbols=400, backend="eager", num_iterations=150)


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    """Where the page is served."""
    found = server(build(model, model.parent / "site"), 0)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}/"
    found.shutdown()
    thread.join()
    found.server_close()


def node(script: str, *arguments: Path | str) -> str:
    command = ["node", str(SOURCE / "test" / script), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "CHROMIUM": CHROMIUM or ""})
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def numbers(model: Path, tmp_path: Path, **cases: Any) -> dict[str, Any]:
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    return json.loads(node("numbers.mjs", model, tmp_path / "cases.json"))


# --- the same numbers as in Python


def test_images_are_equal(model: Path, tmp_path: Path) -> None:
    """The page's images are those of training, bit for bit: of drawings, dots, lines along an axis, repeated points and an empty page."""
    generator = np.random.default_rng(0)
    drawings = [redrawn(make(generator), generator) for make in (doodle, sign) for _ in range(60)]
    odd: list[list[list[list[float]]]] = [
        [],
        [[]],
        [[[0.3, 0.7]]],
        [[[0.3, 0.7]], [], [[0.1, 0.2], [0.1, 0.2]]],
        [[[0.0, 0.5], [1.0, 0.5]]],
        [[[0.5, 1.0], [0.5, 0.0], [0.5, 1.0]]],
        [[[0.5, 0.5], [0.501, 0.5]]],
        [[[0.2, 0.2], [0.2, 0.2], [0.9, 0.4]]],
    ]
    drawings += [[np.array(stroke, np.float64).reshape(-1, 2) for stroke in strokes] for strokes in odd]
    found = numbers(model, tmp_path, drawings=[[stroke.tolist() for stroke in strokes] for strokes in drawings])
    for strokes, image in zip(drawings, found["images"], strict=True):
        np.testing.assert_array_equal(np.array(image, np.float32).reshape(learner.SIZE, learner.SIZE), rasterise(strokes))


def test_images_do_not_depend_on_place_and_size() -> None:
    generator = np.random.default_rng(0)
    strokes = redrawn(sign(generator), generator)
    image = rasterise(strokes)
    assert 0.02 < image.mean() < 0.5 and image.max() == 1
    np.testing.assert_allclose(rasterise([0.5 * stroke + 0.2 for stroke in strokes]), image, atol=1e-6)
    small = rasterise([np.array([[0.5, 0.5], [0.52, 0.5]])])
    assert 0 < small.sum() < rasterise([np.array([[0.2, 0.5], [0.8, 0.5]])]).sum() / 2


def test_path_points() -> None:
    line = path_points("M1,2 L3,4 h2 v-1 l-1-1")
    assert line.tolist() == [[1, 2], [3, 4], [5, 4], [5, 3], [4, 2]]
    curve = path_points("M0,0c0,1,1,1,1,0s1-1,1,0")
    assert curve[8].tolist() == [1, 0] and curve[-1].tolist() == [2, 0] and curve[12].tolist() == [1.5, -0.75]
    with pytest.raises(ValueError, match="'A' is not known"):
        path_points("M0,0A1,1,0,0,0,1,1")


def test_letters_are_not_among_the_training_symbols() -> None:
    """Those of KanjiVG, which has Latin letters and digits, too. A straight line is a letter by chance."""
    written = {letter: strokes for letter, strokes in characters(first=0x30, below=0x7B).items() if letter not in "Il1"}
    letters = {rasterise(in_unit_box(strokes)).tobytes() for strokes in written.values()}
    trained = {rasterise(symbol).tobytes() for symbol in training_symbols(600, np.random.default_rng(0))}
    assert len(letters) > 50 and len(trained) > 500
    assert not letters & trained


def batch(images: list[list[Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Examples by symbol, padded to the rows of the exported programs."""
    x = torch.zeros(learner.ROWS, 1, learner.SIZE, learner.SIZE)
    target, weights = torch.zeros(learner.ROWS, dtype=torch.int64), torch.zeros(learner.ROWS)
    rows = [(label, image, len(examples)) for label, examples in enumerate(images) for image in examples]
    for row, (label, image, count) in enumerate(rows):
        x[row, 0], target[row], weights[row] = image, label, 1 / count
    return (x, (torch.arange(learner.MAX_SYMBOLS) < len(images)).float()), target, weights


def plainly(model: Path, images: list[list[Tensor]]) -> tuple[list[float], dict[str, Tensor]]:
    """The adaptation in plain PyTorch, of the examples alone: no padding, and no logits of symbols that are not there."""
    weights = load_file(model / "weights.safetensors")
    network = learner.Recogniser()
    for name, value in network.named_parameters():
        value.data.copy_(weights[f"state.params.{name}"] if f"state.params.{name}" in weights else weights[f"fixed.params.{name}"])
    adapting = {name: value for name, value in network.named_parameters() if f"state.params.{name}" in weights}
    x = torch.stack([image for examples in images for image in examples])[:, None]
    target = torch.tensor([label for label, examples in enumerate(images) for _ in examples])
    shares = torch.tensor([1 / (len(images) * len(examples)) for examples in images for _ in examples])

    def loss() -> Tensor:
        logits = network(x, torch.ones(learner.MAX_SYMBOLS))[:, : len(images)]
        return (shares * F.cross_entropy(logits, target, reduction="none")).sum()

    losses: list[float] = []
    for step in range(learner.STEPS):
        value = loss()
        losses.append(value.item())
        gradients = torch.autograd.grad(value, list(adapting.values()))
        for (name, parameter), gradient in zip(adapting.items(), gradients, strict=True):
            parameter.data -= weights[f"fixed.hyper.lr.numbers.values.{name}"][step] * gradient
    return [*losses, loss().item()], {f"state.params.{name}": value.detach() for name, value in adapting.items()}


@pytest.mark.parametrize("counts", [(3, 3), (3, 5, 4), (5, 5, 5, 5, 5)], ids=str)
def test_adaptation_is_that_of_pytorch(counts: tuple[int, ...], model: Path, tmp_path: Path) -> None:
    """Also where most rows are padding, of which a loop over the examples knows nothing."""
    generator = np.random.default_rng(1)
    signs = [sign(generator) for _ in counts]
    images = [[rasterise(redrawn(each, generator)) for _ in range(count)] for each, count in zip(signs, counts, strict=True)]
    query = rasterise(redrawn(signs[0], generator))
    listed = [[image.ravel().tolist() for image in examples] for examples in images]
    found = numbers(model, tmp_path, symbols=listed, query=query.ravel().tolist())
    assert found["again"] == found["losses"] and len(found["losses"]) == learner.STEPS + 1

    tensors = [[torch.from_numpy(image) for image in examples] for examples in images]
    exported, (inputs, target, weights) = adaptrt.load(model), batch(tensors)
    adapted = exported.adapt((inputs, target, weights))
    near(found["losses"][:-1], adapted.losses)
    state = {f"state.{name}": value for name, value in adapted.state.named_tensors().items()}
    assert found["state"].keys() == state.keys()
    for name, value in state.items():
        near(found["state"][name], value)
    near(found["probabilities"], adapted(torch.from_numpy(query)[None, None], inputs[1])[0, : len(counts)].softmax(0))

    losses, parameters = plainly(model, tensors)
    near(found["losses"], torch.tensor(losses))
    for name, value in parameters.items():
        near(found["state"][name], value)
    assert not state["state.params.head.weight"][len(counts) :].any()  # nothing has taught what is not there


def near(found: list[float], wanted: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found).reshape(wanted.shape).to(wanted.dtype), wanted, rtol=1e-5, atol=1e-5)


def test_wrong_symbols(model: Path, tmp_path: Path) -> None:
    blank, nan = [0.0] * learner.SIZE**2, [float("nan")] * learner.SIZE**2
    wrong = [
        ("adapt", [[blank]], "There must be 2 to 5 symbols."),
        ("adapt", [[blank]] * 6, "There must be 2 to 5 symbols."),
        ("adapt", [[blank], []], "A symbol must have 1 to 5 examples."),
        ("adapt", [[blank], [blank] * 6], "A symbol must have 1 to 5 examples."),
        ("adapt", [[blank], [nan]], "“support.inputs.0” holds a number that is not finite."),
    ]
    # JSON has no NaN: what cannot be read as a number becomes one.
    cases = json.loads(json.dumps([case[:2] for case in wrong]).replace("NaN", '"none"'))
    assert numbers(model, tmp_path, wrong=cases)["said"] == [message for _, _, message in wrong]


def test_text_of_a_digest(model: Path, tmp_path: Path) -> None:
    """The digest of a manifest is over JSON as Python writes it; numbers and text that JavaScript writes differently are among it."""
    odd = {
        "z": [0.1, 1e16, 1e-05, 5e-324, -0.0, 1.0, 10**30, True, None],
        "é€😀": {"b": '\n"\\,:{}[]', "a": [], "": {}},
        "digest": {"digest": 1},
    }
    texts = [json.dumps(odd, indent=1), (model / "manifest.json").read_text()]
    found = numbers(model, tmp_path, texts=texts)["texts"]
    for text, canonical in zip(texts, found, strict=True):
        fields = json.loads(text)
        del fields["digest"]
        assert canonical == json.dumps(fields, sort_keys=True, separators=(",", ":"))


def test_a_network_is_trained_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command trains where there is no network, or one that was trained in another way or is damaged; else it only builds the page."""
    trained: list[float] = []

    def copy(folder: Path, *, minutes: float, **others: Any) -> Path:
        del others
        trained.append(minutes)
        return Path(shutil.copytree(model, folder, dirs_exist_ok=True))

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["browser", "--out", str(tmp_path / "out"), "--no-serve", *arguments])
        return command.main()

    monkeypatch.setattr(command, "train", copy)
    for arguments, wanted in (
        ((), [4.0]),
        ((), [4.0]),
        (("--minutes", "1"), [4.0, 1.0]),
        (("--minutes", "1", "--retrain"), [4.0, 1.0, 1.0]),
    ):
        assert run(*arguments) == 0
        assert trained == wanted
    assert sorted(path.name for path in (tmp_path / "out" / "site" / "model").iterdir()) == sorted(path.name for path in model.iterdir())
    (tmp_path / "out" / "model" / "adapt.onnx").write_bytes(b"")
    assert run("--minutes", "1") == 0
    assert trained == [4.0, 1.0, 1.0, 1.0]
    monkeypatch.setattr(command, "RUNTIME", tmp_path / "none")
    assert run("--minutes", "1", "--retrain") == 1


def test_its_size(model: Path) -> None:
    """A page has to load it."""
    assert (model / "weights.safetensors").stat().st_size < 1_000_000


# --- in Chromium


@in_chromium
@pytest.mark.parametrize("scenario", ["mouse", "touch", "keyboard", "symbols", "headers", "wrong"])
def test_in_chromium(scenario: str, address: str) -> None:
    """Scenarios of export/browser/test/page.mjs: each fails where the page is not as it should be."""
    node("page.mjs", address, scenario)
