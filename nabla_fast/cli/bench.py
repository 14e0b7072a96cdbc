"""``nabla-fast bench``: benchmarks that check their results before they print a time."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from nabla_fast.cli import bench_decode
from nabla_fast.cli.options import check_device, set_threads


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
    bench_decode.add_parser(parts)


def run_kernels(arguments: argparse.Namespace) -> int:
    import torch

    from nabla_fast.bench.kernels import run
    from nabla_fast.env import report

    set_threads(arguments.threads)
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
