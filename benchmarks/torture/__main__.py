"""What a process must bear that adaptrt does not own, for as long as one likes.

    python -m benchmarks.torture [--minutes 20] [--only NAME ...] [--name HARDWARE_DATE]

Each check runs in a process of its own for at most its share of the minutes. It ends with one line, or with an error, which is a failure. A
table of all is printed at the end, and the exit status is the number of failures. With `--name` the table is written to
`benchmarks/results/torture_NAME.md`. To add a check, add a `Check` to `CHECKS` of one of the files.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.suite.report import RESULTS, machine, table
from benchmarks.torture import interruptions, long_lives

CHECKS = (*interruptions.CHECKS, *long_lives.CHECKS)


def main() -> int:
    """Runs the checks; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS])
    parser.add_argument("--name")
    args = parser.parse_args()
    checks = [check for check in CHECKS if args.only is None or check.name in args.only]
    rows: list[list[str]] = []
    num_failed = 0
    for check in checks:
        print(f"{check.name} ...", flush=True)
        try:
            found = check.run(60 * args.minutes / len(checks))
        except Exception as error:
            num_failed += 1
            print(error)
            found = f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        rows.append([check.name, check.what, found])
    text = table(["check", "what happens", "found"], rows)
    print(text)
    if args.name:
        command = " ".join(["python -m benchmarks.torture", *sys.argv[1:]])
        path = RESULTS / f"torture_{args.name}.md"
        path.write_text(f"# What a process must bear\n\n`{command}`\n\n{machine()}\n\n{text}\n")
    return num_failed


if __name__ == "__main__":
    sys.exit(main())
