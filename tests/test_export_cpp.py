"""The C++ runner of exports, against Python: the same numbers, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptrt
from adaptrt import Exported, compile_unroll, optim
from adaptrt.inner.check import as_batch
from tests.test_export import FOREIGN, T, data, edited, generator, inputs, make, model, rewrite

SOURCE = Path(__file__).parents[1] / "export" / "cpp"
COMPILER = next((name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler, and there is none"),
    pytest.mark.skipif(os.name != "posix", reason="the C++ runner is for POSIX systems"),
]

Data = Mapping[str, Tensor]


def compiled(source: Path, target: Path, *options: str) -> Path:
    """Builds a program without CMake."""
    (lib,) = torch.utils.cpp_extension.library_paths()[:1]
    includes = [option for path in torch.utils.cpp_extension.include_paths() for option in ("-isystem", path)]
    libraries = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [
        str(COMPILER),
        "-std=c++20",
        *options,
        "-Wall",
        "-Wextra",
        f"-I{SOURCE}",
        *includes,
        str(source),
        "-o",
        str(target),
        *libraries,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner, as README.md builds it, or without CMake where that is missing."""
    folder = tmp_path_factory.mktemp("build")
    if shutil.which("cmake") is None:
        return compiled(SOURCE / "run_adapt.cpp", folder / "run_adapt", "-O2")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", str(SOURCE), "-B", str(folder), prefix], ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "run_adapt"


