"""``nabla-fast bench``: benchmarks that check their results before they print a time."""

from __future__ import annotations

import argparse
import json

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nabla_fast.cli.bench_decode import add_parser as add_decode_parser
from nabla_fast.cli.options import add_json_option, add_threads_option, check_device, set_threads
from nabla_fast.cli.output import table_console
from nabla_fast.errors import InputError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("bench", help="measure kernels and decoding on this machine")
    parts = parser.add_subparsers(dest="part", required=True, metavar="part")
    kernels = parts.add_parser("kernels", help="ops beside plain PyTorch and torch.compile")
    kernels.add_argument(
        "--backend",
        choices=("torch", "cpu", "triton", "cuda"),
        default="cpu",
        help="the ops' backend that is measured",
    )
    kernels.add_argument(
        "--device",
        help="torch device (default: cpu for the cpu backend, else cuda if there is one)",
    )
    kernels.add_argument(
        "--op", nargs="+", metavar="NAME", help="only ops with one of these in their name (default: all)"
    )
    add_threads_option(kernels)
    kernels.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="time spent on measuring a row"
    )
    kernels.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure torch.compile too",
    )
    add_json_option(kernels)
    kernels.set_defaults(run=run_kernels)
    add_decode_parser(parts)


def run_kernels(arguments: argparse.Namespace) -> int:
    import torch

    from nabla_fast.bench.kernel_cases import cases
    from nabla_fast.bench.kernels import chosen, run
    from nabla_fast.bench.machine import measure_machine
    from nabla_fast.env import report
    from nabla_fast.ops import use_backend

    if not arguments.seconds > 0:
        raise InputError(f"--seconds must be positive, got {arguments.seconds:g}")
    set_threads(arguments.threads)
    found = "cuda" if arguments.backend != "cpu" and torch.cuda.is_available() else "cpu"
    device = torch.device(check_device(arguments.device or found))
    wanted = chosen(cases(device), arguments.op)
    progress = Console(stderr=True)
    rows: list[dict] = []

    def on_row(row: dict) -> None:
        rows.append(row)
        said = row["check"] + (f" ({row['error']})" if "error" in row else "")
        progress.print(
            f"{row['op']} {row['shape']} {row['dtype']}: {said}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    interrupted, machine = False, None
    options = {"compiled": arguments.compile, "seconds": arguments.seconds, "on_row": on_row}
    try:
        with use_backend(arguments.backend, "torch"):  # refused before anything is measured
            machine = measure_machine(device)
        if machine.why:
            progress.print(f"limits are torch's own rates: {machine.why}", highlight=False, markup=False)
        run(wanted, arguments.backend, device, machine, **options)
    except KeyboardInterrupt:
        interrupted = True
    limits = machine.to_json() if machine else None
    if arguments.json:
        document = {"rows": rows, "machine": limits, "interrupted": interrupted, "environment": report()}
        print(json.dumps(document))
    else:
        _show(rows, limits)
    if interrupted:
        raise KeyboardInterrupt("interrupted: the rows are those that were finished")
    return int(any(row["check"] != "passed" for row in rows))


def _show(rows: list[dict], machine: dict | None) -> None:
    table = Table(title="milliseconds, medians", box=SIMPLE, padding=(0, 1, 0, 0))
    console = table_console()
    names = ["ours", "eager", "naive", "compile", "limit", "of limit", "peak MB", "naive MB", "error"]
    shown = names if console.width >= 140 else ["ours", "eager", "compile", "of limit"]
    table.add_column("op", overflow="fold")
    for name in ("shape", "dtype"):
        table.add_column(name, overflow="fold", min_width=8)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        identity = [row["op"], row["shape"], row["dtype"]]
        error = "" if row["max_error"] is None else f"{row['max_error']:.1e}"
        if row["check"] != "passed":
            said = "check failed" if row["check"] == "failed" else row["check"]
            table.add_row(*identity, said, *[""] * (len(shown) - 2), error if "error" in shown else "")
            continue
        times = [
            _number(row[key]) for key in ("median_ms", "eager_ms", "naive_ms", "compile_ms", "limit_ms")
        ]
        peaks = [_number(row[key], 1e-6) for key in ("peak_bytes", "naive_peak_bytes")]
        share = f"{row['limit_ms'] / row['median_ms']:.0%}"
        values = dict(zip(names, [*times, share, *peaks, error], strict=True))
        table.add_row(*identity, *(values[name] for name in shown))
    console.print(table)
    explained = (
        "eager: PyTorch written well, in place; naive: the plain expression; compile: torch.compile of it"
    )
    console.print(explained, style="dim", highlight=False)
    if machine:
        rates = {
            key.removesuffix("_per_s"): rate for key, rate in machine.items() if key.endswith("_per_s")
        }
        said = ", ".join(f"{key.replace('_', ' ')} {rate / 1e9:.4g}" for key, rate in rates.items() if rate)
        console.print(f"limits, GB/s and GFLOP/s: {said}", style="dim", highlight=False)


def _number(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else f"{scale * value:.4g}"
