"""Exports: what is written, what is read back, and what is refused. The programs themselves are compared with the unroll."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

import adaptrt
from adaptrt import CompiledUnroll, Exported, compile_unroll, optim, tree
from adaptrt.errors import (
    AdaptrtError,
    InvalidArgument,
    InvalidBatch,
    InvalidExport,
    InvalidState,
    InvalidType,
    LabelOutOfRange,
    NonFiniteInput,
    NotDifferentiable,
    OptimizerMismatch,
    ShapeChanged,
)
from adaptrt.export import manifest as manifests
from tests.tolerances import assert_near

K, T = 3, 2
SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "manifest.schema.json").read_text())


class Net(nn.Module):
    """Statistics, noise, indices, a frozen layer, a tied weight, a constant, and outputs that are a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.body, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.again = self.body
        self.body.weight.requires_grad_(False)
        self.shift = torch.tensor([0.1, 0.2, 0.3])

    def forward(self, tokens: Tensor, scale: Tensor) -> dict[str, Tensor]:
        x = self.drop(self.norm(self.words(tokens).mean(1))) * scale[:, None]
        return {"logits": self.head(torch.tanh(self.again(self.body(x)))) + self.shift}


def model(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def loss_of(output: Mapping[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], target)


def make(net: nn.Module, tasks: bool = False, **options: Any) -> CompiledUnroll:
    opt = torch.optim.Adam([value for value in net.parameters() if value.requires_grad], lr=0.05)
    unroll = compile_unroll(net, opt, K, loss=loss_of, backend="eager", **options)
    return unroll.vmap() if tasks else unroll


def data(n: int = 6, *lead: int, seed: int = 1) -> tuple[Any, Tensor]:
    generator = Generator().manual_seed(seed)
    tokens = torch.randint(7, (*lead, n, 5), generator=generator)
    return (tokens, torch.rand(*lead, n, generator=generator) + 0.5), torch.randint(3, (*lead, n), generator=generator)


def inputs(n: int = 4, *lead: int) -> Any:
    return data(n, *lead, seed=2)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shapes, as TorchScript."""
    support, query = [data(6), data(3)], [inputs(4), inputs(2)]
    return make(model()).export(tmp_path_factory.mktemp("export") / "net", support, query, formats="torchscript")


def generator() -> Generator:
    return Generator().manual_seed(5)


def same(found: Any, right: Any) -> None:
    """Whether two adaptations have the same numbers."""
    assert_near(found.state.named_tensors(), {n: v.detach() for n, v in right.state.named_tensors().items()}, torch.float32)
    assert_near({"losses": found.losses}, {"losses": right.losses.detach()}, torch.float32)


def check(unroll: CompiledUnroll, exported: Exported, support: Any, query: Any) -> None:
    """Everything that an export computes, against the unroll, with the same draws."""
    adapted, right = (each.adapt(support, generator=generator()) for each in (exported, unroll))
    same(adapted, right)
    assert_near(adapted(query, generator=generator()), right.detach()(query, generator=generator()), torch.float32)
    draws = generator()
    wanted = unroll.adapt(support, generator=draws).detach()(query, generator=draws)
    found = exported.adapt_predict(support, query, generator=generator())
    assert_near(found.outputs, {name: value.detach() for name, value in wanted.items()}, torch.float32)
    assert_near({"losses": found.losses}, {"losses": right.losses.detach()}, torch.float32)
    base = exported.predict(query, generator=generator())
    start = unroll.start(num_tasks=exported.manifest.num_tasks)
    assert_near(base, {n: v.detach() for n, v in start(query, generator=generator()).items()}, torch.float32)
    same(exported.adapt(support, start=adapted, generator=generator()), unroll.adapt(support, start=right, generator=generator()))
    for keep in ("finite", "not_worse", lambda before, after: after.update_norm < 1e-3):
        kept, wanted = (each.adapt(support, keep=keep, generator=generator()) for each in (exported, unroll))
        assert torch.equal(kept.kept, wanted.kept)  # type: ignore[arg-type]
        same(kept, wanted)
        assert_near({"final": kept.final_loss}, {"final": wanted.final_loss.detach()}, torch.float32)  # type: ignore[union-attr, dict-item]
    assert adapted.state_dict().keys() == unroll._settings.model.state_dict().keys()


def test_what_an_export_computes(folder: Path) -> None:
    unroll, exported = make(model()), adaptrt.load(folder)
    for n, m in ((6, 4), (3, 2)):
        check(unroll, exported, data(n), inputs(m))
    assert exported.k == K and exported.format == "torchscript" and "float32[6]" in repr(exported)


def test_over_tasks(tmp_path: Path) -> None:
    unroll = make(model(), tasks=True)
    support, query = data(6, T), inputs(4, T)
    path = unroll.export(tmp_path / "net", support, query, formats=("torchscript", "onnx"))
    for format in ("onnx", "torchscript"):
        exported = adaptrt.load(path, format=format)
        check(unroll, exported, support, query)
    users = adaptrt.stack(exported.adapt(support).unbind()[::-1])
    assert exported.adapt(support, start=users)[0].num_tasks is None


def test_a_batch_for_each_step_and_weights_of_examples(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    x, y = torch.randn(K, 5, 3), torch.randint(2, (K, 5))
    unroll = compile_unroll(
        net, optim.sgd(lr=0.1), K, loss=nn.CrossEntropyLoss(reduction="none"), per_step=True, examples="weighted", backend="eager"
    )
    batch = x, y, torch.rand(K, 5)
    exported = adaptrt.load(unroll.export(tmp_path / "net", batch, x[0], formats="torchscript"))
    same(exported.adapt(batch), unroll.adapt(batch))
    same(exported.adapt(batch, keep="finite"), unroll.adapt(batch, keep="finite"))
    with pytest.raises(InvalidBatch, match="sum to 0"):
        exported.adapt((x, y, torch.zeros(K, 5)))


def like(found: Any, right: Any) -> None:
    """The same structure, shapes and dtypes, of zeros."""
    assert tree.flatten(found)[1] == tree.flatten(right)[1]
    for one, other in zip(tree.leaves(found), tree.leaves(right), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype) and not one.any()


def test_examples_of_what_was_exported(folder: Path, tmp_path: Path) -> None:
    """Of one task, also from an export over tasks; without weights; with structured inputs."""
    exported = adaptrt.load(folder)
    support, query = exported.example()
    assert isinstance(support, tuple) and isinstance(support[0], tuple) and isinstance(query, tuple)
    like(support, data(6))
    like(query, inputs(4))
    assert (exported.num_examples("adapt"), exported.num_examples("predict")) == ((3, 6), (2, 4))
    assert exported.adapt(support, keep="finite").losses.shape == (K,) and exported.predict(query)["logits"].shape == (4, 3)

    unroll = make(model(), tasks=True)
    exported = adaptrt.load(unroll.export(tmp_path / "tasks", data(6, T), inputs(4, T), formats="torchscript"))
    like(exported.example(), (data(6), inputs(4)))
    assert (exported.num_examples("adapt"), exported.num_examples("predict")) == ((6,), (4,))

    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    net = nn.Linear(3, 2)
    for lead in ((), (T,)):
        unroll = compile_unroll(net, optim.sgd(lr=0.1), K, loss=nn.CrossEntropyLoss(reduction="none"), examples="weighted", backend="eager")
        batch = tuple(value.expand(*lead, *value.shape).clone() for value in (x, y, torch.rand(5)))
        path = (unroll.vmap() if lead else unroll).export(tmp_path / f"weighted{len(lead)}", batch, batch[0], formats="torchscript")
        exported = adaptrt.load(path)
        support, query = exported.example()
        assert len(support) == 2 and isinstance(query, Tensor)
        like((support, query), ((x, y), x))
        assert exported.num_examples("adapt") == (5,)

    named = compile_unroll(Named(), optim.sgd(lr=0.1), K, loss=F.cross_entropy, backend="eager")
    inner = {"x": x, "more": torch.rand(5)}
    exported = adaptrt.load(named.export(tmp_path / "named", (inner, y), inner, formats="torchscript"))
    support, query = exported.example()
    assert list(support[0]) == list(query) == ["x", "more"]
    like((support, query), ((inner, y), inner))

    unlabelled = compile_unroll(net, optim.sgd(lr=0.1), K, loss=lambda output: output.square().mean(), backend="eager")
    exported = adaptrt.load(unlabelled.export(tmp_path / "unlabelled", (x,), x, formats="torchscript"))
    support, query = exported.example()
    assert len(support) == 1
    like((support, query), ((x,), x))


class Named(nn.Module):
    """Inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.layer(x) * more[:, None]


@pytest.mark.slow
def test_machine_code(tmp_path: Path) -> None:
    """A pt2 package, loaded in a process that has not the model's class."""
    unroll, support, query = make(model()), data(), inputs()
    path = unroll.export(tmp_path / "net", support, query, formats=("pt2", "exported_program"))
    exported = adaptrt.load(path)
    assert exported.format == "pt2"
    with zipfile.ZipFile(path / "programs.pt2") as package:
        assert {package.read(name) for name in package.namelist() if name.endswith(".cpp")} == {b"// left out\n"}
    check(unroll, exported, support, query)
    # A weight in another memory layout, which the package itself would not notice.
    turned = exported.start(params={"head.weight": unroll._settings.model.head.weight.detach().T.contiguous().T})  # type: ignore[union-attr]
    same(exported.adapt(support, start=turned, generator=generator()), unroll.adapt(support, generator=generator()))
    code = f"""
import torch, adaptrt
exported = adaptrt.load({str(path)!r})
generator = torch.Generator().manual_seed(1)
tokens, scale = torch.randint(7, (6, 5), generator=generator), torch.rand(6, generator=generator) + 0.5
adapted = exported.adapt(((tokens, scale), torch.randint(3, (6,), generator=generator)), generator=torch.Generator().manual_seed(5))
torch.save(dict(adapted.params), {str(tmp_path / "params.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert_near(torch.load(tmp_path / "params.pt"), dict(exported.adapt(support, generator=generator()).params), torch.float32)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["machine"]["instruction_sets"].append("avx9000")
    for change, message in (
        ({"machine": {**manifest["machine"]}}, "a processor with avx9000, which this one has not"),
        ({"machine": {**manifest["machine"], "architecture": "pdp11"}}, "compiled for architecture 'pdp11'"),
        ({"made_by": {"adaptrt": "0.1.0", "torch": "1.0"}}, "compiled with PyTorch 1.0"),
    ):
        rewrite(path, {**manifest, **change})
        with pytest.raises(InvalidExport, match=message):
            adaptrt.load(path).adapt(support)


def rewrite(path: Path, fields: dict[str, Any]) -> None:
    """Writes a manifest whose digest is right."""
    fields = {key: value for key, value in fields.items() if key != "digest"}
    (path / "manifest.json").write_text(json.dumps({**fields, "digest": manifests._digest(fields)}))


def test_the_manifest(folder: Path) -> None:
    fields = json.loads((folder / "manifest.json").read_text())
    jsonschema.validate(fields, SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    names = [program["name"] for program in fields["programs"]]
    assert names == ["adapt", "adapt_predict", "predict", "loss", *(f"{kind}_2" for kind in ("adapt", "adapt_predict", "predict", "loss"))]
    adapt = fields["programs"][0]
    roles = {entry["role"] for entry in adapt["inputs"]}
    assert roles == {"param", "state", "buffer", "hyper", "noise", "data", "const"}
    assert {entry["weight"] for entry in adapt["inputs"] if entry["weight"]} == {*fields["state"], *fields["fixed"], *fields["constants"]}
    assert [entry["weight"] for entry in adapt["outputs"]] == [*fields["state"], None]
    assert len(adapt["noise"]) == K and adapt["noise"][0]["kind"] == "bernoulli"
    assert {bound["size"] for bound in adapt["bounds"]} == {7, 3}
    assert set(fields["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_saved_states_go_both_ways(folder: Path, tmp_path: Path) -> None:
    unroll, exported = make(model()), adaptrt.load(folder)
    mine, theirs = exported.adapt(data(), generator=generator()), unroll.adapt(data(), generator=generator())
    mine.save(tmp_path / "mine.safetensors")
    theirs.save(tmp_path / "theirs.safetensors")
    same(unroll.load(tmp_path / "mine.safetensors"), exported.load(tmp_path / "theirs.safetensors"))
    other = make(model(1)).adapt(data())
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(InvalidState, match="another base"):
        exported.load(tmp_path / "other.safetensors")


def test_other_weights(folder: Path, tmp_path: Path) -> None:
    path = make(model()).export(tmp_path / "without", data(), inputs(), formats="torchscript", weights=False)
    with pytest.raises(InvalidArgument, match="exported with weights=False; pass weights="):
        adaptrt.load(path)
    same(
        adaptrt.load(path, weights=folder / "weights.safetensors").adapt(data(), generator=generator()),
        make(model()).adapt(data(), generator=generator()),
    )
    with pytest.raises(InvalidExport, match="not those that the programs take"):
        adaptrt.load(path, weights={"state.params.head.weight": torch.zeros(3, 4)})
    with pytest.raises(InvalidType, match=r"weights\['x'\] must be a tensor, got int"):
        adaptrt.load(path, weights={"x": 1})  # type: ignore[dict-item]


# --- damaged and foreign files


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_flipped_and_truncated_files_are_refused_or_equal(draw: st.DataObject, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    path = draw.draw(st.sampled_from(sorted(copy.iterdir())))
    content = bytearray(path.read_bytes())
    place = draw.draw(st.integers(0, len(content) - 1))
    if draw.draw(st.booleans()):
        content[place] ^= draw.draw(st.integers(1, 255))
    else:
        del content[place:]
    path.write_bytes(content)
    try:
        found = adaptrt.load(copy).adapt(data(), generator=generator())
    except InvalidExport:
        return
    same(found, adaptrt.load(folder).adapt(data(), generator=generator()))


def edited(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    """A change of the manifest, with a digest that is right."""

    def run(path: Path) -> None:
        fields = json.loads((path / "manifest.json").read_text())
        change(fields, path)
        rewrite(path, fields)

    return run


def outside(fields: dict[str, Any], path: Path) -> None:
    shutil.copy(path / "adapt.ts", path.parent / "adapt.ts")
    fields["files"]["../adapt.ts"] = fields["files"].pop("adapt.ts")
    fields["programs"][0]["files"]["torchscript"] = "../adapt.ts"


def linked(path: Path) -> None:
    shutil.move(path / "adapt.ts", path.parent / "elsewhere.ts")
    (path / "adapt.ts").symlink_to(path.parent / "elsewhere.ts")


def another_k(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"k": 3', '"k": 4'))


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"has no manifest\.json"),
    "another file": (lambda path: (path / "manifest.json").write_text("{}"), "is no manifest of an export"),
    "digest": (
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"k": 3', '"k": 4')),
        "its digest",
    ),
    "newer": (edited(lambda fields, path: fields.update(format_version=2)), "written in format 2, this adaptrt reads formats up to 1"),
    "missing": (lambda path: (path / "adapt.ts").unlink(), "adapt.ts is missing"),
    "extra": (lambda path: (path / "extra.txt").write_text(""), "extra.txt is in the folder, and the manifest does not know it"),
    "changed": (lambda path: (path / "adapt.ts").write_bytes(b"x"), "adapt.ts is not the file that was exported"),
    "link": (linked, "adapt.ts is a link to another place"),
    "outside": (edited(outside), "'../adapt.ts' is no name of a file in the folder"),
    "size": (edited(lambda fields, path: fields["state"]["state.params.head.bias"].update(shape=[1 << 50])), "which is too large"),
    "type": (edited(lambda fields, path: fields.update(k="three")), "'k' must be a whole number of at least 1, got 'three'"),
    "entries": (edited(lambda fields, path: fields.pop("machine")), "its entries are"),
    "tree": (edited(lambda fields, path: fields["programs"][0].update(data=[{"set": []}])), "describes a tree by"),
    "inputs": (edited(lambda fields, path: fields["programs"][0]["inputs"].pop(0)), "inputs and outputs of program 'adapt' are not those"),
    "noise": (edited(lambda fields, path: fields["programs"][0]["noise"][0].pop("kind")), "describes noise by"),
    "huge": (lambda path: (path / "manifest.json").write_bytes(b" " * ((1 << 26) + 1)), "which no manifest has"),
    "nested": (lambda path: (path / "manifest.json").write_text("[" * 100_000), "is damaged, or is no manifest"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_folders(name: str, folder: Path, tmp_path: Path) -> None:
    change, message = FOREIGN[name]
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    with pytest.raises(InvalidExport, match=message):
        adaptrt.load(copy)


def test_a_file_that_changes_after_it_was_loaded(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    exported = adaptrt.load(copy)
    (copy / "adapt.ts").write_bytes(b"something else")
    with pytest.raises(InvalidExport, match="was changed after the export was loaded"):
        exported.adapt(data())


# --- wrong calls


(TOKENS, SCALE), LABELS = data()
CALLS: dict[str, tuple[Callable[[Exported], Any], type[AdaptrtError], str]] = {
    "shape": (lambda e: e.adapt(data(5)), ShapeChanged, r"no program 'adapt' was exported for int64\[5, 5\].*only for int64\[6, 5\]"),
    "dtype": (lambda e: e.adapt(((TOKENS, SCALE.double()), LABELS)), ShapeChanged, r"float64\[6\]"),
    "structure": (lambda e: e.adapt(({"tokens": TOKENS, "scale": SCALE}, LABELS)), ShapeChanged, "no program 'adapt'"),
    "label": (lambda e: e.adapt(((TOKENS, SCALE), LABELS + 3)), LabelOutOfRange, "support target holds"),
    "index": (lambda e: e.predict((data(4)[0][0] + 7, data(4)[0][1])), LabelOutOfRange, "input"),
    "NaN": (lambda e: e.adapt(((TOKENS, SCALE / 0 * 0), LABELS)), NonFiniteInput, "holds nan"),
    "no batch": (lambda e: e.adapt(TOKENS), InvalidType, r"must be a tuple \(inputs, target\)"),
    "start": (lambda e: e.adapt(data(), start=cast(Any, "base")), InvalidType, "start must be what"),
    "other start": (
        lambda e: e.adapt(data(), start=compile_unroll(nn.Linear(2, 1), optim.sgd(lr=0.1), 1, backend="eager").start()),
        OptimizerMismatch,
        "another model or optimiser",
    ),
    "tasks": (lambda e: e.adapt(data(), start=adaptrt.stack([e.adapt(data())] * 2)), InvalidArgument, "start holds 2 tasks"),
    "guard": (lambda e: e.adapt(data(), keep="best"), InvalidArgument, "keep must be"),
    "gradient": (lambda e: e.adapt(((TOKENS, SCALE.clone().requires_grad_()), LABELS)), NotDifferentiable, r"torch\.no_grad\(\)"),
    "parameter": (lambda e: e.start(params={"head.weights": torch.zeros(3, 4)}), InvalidArgument, "did you mean 'head.weight'"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls(name: str, folder: Path) -> None:
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call(adaptrt.load(folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model of one tensor, whose second call is compared with the first, and which has been called in every way."""
    folder = plain_unroll().export(tmp_path_factory.mktemp("plain") / "net", plain_data(), plain_data()[0], formats="torchscript")
    exported = adaptrt.load(folder)
    for _ in range(2):
        every_call(exported, plain_data(), plain_data()[0], exported.start())
    return exported


def plain_unroll() -> CompiledUnroll:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return compile_unroll(net, optim.adam(lr=0.1), K, loss=F.cross_entropy, backend="eager")


def plain_data(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)


def every_call(exported: Exported, support: Any, query: Any, start: Any) -> dict[str, Tensor]:
    """The numbers of all calls."""
    adapted = exported.adapt(support, start=start)
    outputs, losses = exported.adapt_predict(support, query, start=start)
    predicted = {"predict": exported.predict(query, start=start), "adapted": adapted(query)}
    return {**adapted.state.named_tensors(), "losses": adapted.losses, "outputs": outputs, "losses too": losses, **predicted}


def in_columns(value: Tensor) -> Tensor:
    return value.t().contiguous().t() if value.dim() == 2 else value


def negated(value: Tensor) -> Tensor:
    """A view whose values are the negatives of those in its memory."""
    return torch.complex(torch.zeros_like(value), value).conj().imag


LIKE_AND_UNLIKE: dict[str, tuple[Callable[[Tensor, Tensor, Any], tuple[Any, Any, Any]], type[Exception] | None]] = {
    "the same": (lambda x, y, start: ((x, y), x, start), None),
    "no start": (lambda x, y, start: ((x, y), x, None), None),
    "a list": (lambda x, y, start: ([x, y], x, start), None),
    "columns": (lambda x, y, start: ((in_columns(x), y), in_columns(x), start), None),
    "a start in columns": (
        lambda x, y, start: ((x, y), x, start.replace(params={n: in_columns(v) for n, v in start.params.items()})),
        None,
    ),
    "a negated view": (lambda x, y, start: ((negated(-x), y), negated(-x), start), None),
    "float64": (lambda x, y, start: ((x.double(), y), x.double(), start), ShapeChanged),
    "fewer rows": (lambda x, y, start: ((x[:5], y[:5]), x[:5], start), ShapeChanged),
    "a gradient": (lambda x, y, start: ((x.clone().requires_grad_(), y), x, start), NotDifferentiable),
    "NaN": (lambda x, y, start: ((x * float("nan"), y), x, start), NonFiniteInput),
    "a label too large": (lambda x, y, start: ((x, y + 3), x, start), LabelOutOfRange),
    "no start at all": (lambda x, y, start: ((x, y), x, "start"), InvalidType),
}


@pytest.mark.parametrize("name", LIKE_AND_UNLIKE)
def test_a_call_behind_one_that_was_right(name: str, plain: Exported) -> None:
    change, error = LIKE_AND_UNLIKE[name]
    x, y = plain_data()
    wanted = every_call(plain, (x, y), x, plain.start())
    support, query, start = change(x, y, plain.start())
    if error is None:
        assert_near(every_call(plain, support, query, start), wanted, torch.float32)
    else:
        for call in (lambda: plain.adapt(support, start=start), lambda: plain.adapt_predict(support, query, start=start)):
            with pytest.raises(error):
                call()


def test_calls_with_another_number_of_inputs(tmp_path: Path) -> None:
    """Predictions with one input behind such with two."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            return self.body(x if more is None else x + more)

    x, y = plain_data()
    unroll = compile_unroll(Either(), optim.sgd(lr=0.1), 1, loss=F.cross_entropy, backend="eager")
    exported = adaptrt.load(unroll.export(tmp_path / "net", [((x, x), y), (x, y)], [(x, x), (x,)], formats="torchscript"))
    adapted, right = exported.adapt((x, y)), unroll.adapt((x, y)).detach()
    for _ in range(2):
        for inputs in ((x, x), (x,), (x, x + 1)):
            assert_near({"outputs": adapted(*inputs)}, {"outputs": right(*inputs)}, torch.float32)
            assert_near({"outputs": exported.predict(inputs)}, {"outputs": unroll.start()(*inputs).detach()}, torch.float32)


@pytest.mark.slow
def test_results_of_machine_code_are_their_own(tmp_path: Path) -> None:
    """They stay as they are when the program runs again, here and in other threads, and when the thread that made them has ended."""
    unroll = plain_unroll()
    exported = adaptrt.load(unroll.export(tmp_path / "net", plain_data(), plain_data()[0], formats="pt2"))
    query = plain_data()[0]

    def users(seed: int) -> list[adaptrt.Adapted]:
        return [exported.adapt(plain_data(seed + user)) for user in range(3)]

    with ThreadPoolExecutor(3) as pool:
        made = [user for part in pool.map(users, (0, 10, 20)) for user in part]
    outputs, losses = exported.adapt_predict(plain_data(0), query)
    right = [unroll.adapt(plain_data(start + user)).detach() for start in (0, 10, 20) for user in range(3)]
    kept = exported.adapt(plain_data(30), start=made[0], keep=lambda old, new: torch.tensor(False))
    exported.adapt_predict(plain_data(30), query)
    for user, wanted in zip([*made, kept, *users(0)], [*right, right[0], *right[:3]], strict=True):
        assert_near(user.state.named_tensors(), wanted.state.named_tensors(), torch.float32)
        assert_near({"predicted": user(query)}, {"predicted": wanted(query)}, torch.float32)
        assert_near({"losses": user.losses}, {"losses": wanted.losses if user is not kept else kept.losses}, torch.float32)
    assert_near({"outputs": outputs, "losses": losses}, {"outputs": right[0](query), "losses": right[0].losses}, torch.float32)


def test_tangents_are_refused(plain: Exported) -> None:
    x, y = plain_data()
    with torch.autograd.forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, when it loads its rules for forward mode
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for call in (lambda: plain.adapt((dual, y)), lambda: plain.predict(dual)):
            with pytest.raises(NotDifferentiable):
                call()


def test_wrong_exports(folder: Path, tmp_path: Path) -> None:
    unroll = make(model())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidArgument, match=r"formats must be among .* got 'zip'"):
        unroll.export(tmp_path / "net", data(), inputs(), formats=("torchscript", "zip"))
    with pytest.raises(InvalidArgument, match="formats must name at least one"):
        unroll.export(tmp_path / "net", data(), inputs(), formats=())
    with pytest.raises(InvalidArgument, match="exists already; give another directory, or pass overwrite=True"):
        unroll.export(folder, data(), inputs(), formats="torchscript")
    with pytest.raises(InvalidType, match="support is a list of 2 batches, so query must be a list of as many"):
        unroll.export(tmp_path / "net", [data(), data(3)], inputs(), formats="torchscript")
    with pytest.raises(InvalidBatch):
        unroll.export(tmp_path / "net", data(), torch.randn(4, 9), formats="torchscript")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(InvalidArgument, match="has the formats 'torchscript', not 'pt2'"):
        adaptrt.load(folder, format="pt2")
    with pytest.raises(InvalidType, match="load\\(\\) takes the folder"):
        adaptrt.load(3)  # type: ignore[arg-type]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    unroll = make(model())

    def interrupt(stage: str) -> None:
        if stage == "writing weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unroll.export(tmp_path / "net", data(), inputs(), formats="torchscript", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    unroll.export(tmp_path / "net", data(), inputs(), formats="torchscript")
    before = (tmp_path / "net" / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        unroll.export(tmp_path / "net", data(3), inputs(), formats="torchscript", overwrite=True, progress=interrupt)
    assert (tmp_path / "net" / "manifest.json").read_bytes() == before
    unroll.export(tmp_path / "net", data(3), inputs(), formats="torchscript", overwrite=True)
    assert adaptrt.load(tmp_path / "net").adapt(data(3)) and [path.name for path in tmp_path.iterdir()] == ["net"]


def test_an_export_compiles_and_changes_nothing(tmp_path: Path) -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    unroll = compile_unroll(net, torch.optim.Adam([net.head.weight, net.head.bias], lr=0.1), K, loss=loss_of, on_new_shape="error")
    state = torch.get_rng_state()
    unroll.export(tmp_path / "net", data(), inputs(), formats="torchscript")
    unroll.check_export(data(), inputs(), formats="torchscript")
    assert unroll.graphs() == {} and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_is_imported() -> None:
    """`import adaptrt` imports nothing that only exports need."""
    names = "onnx", "onnxruntime", "torch._inductor.compile_fx"
    code = f"import sys, adaptrt; print(*[name for name in {names} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == ""


class Doubled(torch.autograd.Function):
    """Its gradient is another one where it is to be differentiated again, as eager code may have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (2 if torch.is_grad_enabled() else 3)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.linear(x))  # type: ignore[no-any-return]


