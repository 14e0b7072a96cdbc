"""Write the figures of the documents from committed results: ``python -m tools.tables [--check]``."""

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


def kernels_table(results: dict[str, Any]) -> str:
    """A Markdown table of the kernel benchmark's JSON, with the machine it came from and its limits.

    Raises:
        SystemExit: the run was interrupted, or a check did not pass.
    """
    whole = not results["interrupted"] and all(row["check"] == "passed" for row in results["rows"])
    if not whole:
        raise SystemExit("the kernel benchmark's results are of a run that was interrupted or that failed")
    rows = [
        "| op | shape | dtype | ms | eager | naive | compile | of the limit | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [f"| {' | '.join(_kernel_cells(row))} |" for row in results["rows"]]
    machine, environment = results["machine"], results["environment"]
    names = {"read": "GB/s", "copy": "GB/s", "multiply_add": "GFLOP/s", "bfloat16_matmul": "GFLOP/s"}
    limits = ", ".join(
        f"{name.replace('_', ' ')} {machine[f'{name}_per_s'] / 1e9:,.4g} {unit}"
        for name, unit in names.items()
        if machine[f"{name}_per_s"]
    )
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"])
    where = f"{gpus}, torch {environment['versions']['torch']}" if gpus else _machine(environment)
    return "\n".join(
        [
            *rows,
            "",
            "Medians of one interleaved run with cold caches, each result checked against float64 first. "
            "Eager, naive, compile: how many times ours they take. Naive is the straightforward "
            "expression, eager PyTorch in place in memory that is there, compile torch.compile of naive. "
            "Memory: the peak beyond inputs and results, and its share of naive's.",
            "",
            f"{where}; limits measured in the same run: {limits}.",
        ]
    )


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    ours = row["median_ms"]
    others = [row[f"{name}_ms"] for name in ("eager", "naive", "compile")]
    times = ["–" if other is None else f"{_short(other / ours)}×" for other in others]
    share = f"{row['limit_ms'] / ours:.0%} ({row['limit']})"
    peak, naive = row["peak_bytes"], row["naive_peak_bytes"]
    memory = "–" if peak is None else f"{peak / 1e6:.1f} MB"
    if naive:
        memory += f" ({peak / naive:.0%})"
    op = row["op"] if row["backend"] != "torch" else f"{row['op']} (plain PyTorch)"
    return [
        op,
        row["shape"],
        row["dtype"],
        f"{ours:.3g}" if ours < 1 else f"{ours:.2f}",
        *times,
        share,
        memory,
    ]


def _short(times: float) -> str:
    return f"{times:.1f}" if times < 9.95 else f"{times:.0f}"


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
KERNELS = Section(
    "kernels",
    RESULTS / "cpu" / "kernels.json",
    kernels_table,
    missing="There are no figures of this release yet.",
)
GPU_KERNELS = Section(
    "gpu-kernels",
    RESULTS / "gpu" / "kernels.json",
    kernels_table,
    missing="The GPU kernels are unmeasured.",
)
DOCUMENTS = {
    ROOT / "README.md": [
        Section("demo", RESULTS / "cpu" / "demo.json", demo_table),
        _DECODE,
        KERNELS,
        GPU_KERNELS,
    ],
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
            print(f"{name} is stale: run python -m tools.tables", file=sys.stderr)
        else:
            document.write_text(new)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
