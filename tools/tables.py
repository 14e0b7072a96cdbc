"""Write the tables of the documents: ``python -m tools.tables [--check]``.

Figures come from committed results, the table of backends from the ops themselves. Each stands between
the markers ``<!-- name:begin -->`` and ``<!-- name:end -->`` of a document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_fast.bench.decode_tables import tables
from nabla_fast.demo.show import TITLES, beside_best_of_n
from nabla_fast.ops.registry import BACKENDS, all_ops
from tools.markers import replaced

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DECODE, DEMO, DEMO_500 = (RESULTS / "cpu" / f"{name}.json" for name in ("decode", "demo", "demo_500"))
SHAPE = RESULTS / "cpu" / "shape.json"
LAUNCH = RESULTS / "cpu" / "launch.json"
GPU_KERNELS = RESULTS / "gpu" / "kernels.json"
# A folder for each kind of CPU.
KERNELS = tuple(sorted(path for path in RESULTS.glob("*/kernels.json") if path != GPU_KERNELS))
NO_FIGURES = "There are no figures of this release yet."

# The demo's methods, for a reader who has not met them.
_METHODS = {
    "greedy": "greedy decoding",
    "self_consistency": "self-consistency: the most frequent of 8 samples",
    "best_of_n": "Best-of-8: the sample that the reward model likes best",
    "nabla": "nabla_fast, at most 8 rollouts",
    "nabla_sequential": 'the same answers by `loop="sequential"`',
}


def summary_table(demo: dict[str, Any], decode: dict[str, Any]) -> str:
    """The README's table: accuracy and cost of the demo's methods, and the decode benchmark in a line."""
    rows = [
        "| method | problems solved (95% interval) | rollouts | tokens through the models | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, entry in demo["methods"].items():
        low, high = entry["ci95"]
        rows.append(
            f"| {_METHODS[name]} | {entry['accuracy']:.0%} ({low:.0%} to {high:.0%}) "
            f"| {entry['rollouts']:,} | {sum(entry['token_passes'].values()):,} | {_seconds(entry)} |"
        )
    speedups = [entry["speedup"] for entry in decode["cases"]]
    cost = [f"{_range(decode, lambda e: e['passes_to_best_of_n']['fast'])} times Best-of-N's token passes"]
    if all("seconds_to_best_of_n" in entry for entry in decode["cases"]):
        cost.append(f"{_range(decode, lambda e: e['seconds_to_best_of_n'])} times its time")
    return "\n".join(
        [
            *rows,
            "",
            f"{demo['problems']} held-out problems, seed {demo['seed']}; {_machine(demo['environment'])}."
            f"{_not_measured(demo)} Over the {len(speedups)} workloads of the decode benchmark the batched "
            f"loop is {min(speedups):.1f} to {max(speedups):.1f} times as fast as the sequential one "
            f"(median {decode['median_speedup']:.1f}) and takes {' and '.join(cost)} at equal rollouts.",
        ]
    )


def _seconds(entry: dict[str, Any]) -> str:
    """A dash where the results have no time: of a method that has changed since."""
    return "–" if entry["seconds"] is None else f"{entry['seconds']:.1f}"


def _not_measured(demo: dict[str, Any]) -> str:
    missing = any(entry["seconds"] is None for entry in demo["methods"].values())
    return " A dash: its time has not been measured since the method changed." if missing else ""


def _range(decode: dict[str, Any], value: Callable[[dict[str, Any]], float]) -> str:
    values = [value(entry) for entry in decode["cases"]]
    return f"{min(values):.1f} to {max(values):.1f}"


def backends_table() -> str:
    """A Markdown table of the ops and the backends registered on each."""
    rows = [f"| op | {' | '.join(f'`{name}`' for name in BACKENDS)} |", "|---|" + "---|" * len(BACKENDS)]
    for op in sorted(all_ops().values(), key=lambda op: op.name):
        cells = ("yes" if name in op.backends() else "–" for name in BACKENDS)
        rows.append(f"| `{op.name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


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
            f"| {passes['lm']:,} | {passes['rm']:,} | {_seconds(entry)} |"
        )
    cost = beside_best_of_n(results["methods"])
    rows.append("")
    rows.append(
        f"{results['problems']} held-out problems, seed {results['seed']}; {_machine(environment)}."
        + ("" if cost is None else f" {cost}.")
        + _not_measured(results)
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


def shape_tables(results: dict[str, Any]) -> str:
    """Markdown tables of the decode benchmark's cases of a checkpoint's shape, with their machine."""
    parts = [table.markdown() for table in tables(results)]
    return "\n\n".join([*parts, f"{_machine(results['environment'])}."])


def launch_table(results: dict[str, Any]) -> str:
    """A Markdown table of the launch benchmark's JSON, with the machine it came from."""
    counted = ("launches", "products", "torch_calls")
    titles = ("op", "inputs", "backend", "µs a call", "kernels", "products", "torch's calls")
    rows = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        counts = ("–" if row[key] is None else str(row[key]) for key in counted)
        cells = (row["op"], row["shape"], row["backend"], f"{row['microseconds']:.1f}", *counts)
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", f"Medians; {_machine(results['environment'])}."]
    return "\n".join(rows)


