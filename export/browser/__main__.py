"""Meta-trains the network, builds the page and serves it: what `make browser` runs.

    python -m export.browser [--minutes 4] [--port 8000] [--out build/browser] [--retrain] [--no-serve]

A network that was trained before is taken again as long as the code that trains it is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from pathlib import Path

import torch

import adaptrt
from adaptrt.errors import InvalidExport
from export.browser import learner
from export.browser.serve import server
from export.browser.symbols import MissingPackage

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web" / "dist"
RUNTIME_FILES = "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
SOURCES = "learner.py", "strokes.py", "symbols.py"
SEED = 0
NUM_ITERATIONS = 5000
"""Iterations at most, on a computer that has them before the time is over."""


def fingerprint() -> str:
    """A hash of the code that trains."""
    found = hashlib.sha256()
    for name in SOURCES:
        found.update((HERE / name).read_bytes())
    return found.hexdigest()


def usable(model: Path) -> bool:
    """Whether a folder is an export that is whole."""
    try:
        adaptrt.load(model)
    except InvalidExport:
        return False
    return True


def train(folder: Path, *, minutes: float, num_symbols: int, backend: str, num_iterations: int = NUM_ITERATIONS) -> Path:
    """Meta-trains, and exports into a folder, which it replaces.

    Args:
      folder: where the export goes.
      minutes: how long meta-training goes on at most. Drawing and compiling come before it and take about a minute.
      num_symbols: how many symbols to train on.
      backend: that of the unroll.
      num_iterations: iterations of meta-training at most.
    """
    began = time.monotonic()
    print(f"drawing {num_symbols} symbols {learner.NUM_DRAWINGS} times each", flush=True)
    drawings = learner.draw(num_symbols, SEED)
    print(f"compiling {learner.STEPS} steps and their meta-gradient ({time.monotonic() - began:.0f} s)", flush=True)
    model, rates, optimizer = learner.build(SEED)
    unroll = learner.compiled(model, optimizer, backend)
    support, query = drawings.task(torch.Generator().manual_seed(SEED))
    unroll.warmup(support, query)
    print(f"meta-training for {minutes:g} minutes ({time.monotonic() - began:.0f} s)", flush=True)
    shown = 0.0
    for progress in learner.meta_train(
        model, rates, unroll, drawings, seed=SEED, deadline=time.monotonic() + 60 * minutes, num_iterations=num_iterations
    ):
        if progress.done >= shown:
            print(
                f"  {100 * progress.done:3.0f}%  iteration {progress.iteration:5d}  query loss {progress.loss:.3f}  "
                f"accuracy on training symbols {100 * progress.accuracy:.1f}%",
                flush=True,
            )
            shown += 0.1
    temporary = folder.with_name(folder.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    (images, used), _, _ = query
    # Captured afresh: an export needs no compiled programs.
    learner.compiled(model, optimizer, "eager").export(temporary, support, (images[:1], used), formats="onnx")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    print(f"exported to {folder} ({time.monotonic() - began:.0f} s)", flush=True)
    return folder


def build(model: Path, site: Path) -> Path:
    """Puts the page, ONNX Runtime and the network into one folder, which it replaces.

    Raises:
      FileNotFoundError: onnxruntime-web is not installed.
    """
    if not RUNTIME.is_dir():
        raise FileNotFoundError(f"onnxruntime-web is missing: run `npm ci` in {HERE}")
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(HERE / "page", site)
    (site / "onnxruntime").mkdir()
    for name in RUNTIME_FILES:
        shutil.copy(RUNTIME / name, site / "onnxruntime" / name)
    shutil.copytree(model, site / "model", copy_function=shutil.copyfile)
    return site


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="of meta-training")
    parser.add_argument("--symbols", type=int, default=learner.NUM_SYMBOLS, help="how many symbols to train on")
    parser.add_argument("--backend", default="auto", help="of the unroll: auto, eager or inductor")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("build/browser"))
    parser.add_argument("--retrain", action="store_true", help="even if there is a network")
    parser.add_argument("--no-serve", dest="serve", action="store_false", help="build only")
    arguments = parser.parse_args()
    model, trained = arguments.out / "model", arguments.out / "trained"
    settings = f"{fingerprint()} {arguments.minutes:g} {arguments.symbols}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.retrain or not trained.exists() or trained.read_text() != settings or not usable(model):
            trained.unlink(missing_ok=True)
            train(model, minutes=arguments.minutes, num_symbols=arguments.symbols, backend=arguments.backend)
            trained.write_text(settings)
        site = build(model, arguments.out / "site")
        if arguments.serve:
            try:
                found = server(site, arguments.port)
            except OSError:
                found = server(site, 0)
                print(f"port {arguments.port} is taken, so another one is used")
            print(f"open http://127.0.0.1:{found.server_port}/ (Ctrl-C ends)", flush=True)
            found.serve_forever()
    except KeyboardInterrupt:
        print()
    except (MissingPackage, FileNotFoundError) as error:
        print(f"adaptrt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
