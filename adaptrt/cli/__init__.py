"""The command line: `adaptrt demo`, `inspect module:factory`, `export module:factory`, `serve` and `key`.

After a wrong input, the command prints one line on standard error and ends with exit code 2. After Ctrl-C, it prints one line and ends with
exit code 130. Neither prints a traceback.
"""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Annotated

import typer

from adaptrt.cli.serve import key, serve
from adaptrt.cli.targets import build, fail, one_line_errors

app = typer.Typer(
    help="A model, an optimiser and a number of steps, compiled into one differentiable program.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        fail(f"--out {out}: the folder {out.absolute().parent} does not exist")
    with one_line_errors():
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
    with one_line_errors():
        unroll, support, query = build(target)
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
    with one_line_errors():
        unroll, support, query = build(target)
        if query is None:
            fail(f"{target}() must return (unroll, support, query) for export: the programs are for these shapes")
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


app.command()(serve)
app.command()(key)
