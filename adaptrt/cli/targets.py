"""What commands share: finding what the user names as `module:factory`, and one line for each error."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer

from adaptrt.errors import AdaptrtError
from adaptrt.runtime.unroll import CompiledUnroll

USAGE_ERROR = 2
INTERRUPTED = 130


def build(target: str) -> tuple[CompiledUnroll, Any, Any]:
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
        fail(f"{target}() raised {type(error).__name__}: {_first_line(error)}")
    if not isinstance(built, tuple) or len(built) not in (2, 3) or not isinstance(built[0], CompiledUnroll):
        got = f"a tuple of {', '.join(type(part).__name__ for part in built)}" if isinstance(built, tuple) else type(built).__name__
        fail(f"{target}() must return (unroll, support, query) or (unroll, support), unroll from adaptrt.compile_unroll; got {got}")
    return built[0], built[1], built[2] if len(built) == 3 else None


def _find(target: str) -> Callable[[], object]:
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        fail(f"{target!r} is not of the form module:factory, for example examples.sine:build")
    # The user's module is most often in the working directory, which is not on the path of a console script.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            fail(f"importing {module_name} failed: {_first_line(error)}")
        fail(f"there is no module {module_name} here: run from the folder that holds it, or install it")
    except Exception as error:
        fail(f"importing {module_name} raised {type(error).__name__}: {_first_line(error)}")
    for part in path.split("."):
        if not hasattr(found, part):
            fail(f"{module_name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        fail(f"{target} is not callable: expected a function without arguments, got {type(found).__name__}")
    return found


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except AdaptrtError as error:
        fail(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        typer.echo("adaptrt: interrupted; nothing was left running", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["(no message)"])[0]


def fail(message: str) -> NoReturn:
    typer.echo(f"adaptrt: {message}", err=True)
    raise typer.Exit(USAGE_ERROR)
