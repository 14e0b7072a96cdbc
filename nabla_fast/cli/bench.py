"""``nabla-fast bench``: benchmarks that check their results before they print a time."""

from __future__ import annotations

import argparse
import json
import statistics

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nabla_fast.cli.options import check_device
from nabla_fast.errors import InputError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("bench", help="measure kernels and decoding on this machine")
    parts = parser.add_subparsers(dest="part", required=True, metavar="part")
    kernels = parts.add_parser("kernels", help="ops beside plain PyTorch and torch.compile")
    kernels.add_argument("--backend", choices=("torch", "cpu", "triton", "cuda"), default="cpu")
    kernels.add_argument(
        "--device", help="a torch device (cpu for the cpu backend, else cuda if there is one)"
    )
    kernels.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    kernels.add_argument("--seconds", type=float, default=3.0, help="measured a row (3)")
    kernels.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    kernels.add_argument("--json", action="store_true", help="print one JSON object")
    kernels.set_defaults(run=run_kernels)
    decode = parts.add_parser("decode", help="both loops beside Best-of-N with as many samples")
    decode.add_argument("--device", default="cpu", help="a torch device (cpu)")
    decode.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    decode.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each (3)")
    decode.add_argument("--json", action="store_true", help="print one JSON object")
    decode.set_defaults(run=run_decode)


def run_kernels(arguments: argparse.Namespace) -> int:
    import torch

    from nabla_fast.bench.kernels import run
    from nabla_fast.env import report

    _set_threads(arguments.threads)
    found = "cuda" if arguments.backend != "cpu" and torch.cuda.is_available() else "cpu"
    device = torch.device(check_device(arguments.device or found))
    progress = Console(stderr=True)
    rows: list[dict] = []

    def on_row(row: dict) -> None:
        rows.append(row)
        progress.print(f"{row['op']} {row['shape']} {row['dtype']}: {row['check']}", highlight=False)

    interrupted = False
    try:
        run(arguments.backend, device, compiled=arguments.compile, seconds=arguments.seconds, on_row=on_row)
    except KeyboardInterrupt:
        interrupted = True
    if arguments.json:
        print(json.dumps({"rows": rows, "interrupted": interrupted, "environment": report()}))
    else:
        Console().print(_table(rows))
    if interrupted:
        raise KeyboardInterrupt("interrupted: the rows are those that were finished")
    return int(any(row["check"] != "passed" for row in rows))


def run_decode(arguments: argparse.Namespace) -> int:
    import torch

    from nabla_fast.bench.decode import cases, measure
    from nabla_fast.env import report

    if arguments.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {arguments.repeats}")
    _set_threads(arguments.threads)
    device = torch.device(check_device(arguments.device))
    progress = Console(stderr=True)
    entries: list[dict] = []
    interrupted = False
    try:
        for case in cases(device):
            entries.append(measure(case, arguments.repeats))
            progress.print(f"{case.name}: done", highlight=False)
    except KeyboardInterrupt:
        interrupted = True
    speedups = [entry["speedup"] for entry in entries if "speedup" in entry]
    if arguments.json:
        median = statistics.median(speedups) if speedups else None
        summary = {"cases": entries, "median_speedup": median, "interrupted": interrupted}
        print(json.dumps({**summary, "environment": report()}))
    else:
        Console().print(_decode_table(entries))
    if interrupted:
        raise KeyboardInterrupt("interrupted: the cases are those that were finished")
    return int(not all(entry["same_tokens"] for entry in entries))


def _decode_table(entries: list[dict]) -> Table:
    table = Table(
        title="decoding", caption="seconds are medians; passes are those of both models", box=SIMPLE
    )
    for name in ("case", "tokens", "generations"):
        table.add_column(name)
    for name in ("sequential s", "batched s", "Best-of-N s", "speed-up", "passes", "batched", "Best-of-N"):
        table.add_column(name, justify="right")
    for entry in entries:
        seconds, passes = entry.get("seconds"), entry["token_passes"]
        times = [f"{seconds[key]:.2f}" for key in seconds] if seconds else ["", "", ""]
        table.add_row(
            entry["name"],
            "same" if entry["same_tokens"] else "[red]differ[/]",
            f"{entry['generations']:.1f}",
            *times,
            f"{entry['speedup']:.1f}" if seconds else "",
            *(f"{passes[key]:,}" for key in ("sequential", "fast", "best_of_n")),
        )
    return table


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _table(rows: list[dict]) -> Table:
    table = Table(title="milliseconds, medians")
    for name in ("op", "shape", "dtype", "backend"):
        table.add_column(name)
    for name in ("ours", "naive", "compile", "limit", "of limit", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        identity = [row[key] for key in ("op", "shape", "dtype", "backend")]
        if row["check"] != "passed":
            table.add_row(*identity, "check failed", "", "", "", "", f"{row['max_error']:.1e}")
            continue
        compiled = "" if row["compile_ms"] is None else f"{row['compile_ms']:.3f}"
        table.add_row(
            *identity,
            f"{row['median_ms']:.3f}",
            f"{row['naive_ms']:.3f}",
            compiled,
            f"{row['limit_ms']:.3f}",
            f"{row['limit_ms'] / row['median_ms']:.0%}",
            f"{row['max_error']:.1e}",
        )
    return table
