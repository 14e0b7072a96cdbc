"""Try every model type of the installed transformers: ``python -m tools.families``.

Each type is decoded in a process of its own, with a time limit: as a language model, and its sequence
classifier as a reward model. What was found is a line of JSON in ``--results``: a sweep that was broken off
goes on where it was, and one with another release of transformers begins anew. At its end it writes
``docs/models.md``; a type that is wrong makes it fail.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from tools.families.building import TYPES
from tools.families.document import document, wrong
from tools.families.processes import attempt, fork_server

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "families.jsonl"
PAGE = ROOT / "docs" / "models.md"


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What a file of results holds, by task and type; the last line of a type counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(found["task"], found["kind"]): found for found in map(json.loads, lines)}


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep; 1 where a type is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--tasks", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--types", nargs="+", help="try these again, and no others")
    parser.add_argument("--seconds", type=float, default=150, help="of a type, at most")
    options = parser.parse_args(arguments)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    found = {
        key: trial
        for key, trial in read(options.results).items()
        if key[1] in TYPES[key[0]] and trial["transformers"] == versions["transformers"]
    }
    every = [(task, kind) for task in options.tasks for kind in TYPES[task]]
    wanted = [key for key in every if (key[1] in options.types if options.types else key not in found)]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    context = fork_server()
    for number, (task, kind) in enumerate(wanted, 1):
        trial = found[task, kind] = attempt(context, kind, task, options.seconds) | versions
        with options.results.open("a") as file:
            file.write(json.dumps(trial) + "\n")
        print(f"{number}/{len(wanted)} {task} {kind}: {trial['stage']}", file=sys.stderr, flush=True)
    lines = [json.dumps(found[key]) + "\n" for key in sorted(found)]
    options.results.write_text("".join(lines))
    options.page.write_text(document(list(found.values())))
    for trial in filter(wrong, found.values()):
        print(f"{trial['kind']} is wrong: {json.dumps(trial)}", file=sys.stderr)
    return int(any(map(wrong, found.values())))


if __name__ == "__main__":
    sys.exit(main())