MANY = """
// Calls the runner's main once for each line of standard input, whose arguments are between tabs, in one process.
#define main run_adapt_main
#include "run_adapt.cpp"
#undef main

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::vector<std::string> parts = {"run_adapt"};
    std::istringstream stream(line);
    for (std::string part; std::getline(stream, part, '\\t');) parts.push_back(part);
    std::vector<char*> arguments;
    for (std::string& part : parts) arguments.push_back(part.data());
    const int code = run_adapt_main(static_cast<int>(arguments.size()), arguments.data());
    std::fprintf(stderr, "\\x1d%d\\x1e", code);
  }
}
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner for many calls, built so that every wrong access to memory and every undefined operation ends it."""
    options = "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"
    folder = tmp_path_factory.mktemp("checked")
    (folder / "many.cpp").write_text(MANY)
    try:
        return compiled(folder / "many.cpp", folder / "many", *options)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this compiler cannot build with sanitizers: {error.stderr.splitlines()[-1:]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shapes, as TorchScript."""
    support, query = [data(6), data(3)], [inputs(4), inputs(2)]
    return make(model()).export(tmp_path_factory.mktemp("export") / "net", support, query, formats="torchscript")


def run(program: Path, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace", timeout=300)


def run_many(checked: Path, cases: Sequence[Sequence[Path | str]]) -> list[tuple[int, str]]:
    """Exit code and standard error of each call."""
    # Too large a tensor is an exception outside of the sanitizer, and so it is here.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096"}
    lines = "".join("\t".join(map(str, case)) + "\n" for case in cases)
    found = subprocess.run([checked], input=lines, capture_output=True, text=True, errors="replace", env=environment, timeout=600)
    ends = [(part.rpartition("\x1d")[2], part.rpartition("\x1d")[0]) for part in found.stderr.split("\x1e")]
    assert found.returncode == 0, f"call {len(ends) - 1}, {cases[len(ends) - 1]}: {found.stderr[-6000:]}"
    assert len(ends) == len(cases) + 1
    return [(int(code), text) for code, text in ends[:-1]]


def refusals(checked: Path, cases: Sequence[Sequence[Path | str]]) -> list[str]:
    """The one line that the runner says for each call."""
    found = run_many(checked, cases)
    for case, (code, text) in zip(cases, found, strict=True):
        assert (code, text.count("\n"), text[:11]) == (1, 1, "run_adapt: "), (case, code, text)
    return [text for _, text in found]


def results(program: Path, folder: Path, kind: str, given: Data, scratch: Path, *options: Path | str) -> dict[str, Tensor]:
    """What the runner writes for data."""
    save_file({name: value.contiguous() for name, value in given.items()}, scratch / "data.safetensors")
    found = run(program, folder, kind, scratch / "data.safetensors", scratch / f"{kind}.safetensors", *options)
    assert (found.returncode, found.stderr) == (0, "")
    assert "load to first result" in found.stdout and (kind == "predict" or found.stdout.startswith("loss"))
    return load_file(scratch / f"{kind}.safetensors")


def refusal(program: Path, *arguments: Path | str) -> str:
    """The one line that the runner says."""
    found = run(program, *arguments)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1), found.stderr[:4000]
    assert found.stderr.startswith("run_adapt: ")
    return found.stderr


def named(exported: Exported, program: str, **parts: Any) -> dict[str, Tensor]:
    """Data by the names of the inputs, with the noise that Python draws from `generator()`."""
    own = exported._programs[program]
    noise = iter([value for part in own.draw(generator()) for value in part])
    given: dict[str, Tensor] = {}
    for entry in own.entry.inputs:
        if entry.role == "noise":
            given[entry.name] = next(noise)
        elif entry.role == "data":
            value: Any = parts
            for key in entry.name.split("."):
                value = value[int(key) if key.isdigit() else key]
            given[entry.name] = value
    return given


def batch(value: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("inputs", "target", "weights"), value, strict=False))


def close(found: Data, wanted: Data) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.shape == wanted[name].shape and value.dtype == wanted[name].dtype, name
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def check(program: Path, folder: Path, support: Any, query: Any, scratch: Path, *options: str, number: str = "") -> None:
    """All kinds of programs, against Python."""
    exported = adaptrt.load(folder)
    adapted = exported.adapt(support, generator=generator())
    state = {f"result.0.{name}": value for name, value in adapted.state.named_tensors().items()}
    given = named(exported, f"adapt{number}", support=batch(support))
    close(results(program, folder, "adapt", given, scratch, *options), {**state, "result.1": adapted.losses})

    both = exported.adapt_predict(support, query, generator=generator())
    given = named(exported, f"adapt_predict{number}", support=batch(support), query=query)
    found = results(program, folder, "adapt_predict", given, scratch, *options)
    close(found, {"result.0.logits": both.outputs["logits"], "result.1": both.losses})

    given = named(exported, f"predict{number}", query=query)
    close(
        results(program, folder, "predict", given, scratch, *options),
        {"result.logits": exported.predict(query, generator=generator())["logits"]},
    )
    found = results(program, folder, "predict", given, scratch, *options, "--start", scratch / "adapt.safetensors")
    close(found, {"result.logits": adapted(query, generator=generator())["logits"]})

    start = exported.start()
    if exported.manifest.num_tasks is not None:
        return
    given = named(exported, f"loss{number}", batch=batch(support))
    loss = exported._loss(start.state, as_batch("support", support, torch.device("cpu"), exported.manifest.weighted), generator())
    close(results(program, folder, "loss", given, scratch, *options), {"result": loss})


def test_what_it_computes(runner: Path, folder: Path, tmp_path: Path) -> None:
    check(runner, folder, data(6), inputs(4), tmp_path)
    check(runner, folder, data(3), inputs(2), tmp_path, "--repeat", "3", number="_2")


def test_under_sanitizers(checked: Path, folder: Path, tmp_path: Path) -> None:
    """The calls that are right, too, touch no memory that is not theirs."""
    exported = adaptrt.load(folder)
    parts = {"support": batch(data()), "batch": batch(data()), "query": inputs()}
    cases: list[list[Path | str]] = []
    for kind in ("adapt", "adapt_predict", "predict", "loss"):
        save_file(named(exported, kind, **parts), tmp_path / kind)
        cases += [[folder, kind, tmp_path / kind, tmp_path / f"{kind}.out", "--repeat", "2"]]
    cases += [[*case, "--start", tmp_path / "adapt.out"] for case in cases]
    assert run_many(checked, cases) == [(0, "")] * len(cases)


def test_over_tasks(runner: Path, tmp_path: Path) -> None:
    support, query = data(6, T), inputs(4, T)
    path = make(model(), tasks=True).export(tmp_path / "net", support, query, formats="torchscript")
    check(runner, path, support, query, tmp_path)


def test_machine_code(runner: Path, tmp_path: Path) -> None:
    support, query = data(), inputs()
    path = make(model()).export(tmp_path / "net", support, query, formats=("pt2", "torchscript"))
    check(runner, path, support, query, tmp_path)
    check(runner, path, support, query, tmp_path, "--format", "torchscript")
    given = named(adaptrt.load(path), "predict", query=query)
    save_file(given, tmp_path / "data.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    machine = manifest["machine"]
    for change, message in (
        ({"machine": {**machine, "instruction_sets": [*machine["instruction_sets"], "avx9000"]}}, "a processor with avx9000"),
        ({"machine": {**machine, "architecture": "pdp11"}}, "compiled for architecture 'pdp11'"),
        ({"machine": {**machine, "system": "Plan 9"}}, "compiled for system 'Plan 9'"),
        ({"machine": {**machine, "device": "cuda"}}, "compiled for device 'cuda'"),
        ({"made_by": {"adaptrt": "0.1.0", "torch": "1.0"}}, "compiled with PyTorch 1.0"),
    ):
        rewrite(path, {**manifest, **change})
        assert message in refusal(runner, path, "predict", tmp_path / "data.safetensors", tmp_path / "out.safetensors")


def test_weights_of_examples(runner: Path, tmp_path: Path) -> None:
    x, y, weights = torch.randn(3, 5, 3), torch.randint(2, (3, 5)), torch.rand(3, 5)
    unroll = compile_unroll(
        nn.Linear(3, 2),
        optim.sgd(lr=0.1),
        3,
        loss=nn.CrossEntropyLoss(reduction="none"),
        per_step=True,
        examples="weighted",
        backend="eager",
    )
    path = unroll.export(tmp_path / "net", (x, y, weights), x[0], formats="torchscript")
    given = named(adaptrt.load(path), "adapt", support=batch((x, y, weights)))
    adapted = adaptrt.load(path).adapt((x, y, weights))
    state = {f"result.0.{name}": value for name, value in adapted.state.named_tensors().items()}
    close(results(runner, path, "adapt", given, tmp_path), {**state, "result.1": adapted.losses})
    for wrong, message in ((torch.zeros(3, 5), "holds 0 at [0]; there is padding alone"), (-weights, "weights must be at least 0")):
        save_file({**given, "support.weights": wrong}, tmp_path / "data.safetensors")
        assert message in refusal(runner, path, "adapt", tmp_path / "data.safetensors", tmp_path / "out.safetensors")


def test_other_weights(runner: Path, folder: Path, tmp_path: Path) -> None:
    support, query = data(), inputs()
    path = make(model(1)).export(tmp_path / "net", support, query, formats="torchscript", weights=False)
    given = named(adaptrt.load(folder), "predict", query=query)
    wanted = adaptrt.load(path, weights=folder / "weights.safetensors").predict(query, generator=generator())["logits"]
    close(results(runner, path, "predict", given, tmp_path, "--weights", folder / "weights.safetensors"), {"result.logits": wanted})
    places = path, "predict", tmp_path / "data.safetensors", tmp_path / "out.safetensors"
    assert "was exported with weights=False" in refusal(runner, *places)
    assert "does not have the weight" in refusal(runner, *places, "--weights", tmp_path / "data.safetensors")


# --- wrong data and calls


def with_(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda given: given.update({name: change(given[name]).contiguous()})


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda given: given.pop("support.target"), "lacks 'support.target'"),
    "no noise": (lambda given: given.pop("noise.1.0"), "'noise.1.0' is missing, float32[6, 4]: noise, which is the caller's to draw"),
    "unknown": (lambda given: given.update(extra=torch.zeros(1)), "'extra' is no input of program 'adapt', which takes support.inputs.0"),
    "shape": (
        with_("support.target", lambda value: value[:-1]),
        "whose 'support.target' is int64[5], only for support.inputs.0 int64[6, 5]",
    ),
    "dtype": (with_("support.inputs.1", Tensor.double), "only for support.inputs.0 int64[6, 5]"),
    "noise of another shape": (with_("noise.0.0", lambda value: value[:, :3]), "'noise.0.0' must be float32[6, 4], got float32[6, 3]"),
    "noise of another kind": (with_("noise.0.0", lambda value: value + 0.5), "draws of 'bernoulli' are 0 or 1"),
    "label": (with_("support.target", lambda value: value + 3), "the model's class labels are 0 to 2"),
    "index": (with_("support.inputs.0", lambda value: value - 7), "rows of the embedding are 0 to 6"),
    "NaN": (with_("support.inputs.1", lambda value: value * torch.nan), "'support.inputs.1' holds nan at [0]; the data must be finite"),
    "infinity": (with_("support.inputs.1", lambda value: value / 0), "'support.inputs.1' holds inf at [0]"),
}


def test_wrong_data(checked: Path, folder: Path, tmp_path: Path) -> None:
    right = named(adaptrt.load(folder), "adapt", support=batch(data()))
    cases: list[list[Path | str]] = []
    for name, (change, _) in WRONG.items():
        given = dict(right)
        change(given)
        save_file(given, tmp_path / name)
        cases.append([folder, "adapt", tmp_path / name, tmp_path / "out.safetensors"])
    for found, (_, message) in zip(refusals(checked, cases), WRONG.values(), strict=True):
        assert message in found
    assert not (tmp_path / "out.safetensors").exists()


def test_ignored_labels(runner: Path, folder: Path, tmp_path: Path) -> None:
    tokens, target = data()
    support = tokens, target.clone().index_fill_(0, torch.tensor([0]), -100)
    given = named(adaptrt.load(folder), "adapt", support=batch(support))
    found = results(runner, folder, "adapt", given, tmp_path)
    close({"losses": found["result.1"]}, {"losses": adaptrt.load(folder).adapt(support, generator=generator()).losses})


def test_wrong_calls(checked: Path, folder: Path, tmp_path: Path) -> None:
    save_file(named(adaptrt.load(folder), "adapt", support=batch(data())), tmp_path / "data.safetensors")
    given, out = tmp_path / "data.safetensors", tmp_path / "out.safetensors"
    (tmp_path / "empty").mkdir()
    said: list[tuple[tuple[Path | str, ...], str]] = [
        ((), "usage:"),
        ((folder, "adapt", given), "usage:"),
        ((folder, "adapt", given, out, "--repeat"), "usage:"),
        ((folder, "adapt", given, out, "--repeat", "many"), "--repeat must be a whole number"),
        ((folder, "adapt", given, out, "--repeat", "-1"), "--repeat must be a whole number"),
        ((folder, "adapt", given, out, "--quick", "yes"), "there is no option '--quick'"),
        ((folder, "adapt", given, out, "--format", "pt2"), "has no programs in the format 'pt2'"),
        ((folder, "adapt", given, out, "--start", given), "must be all that 'adapt' returned"),
        ((folder, "train", given, out), "no program 'train' was exported"),
        ((folder, "adapt", tmp_path / "none", out), "none is missing"),
        ((folder, "adapt", tmp_path, out), "is no ordinary file"),
        ((folder, "adapt", given, tmp_path / "none" / "out"), "cannot be written"),
        ((tmp_path / "none", "adapt", given, out), "manifest.json is missing"),
        ((tmp_path / "empty", "adapt", given, out), "manifest.json is missing"),
    ]
    for found, (_, message) in zip(refusals(checked, [arguments for arguments, _ in said]), said, strict=True):
        assert message in found


# --- damaged and foreign files


def header(fields: Any, values: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + values


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "long header": ((1 << 63).to_bytes(8, "little") + b"{}", "its header is longer than the file"),
    "no object": (header([]), "its header is no object"),
    "no JSON": (header(b"{'x'"), "at byte 1"),
    "nested": (header(b"[" * 100_000), "nested too deeply"),
    "twice": (header(b'{"x": 1, "x": 1}'), "a key is there twice"),
    "surrogate": (header(b'{"\\ud800": 1}'), "half of a surrogate pair is missing"),
    "no UTF-8": (header(b'{"\xff": 1}'), "not in UTF-8"),
    "cut UTF-8": (header(b'{"\xe2\x82'), "not in UTF-8"),
    "no fields": (header({"x": {}}), "must have a dtype, a shape and data_offsets"),
    "dtype": (header(one("C64"), bytes(8)), "a dtype that is not known"),
    "negative": (header(one(shape=(-2,)), bytes(8)), "no whole numbers"),
    "huge": (header(one(shape=(1 << 40, 1 << 40)), bytes(8)), "too large a shape"),
    "huge number": (header(b'{"x": {"dtype": "F32", "shape": [99999999999999999999], "data_offsets": [0, 8]}}'), "no whole numbers"),
    "outside": (header(one(offsets=(0, 8)), bytes(4)), "offsets outside the file"),
    "reversed": (header(one(offsets=(8, 0)), bytes(8)), "offsets outside the file"),
    "size": (header(one(shape=(3,)), bytes(8)), "another number of bytes"),
    "overlap": (header({**one(), "y": one()["x"]}, bytes(8)), "overlap"),
    "hole": (header(one(offsets=(4, 12)), bytes(12)), "something between them"),
    "rest": (header(one(), bytes(9)), "more in it than its tensors"),
    "bool": (header(one("BOOL", offsets=(0, 2)), b"\x01\x07"), "neither true nor false"),
}


def test_files_of_tensors(checked: Path, folder: Path, tmp_path: Path) -> None:
    for name, (content, _) in FILES.items():
        (tmp_path / name).write_bytes(content)
    cases = [(folder, "adapt", tmp_path / name, tmp_path / "out.safetensors") for name in FILES]
    for found, (_, message) in zip(refusals(checked, cases), FILES.values(), strict=True):
        assert message in found


SAID = {
    "no manifest": "manifest.json is missing",
    "newer": "was written in another format than 1",
    "type": "'k' must be a whole number of at least 1",
    "size": "a shape that is too large",
    "entries": "has no entry 'machine'",
    "tree": "a tree is none",
    "inputs": None,
    "noise": "noise has no entry 'kind'",
    "huge": "more bytes than any manifest has",
    "nested": "nested too deeply",
}
"""Where it says something else than Python. It takes inputs by name, so it need not have all that Python gives."""


def linked_manifest(path: Path) -> None:
    shutil.move(path / "manifest.json", path.parent)
    (path / "manifest.json").symlink_to(path.parent / "manifest.json")


def test_foreign_folders(checked: Path, folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "data.safetensors"
    save_file(named(adaptrt.load(folder), "adapt", support=batch(data())), given)
    changes = {**FOREIGN, "linked manifest": (linked_manifest, "is a link to another place")}
    wanted = {name: SAID.get(name, message.replace("\\", "")) for name, (_, message) in changes.items()}
    cases: list[list[Path | str]] = []
    for name, (change, _) in changes.items():
        copy = shutil.copytree(folder, tmp_path / name / "copy")
        change(copy)
        if wanted[name] is not None:
            cases.append([copy, "adapt", given, tmp_path / "out.safetensors"])
    for found, message in zip(refusals(checked, cases), filter(None, wanted.values()), strict=True):
        assert message in found


def test_digests_are_those_of_python(runner: Path, folder: Path, tmp_path: Path) -> None:
    """A manifest that holds every kind of text and number is read; this depends on writing each as Python does."""
    odd = [0.1, 1e16, 1e15, 1e-4, 1e-5, 5e-324, 1.7976931348623157e308, -0.0, 123456789.125, 2.5e-7, float("inf"), float("nan"), 10**30, -7]
    texts = {'\x7f\x00\n\t\b\f\r"\\/': "é€😀\uffff", "😀": "", "\uffff": "", "z": "", "a": ""}
    path = shutil.copytree(folder, tmp_path / "net")
    edited(lambda fields, path: fields["optimizer"].update(odd=odd, texts=texts))(path)
    given = named(adaptrt.load(path), "predict", query=inputs())
    wanted = adaptrt.load(path).predict(inputs(), generator=generator())["logits"]
    close(results(runner, path, "predict", given, tmp_path), {"result.logits": wanted})


def test_flipped_and_truncated_files(checked: Path, folder: Path, tmp_path: Path) -> None:
    """In manifest, weights and programs every change is refused; changed data is refused or gives other numbers, and never a crash."""
    draw = random.Random(0)
    right = tmp_path / "right.safetensors"
    save_file(named(adaptrt.load(folder), "predict", query=inputs()), right)
    cases: list[list[Path | str]] = []
    changed: list[Path] = []
    for number in range(200):
        name = ("manifest.json", "weights.safetensors", "predict.ts", "data")[number % 4]
        own = shutil.copytree(folder, tmp_path / f"net{number}") if name != "data" else folder
        given = right if name != "data" else tmp_path / f"data{number}"
        path = given if name == "data" else own / name
        content = bytearray((right if name == "data" else path).read_bytes())
        place = draw.randrange(len(content) if name != "data" or number % 8 == 3 else 300)
        if number % 3:
            content[place] ^= draw.randrange(1, 256)
        else:
            del content[place:]
        path.write_bytes(content)
        changed.append(path)
        cases.append([own, "predict", given, tmp_path / "out.safetensors"])
    codes: dict[str, list[int]] = {}
    for path, (code, text) in zip(changed, run_many(checked, cases), strict=True):
        codes.setdefault(path.name.rstrip("0123456789"), []).append(code)
        assert code in (0, 1) and text.count("\n") == code, (path, text)
        if path.name == "manifest.json" and code == 0:  # a blank that was changed into another
            assert json.loads(path.read_bytes()) == json.loads((folder / "manifest.json").read_bytes())
    assert set(codes["weights.safetensors"]) == set(codes["predict.ts"]) == {1}


def test_manifests_of_another_form(checked: Path, folder: Path, tmp_path: Path) -> None:
    """Values that were exchanged for others, with a digest that is right: refused or without effect, and never a crash."""
    draw = random.Random(1)
    given = tmp_path / "data.safetensors"
    save_file(named(adaptrt.load(folder), "predict", query=inputs()), given)
    others = [None, True, -1, 0, 1 << 62, 10**25, 0.5, "", "../x", [], {}, [[]], [1 << 40] * 70]
    cases: list[list[Path | str]] = []
    for number in range(300):
        fields = json.loads((folder / "manifest.json").read_text())
        at: Any = fields
        if draw.random() < 0.8:
            at = draw.choice([program for program in fields["programs"] if program["name"] == "predict"])
        while True:
            key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.15:
                break
            at = at[key]
        at[key] = draw.choice(others)
        copy = shutil.copytree(folder, tmp_path / f"net{number}")
        rewrite(copy, fields)
        cases.append([copy, "predict", given, tmp_path / "out.safetensors"])
    found = run_many(checked, cases)
    for case, (code, text) in zip(cases, found, strict=True):
        assert code in (0, 1) and text.count("\n") == code, (case, text)
    assert {code for code, _ in found} == {0, 1}
