"""The command line: `adaptrt demo`, `adaptrt inspect module:factory` and `adaptrt export module:factory`.

After a wrong input, the command prints one line on standard error and ends with exit code 2. After Ctrl-C, it prints one line and ends with
exit code 130. Neither prints a traceback.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from adaptrt.errors import AdaptrtError
from adaptrt.runtime.unroll import CompiledUnroll

app = typer.Typer(
    help="A model, an optimiser and a number of steps, compiled into one differentiable program.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

USAGE_ERROR = 2
INTERRUPTED = 130


class BackendChoice(enum.StrEnum):
    """Names of backends, as the command line spells them."""

    AUTO = "auto"
    EAGER = "eager"
    INDUCTOR = "inductor"


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(min=0.1, help="Wall-clock limit for the whole run, compilation included.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Where the figure goes.", dir_okay=False)] = Path("adaptrt-demo.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seeds the model and every episode.")] = 0,
    backend: Annotated[
        BackendChoice, typer.Option(help="What runs the programs; auto compiles where a C++ compiler is found.")
    ] = BackendChoice.AUTO,
    episodes: Annotated[int, typer.Option(min=2, help="Unseen episodes to evaluate on.")] = 200,
) -> None:
    """Meta-train a few-shot classifier of real handwriting, and adapt it to classes it has never seen."""
    if not out.absolute().parent.is_dir():
        _fail(f"--out {out}: the folder {out.absolute().parent} does not exist")
    with _one_line_errors():
        # Imported here because scikit-learn and matplotlib come with an extra, which `inspect` does not need.
        from adaptrt.demo.run import run

        run(minutes=minutes, out=out, seed=seed, backend=backend.value, num_episodes=episodes)


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="factory() returns (unroll, support, query) or (unroll, support).")
    ],
) -> None:
    """Print the graphs, the signatures and the explanation of a compiled unroll."""
    with _one_line_errors():
        unroll, support, query = _build(target)
        unroll.warmup(support, query)
        for name, graph in unroll.graphs().items():
            typer.echo(f"{name}: {graph}\n\nsignature of {name}\n{graph.signature}\n")
        typer.echo(str(unroll.explain()))


class FormatChoice(enum.StrEnum):
    """Names of formats, as the command line spells them."""

    PT2 = "pt2"
    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    EXPORTED_PROGRAM = "exported_program"


@app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="factory() returns (unroll, support, query).")],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("adaptrt-export"),
    formats: Annotated[list[FormatChoice], typer.Option("--format", help="Give it several times for several formats.")] = [  # noqa: B006
        FormatChoice.PT2
    ],
    weights: Annotated[bool, typer.Option(help="Write the present weights, too.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it can be exported, and write nothing.")] = False,
) -> None:
    """Write the whole adaptation as files, which run without Python or without PyTorch."""
    names = [choice.value for choice in formats]
    with _one_line_errors():
        unroll, support, query = _build(target)
        if query is None:
            _fail(f"{target}() must return (unroll, support, query) for export: the programs are for these shapes")
        inputs = query[0] if isinstance(query, tuple | list) else query
        if check:
            unroll.check_export(support, inputs, formats=names)
            typer.echo(f"{target} can be exported as {', '.join(names)}")
            return
        began = time.perf_counter()

        def progress(stage: str) -> None:
            typer.echo(f"{time.perf_counter() - began:6.1f} s  {stage}")

        folder = unroll.export(out, support, inputs, formats=names, weights=weights, overwrite=overwrite, progress=progress)
        size = sum(path.stat().st_size for path in folder.iterdir())
        typer.echo(f"{time.perf_counter() - began:6.1f} s  wrote {folder}, {size / 1e6:.1f} MB")


def _build(target: str) -> tuple[CompiledUnroll, Any, Any]:
    """Calls the user's factory.

    Returns:
      The unroll, the support batch and the query batch, which is None if the factory returns none.
    """
    factory = _find(target)
    try:
        built: object = factory()
    except AdaptrtError:
        raise
    except Exception as error:
        _fail(f"{target}() raised {type(error).__name__}: {_first_line(error)}")
    if not isinstance(built, tuple) or len(built) not in (2, 3) or not isinstance(built[0], CompiledUnroll):
        got = f"a tuple of {', '.join(type(part).__name__ for part in built)}" if isinstance(built, tuple) else type(built).__name__
        _fail(f"{target}() must return (unroll, support, query) or (unroll, support), unroll from adaptrt.compile_unroll; got {got}")
    return built[0], built[1], built[2] if len(built) == 3 else None


def _find(target: str) -> Callable[[], object]:
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        _fail(f"{target!r} is not of the form module:factory, for example examples.sine:build")
    # The user's module is most often in the working directory, which is not on the path of a console script.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            _fail(f"importing {module_name} failed: {_first_line(error)}")
        _fail(f"there is no module {module_name} here: run from the folder that holds it, or install it")
    except Exception as error:
        _fail(f"importing {module_name} raised {type(error).__name__}: {_first_line(error)}")
    for part in path.split("."):
        if not hasattr(found, part):
            _fail(f"{module_name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        _fail(f"{target} is not callable: expected a function without arguments, got {type(found).__name__}")
    return found


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except AdaptrtError as error:
        _fail(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        typer.echo("adaptrt: interrupted; nothing was left running", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["(no message)"])[0]


def _fail(message: str) -> NoReturn:
    typer.echo(f"adaptrt: {message}", err=True)
    raise typer.Exit(USAGE_ERROR)
