"""``python -m tools.compile_check.model``: predicted shares of the limit on an H200, without one.

Compiles what each op launches and counts. ``--write`` keeps the counts and writes docs/gpu_predictions.md;
``--page`` only writes the page, from the counts that are kept; ``--check`` says whether it is stale.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from tools.compile_check.model import document, predictions


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_check.model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--families", nargs="+", choices=predictions.FAMILIES, default=predictions.FAMILIES)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--cache", help="keep what is compiled in this directory")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="keep the counts of these families, and the page")
    how.add_argument("--page", action="store_true", help="write the page from the counts that are kept")
    how.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    arguments = parser.parse_args(argv)

    if not arguments.page and not arguments.check:
        made = predictions.make(arguments.families, arguments.workers, arguments.cache)
        print(document.shares_table(made, []))
        if not arguments.write:
            return 0
        if set(arguments.families) != set(predictions.FAMILIES):
            kept = predictions.load(predictions.NOW)[1]
            made += [one for one in kept if one.family not in arguments.families]
            made.sort(key=lambda one: predictions.FAMILIES.index(one.family))
        predictions.store(made, predictions.NOW, f"Triton {importlib.metadata.version('triton')}")
    new = document.written()
    stale = new != document.PAGE.read_text()
    if arguments.check:
        if stale:
            print("docs/gpu_predictions.md is stale: run it with --page", file=sys.stderr)
        return int(stale)
    document.PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
