"""Write the figures of the documents from committed results: ``python -m benchmarks.readme [--check]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_fast.bench.decode_tables import tables
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
        f"{results['problems']} held-out problems, seed {results['seed']}; {_machine(environment)}."
    )
    return "\n".join(rows)


def decode_tables(results: dict[str, Any]) -> str:
    """Markdown tables of the decode benchmark's JSON, with the machine it came from.

    Raises:
        SystemExit: the JSON is of a quick or an interrupted run.
    """
    for flag in ("quick", "interrupted"):
        if results[flag]:
            raise SystemExit(f"the decode benchmark's results are of a run that was {flag}")
    median = results["median_speedup"]
    summary = [
        f"Median speed-up over the sequential loop: {median:.1f}×." if median is not None else "",
        f"Medians of {results['repeats']} runs, fewer of slow ones; {_machine(results['environment'])}.",
    ]
    return "\n\n".join([*(table.markdown() for table in tables(results)), " ".join(filter(None, summary))])


def _machine(environment: dict[str, Any]) -> str:
    threads = environment["threads"]
    return (
        f"{environment['cpu']['name']}, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {environment['versions']['torch']}"
    )


@dataclass(frozen=True)
class Section:
    """Where figures stand in a document, and what they come from.

    Attributes:
        name: of the markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.
        results: a JSON file.
        text: Markdown of it.
        missing: what stands there as long as there is no such file; None where there must be one.
    """

    name: str
    results: Path
    text: Callable[[dict[str, Any]], str]
    missing: str | None = None

    def made(self) -> str:
        """The Markdown between the markers."""
        if self.missing is not None and not self.results.exists():
            return self.missing
        return self.text(json.loads(self.results.read_text()))


_DECODE = Section(
    "decode",
    RESULTS / "cpu" / "decode.json",
    decode_tables,
    missing="There are no figures of this release yet.",
)
DOCUMENTS = {
    ROOT / "README.md": [Section("demo", RESULTS / "cpu" / "demo.json", demo_table), _DECODE],
    ROOT / "nabla_fast" / "assets" / "README.md": [
        Section("demo", RESULTS / "cpu" / "demo_500.json", demo_table)
    ],
}


def updated(document: Path) -> str:
    """The document's text with what stands between its markers made anew.

    Raises:
        SystemExit: a marker is not there.
    """
    text = document.read_text()
    for section in DOCUMENTS[document]:
        begin, end = (f"<!-- {section.name}:{edge} -->" for edge in ("begin", "end"))
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{document}: no {begin} … {end}")
        text = f"{head}{begin}\n{section.made()}\n{end}{tail}"
    return text


def main() -> int:
    """Rewrite the documents; with --check only say which are stale, and exit 1 if any is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = {document: new for document in DOCUMENTS if (new := updated(document)) != document.read_text()}
    for document, new in stale.items():
        if check:
            name = document.relative_to(ROOT)
            print(f"{name} is stale: run python -m benchmarks.readme", file=sys.stderr)
        else:
            document.write_text(new)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
