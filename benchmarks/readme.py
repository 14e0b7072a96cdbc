"""Write the figures of the documents from committed results: ``python -m benchmarks.readme [--check]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nabla_fast.demo.show import TITLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(results: dict[str, Any]) -> str:
    """A Markdown table of the demo's JSON, with the machine it came from."""
    environment = results["environment"]
    rows = [
        "| method | accuracy (95% interval) | rollouts | LM token passes | RM token passes | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in results["methods"].items():
        low, high = entry["ci95"]
        passes = entry["token_passes"]
        rows.append(
            f"| {TITLES[name]} | {entry['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {entry['rollouts']:,} "
            f"| {passes['lm']:,} | {passes['rm']:,} | {entry['seconds']:.1f} |"
        )
    rows.append("")
    rows.append(
        f"{results['problems']} held-out problems, seed {results['seed']}; {environment['cpu']['name']}, "
        f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}, "
        f"torch {environment['versions']['torch']}."
    )
    return "\n".join(rows)


DOCUMENTS = {
    ROOT / "README.md": RESULTS / "cpu" / "demo.json",
    ROOT / "nabla_fast" / "assets" / "README.md": RESULTS / "cpu" / "demo_500.json",
}


def updated(document: Path, results: Path) -> str:
    """The document's text with the table between its markers made anew."""
    text = document.read_text()
    begin, end = "<!-- demo:begin -->", "<!-- demo:end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{document}: no {begin} … {end}")
    return f"{head}{begin}\n{demo_table(json.loads(results.read_text()))}\n{end}{tail}"


def main() -> int:
    """Rewrite the documents; with --check only say which are stale, and exit 1 if any is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [d for d, results in DOCUMENTS.items() if updated(d, results) != d.read_text()]
    for document in stale:
        if check:
            name = document.relative_to(ROOT)
            print(f"{name} is stale: run python -m benchmarks.readme", file=sys.stderr)
        else:
            document.write_text(updated(document, DOCUMENTS[document]))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
