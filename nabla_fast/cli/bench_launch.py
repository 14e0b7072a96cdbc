"""``nabla-fast bench launch``: what a call of an op costs on the CPU before its kernels run."""

from __future__ import annotations

import argparse
import json

from nabla_fast.cli.options import add_json_option, check_device
from nabla_fast.cli.output import table_console
from nabla_fast.errors import InputError


def add_parser(parts: argparse._SubParsersAction) -> None:
    parser = parts.add_parser("launch", help="what a call costs on the CPU before its kernels run")
    parser.add_argument(
        "--op", nargs="+", metavar="NAME", help="only ops with one of these in their name (default: all)"
    )
    parser.add_argument(
        "--device",
        help="torch device; on the CPU the Triton backend is measured with a driver that launches nothing "
        "(default: cuda if there is one, else cpu)",
    )
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="time spent on a call")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from nabla_fast.bench.launch import run as measure
    from nabla_fast.env import report

    if not arguments.seconds > 0:
        raise InputError(f"--seconds must be positive, got {arguments.seconds:g}")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(check_device(arguments.device or found))
    torch.set_num_threads(1)  # a call by itself: nothing here is worth sharing
    progress = Console(stderr=True)

    def on_row(row: dict) -> None:
        said = f"{row['op']} ({row['backend']}): {row['microseconds']:.1f} µs"
        progress.print(said, highlight=False, markup=False, soft_wrap=True)

    rows = measure(device, arguments.op, seconds=arguments.seconds, on_row=on_row)
    document = {
        "rows": rows,
        "driver": "real" if device.type == "cuda" else "stubbed",
        "environment": report(),
    }
    if arguments.json:
        print(json.dumps(document))
    else:
        _show(document)
    return 0


def _show(document: dict) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title="microseconds, medians", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("op", "shape", "backend"):
        table.add_column(name, overflow="fold")
    for name in ("a call", "launches", "products", "torch's calls"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in document["rows"]:
        counts = (row[key] for key in ("launches", "products", "torch_calls"))
        shown = ("" if count is None else str(count) for count in counts)
        table.add_row(row["op"], row["shape"], row["backend"], f"{row['microseconds']:.1f}", *shown)
    console = table_console()
    console.print(table)
    if document["driver"] == "stubbed":
        explained = "triton: with a driver that launches nothing and products that are not computed"
        console.print(explained, style="dim", highlight=False)