def by_curvature() -> optim.Optimizer:
    """An optimiser that differentiates the gradients."""

    def update(grads: Mapping[str, Tensor], state: Any, params: Mapping[str, Tensor], hyper: Any) -> Any:
        total = torch.stack([grad.square().sum() for grad in grads.values()]).sum()
        found = torch.autograd.grad(total, list(params.values()), create_graph=True)
        return {name: value - 0.1 * grads[name] - 0.01 * more for (name, value), more in zip(params.items(), found, strict=True)}, state

    return optim.Optimizer(lambda params: (), update)


@pytest.mark.parametrize("name", ["a gradient in Python", "an optimiser that differentiates"])
@pytest.mark.parametrize("tasks", [False, True], ids=["one task", "tasks"])
def test_exports_have_the_gradients_of_calls_that_are_differentiated(name: str, tasks: bool, tmp_path: Path) -> None:
    generator = Generator().manual_seed(0)
    torch.manual_seed(0)
    net = Own() if name == "a gradient in Python" else nn.Linear(3, 2, dtype=torch.float64)
    opt = optim.sgd(lr=0.1) if isinstance(net, Own) else by_curvature()
    unroll = compile_unroll(net, opt, 2, loss=F.mse_loss, backend="eager")
    lead = (T,) if tasks else ()
    x, y = (torch.randn(*lead, 5, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    unroll = unroll.vmap() if tasks else unroll
    expected = unroll.adapt((x, y)).detach()
    folder = unroll.export(tmp_path / "net", (x, y), x, formats="torchscript")
    with torch.no_grad():
        found = adaptrt.load(folder).adapt((x, y))
    assert_near(found.state.named_tensors(), expected.state.named_tensors())