def cpu_kernels_tables(*results: dict[str, Any]) -> str:
    """Markdown tables of the kernel benchmark's JSON of CPUs, one for each level of instruction sets.

    Raises:
        SystemExit: a run was interrupted, or a check did not pass.
    """
    parts = []
    for whole in results:
        levels = whole["levels"] if "levels" in whole else {whole["environment"]["isa"]: whole}
        for level, one in levels.items():
            rows = [row for row in whole["rows"] if row["isa"] == level]
            cpu = one["environment"]["cpu"]
            # Virtual machines call different CPUs alike.
            parts.append(f"**{cpu['name']} with {', '.join(cpu['flags'])}, level `{level}`**")
            parts.append(kernels_table({**one, "rows": rows}, explained=not parts[1:]))
    return "\n\n".join(parts) or NO_FIGURES


def kernels_table(results: dict[str, Any], explained: bool = True) -> str:
    """A Markdown table of the kernel benchmark's JSON, with the machine it came from and its limits.

    Raises:
        SystemExit: the run was interrupted, or a check did not pass.
    """
    whole = not results["interrupted"] and all(row["check"] == "passed" for row in results["rows"])
    if not whole:
        raise SystemExit("the kernel benchmark's results are of a run that was interrupted or that failed")
    rows = [
        "| op | shape | dtype | ours, ms | PyTorch in place ÷ ours | PyTorch as one would write it ÷ ours "
        "| torch.compile ÷ ours | share of the machine's limit | extra memory (share of PyTorch's) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [f"| {' | '.join(_kernel_cells(row))} |" for row in results["rows"]]
    machine, environment = results["machine"], results["environment"]
    names = {
        "read": "GB/s",
        "copy": "GB/s",
        "multiply_add": "GFLOP/s",
        "dot_product": "GFLOP/s",
        "tile_product": "GFLOP/s",
        "bfloat16_matmul": "GFLOP/s",
    }
    limits = ", ".join(
        f"{name.replace('_', ' ')} {machine[f'{name}_per_s'] / 1e9:,.0f} {unit}"
        for name, unit in names.items()
        if machine.get(f"{name}_per_s")
    )
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"])
    where = f"{gpus}, torch {environment['versions']['torch']}" if gpus else _machine(environment)
    if said := environment.get("torch_isa"):
        where += f" limited to {said['aten']}; oneDNN: {said['onednn']}; MKL: {said['mkl']}"
    explanation = [
        "",
        "Medians of one interleaved run with cold caches; each result was checked against float64 "
        "first. Ratios say how many times our time the others take: PyTorch as one would write it, "
        "the same written with care, in place in memory that is there, and torch.compile of the "
        "former. The limit is the time that the op's bytes or products need, whichever is longer at the "
        "rates below; the rate itself is measured anew in turn with each row's versions. Extra memory is "
        "the peak beyond inputs and results.",
    ]
    said = [*(explanation if explained else []), "", f"{where}; limits measured in the same run: {limits}."]
    return "\n".join([*rows, *said])


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
    """A table of a document, and its sources.

    Attributes:
        name: name in the markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.
        text: function from the contents of the results to Markdown.
        results: JSON files.
        missing: text in the table's place as long as a file is not there.
    """

    name: str
    text: Callable[..., str]
    results: tuple[Path, ...] = ()
    missing: str = NO_FIGURES

    def made(self) -> str:
        """The Markdown between the markers."""
        if not all(path.exists() for path in self.results):
            return self.missing
        return self.text(*(json.loads(path.read_text()) for path in self.results))


DOCUMENTS = {
    ROOT / "README.md": [Section("results", summary_table, (DEMO, DECODE))],
    ROOT / "docs" / "backends.md": [Section("backends", backends_table)],
    ROOT / "docs" / "benchmarks.md": [
        Section("demo", demo_table, (DEMO,)),
        Section("decode", decode_tables, (DECODE,)),
        Section("kernels", cpu_kernels_tables, KERNELS),
        Section("shape", shape_tables, (SHAPE,)),
        Section("launch", launch_table, (LAUNCH,)),
        Section("gpu-kernels", kernels_table, (GPU_KERNELS,), "The GPU kernels are unmeasured."),
    ],
    ROOT / "nabla_fast" / "assets" / "README.md": [Section("demo", demo_table, (DEMO_500,))],
}


def updated(document: Path) -> str:
    """The document's text with what stands between its markers made anew.

    Raises:
        SystemExit: a marker is not there.
    """
    text = document.read_text()
    for section in DOCUMENTS[document]:
        try:
            text = replaced(text, section.name, section.made())
        except ValueError as error:
            raise SystemExit(f"{document}: {error}") from None
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
