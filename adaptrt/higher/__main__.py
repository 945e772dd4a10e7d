"""Runs a program whose `import higher` imports `adaptrt.higher`: `python -m adaptrt.higher script.py ...`, or `-m module ...`.

The program runs as under `python` itself: with its own `sys.argv`, with its folder first in `sys.path`, and as `__main__`.
"""

from __future__ import annotations

import os
import runpy
import sys

from adaptrt.higher.install import install

_USAGE = """usage: python -m adaptrt.higher script.py [argument ...]
       python -m adaptrt.higher -m module [argument ...]

Runs a program in which `import higher` imports adaptrt.higher."""


def main(arguments: list[str]) -> None:
    """Runs the program that the command line names.

    Args:
      arguments: the command line without the interpreter's part.
    Raises:
      SystemExit: help is asked for, no program is named, or the script does not exist.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return
    is_module = arguments[:1] == ["-m"]
    program = arguments[1:] if is_module else arguments
    if not program or program[0].startswith("-"):
        print(_USAGE, file=sys.stderr)
        raise SystemExit(2)
    if not is_module and not os.path.exists(program[0]):
        print(f"python -m adaptrt.higher: can't open file {program[0]!r}: it does not exist", file=sys.stderr)
        raise SystemExit(2)
    install()
    sys.argv[:] = program
    if is_module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path:  # else Python put no folder there that could be replaced
        sys.path[0] = os.path.dirname(os.path.abspath(os.path.realpath(program[0])))
    runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
