"""``nabla-fast bench kernels``: ops beside plain PyTorch, each level of instruction sets by itself."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nabla_fast._native.loading import ISA_NAMES
from nabla_fast.cli.options import add_json_option, add_threads_option, check_device, set_threads
from nabla_fast.cli.output import append_line, say, table_console
from nabla_fast.errors import InputError

Document = dict[str, Any]


def add_parser(parts: argparse._SubParsersAction) -> None:
    parser = parts.add_parser("kernels", help="ops beside plain PyTorch and torch.compile")
    parser.add_argument(
        "--backend",
        choices=("torch", "cpu", "triton", "cuda"),
        default="cpu",
        help="the ops' backend that is measured",
    )
    parser.add_argument(
        "--device",
        help="torch device (default: cpu for the cpu backend, else cuda if there is one)",
    )
    parser.add_argument(
        "--op", nargs="+", metavar="NAME", help="only ops with one of these in their name (default: all)"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "bfloat16"),
        help="only rows of these; torch has no fast bfloat16 products on CPUs without units for them, and "
        "takes minutes a row there (default: all)",
    )
    parser.add_argument(
        "--isa",
        choices=(*ISA_NAMES[1:], "all"),
        metavar="LEVEL",
        help="instruction set that neither the cpu backend nor torch goes beyond, in a process of its own: "
        f"{', '.join(ISA_NAMES[1:])}, or all that the CPU has, one after the other (default: no limit)",
    )
    add_threads_option(parser)
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="time spent on measuring a row"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure torch.compile too",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything work?")
    parser.add_argument("--check", action="store_true", help="check results, and time nothing")
    parser.add_argument(
        "--rows", metavar="FILE", help="append each row to this file, as a line of JSON, when it is done"
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.seconds > 0:
        raise InputError(f"--seconds must be positive, got {arguments.seconds:g}")
    if arguments.isa is None:
        document = _measured(arguments)
    else:
        from nabla_fast.bench.levels import chosen_levels, limited_here

        levels = chosen_levels(arguments.isa)
        if len(levels) == 1 and arguments.isa != "all" and limited_here(arguments.isa):
            document = _measured(arguments)
        else:
            return _run_apart(levels, arguments)
    _print(document, arguments.json)
    if document["interrupted"]:
        raise KeyboardInterrupt("interrupted: the rows are those that were finished")
    return _status(document)


def _measured(arguments: argparse.Namespace) -> Document:
    """Measure in this process."""
    import torch

    from nabla_fast.bench.kernel_cases import cases
    from nabla_fast.bench.kernels import chosen, run
    from nabla_fast.bench.levels import kernels_at, torch_isa
    from nabla_fast.bench.machine import measure_machine
    from nabla_fast.env import report
    from nabla_fast.ops import use_backend

    set_threads(arguments.threads)
    found = "cuda" if arguments.backend != "cpu" and torch.cuda.is_available() else "cpu"
    device = torch.device(check_device(arguments.device or found))
    level = arguments.isa
    if level and device.type != "cpu":
        raise InputError(f"--isa {level} is of the CPU, not of --device {device}")
    wanted = chosen(cases(device, quick=arguments.quick), arguments.op, arguments.dtype)
    progress = Console(stderr=True)
    rows: list[dict] = []

    def on_row(row: dict) -> None:
        rows.append(row)
        if arguments.rows:
            append_line(arguments.rows, row)
        said = row["check"] + (f" ({row['error']})" if "error" in row else "")
        name = f"{level}: {row['op']}" if level else row["op"]
        progress.print(
            f"{name} {row['shape']} {row['dtype']}: {said}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    interrupted, machine = False, None
    seconds = None if arguments.check else arguments.seconds
    options = {"compiled": arguments.compile and not arguments.check, "seconds": seconds}
    with kernels_at(level) if level else nullcontext():
        try:
            with use_backend(arguments.backend, "torch"):  # refused before anything is measured
                machine = None if arguments.check else measure_machine(device)
            if machine and machine.why:
                progress.print(
                    f"limits are torch's own rates: {machine.why}", highlight=False, markup=False
                )
            run(wanted, arguments.backend, device, machine, on_row=on_row, **options)
        except KeyboardInterrupt:
            interrupted = True
        environment = report()
    environment["isa"] = environment["cpu"]["kernels"] if device.type == "cpu" else None
    environment["torch_isa"] = torch_isa()
    limits = machine.to_json() if machine else None
    return {
        "rows": [{"isa": environment["isa"], **row} for row in rows],
        "machine": limits,
        "interrupted": interrupted,
        "environment": environment,
    }


# -- processes of their own --------------------------------------------------------------------------


def _run_apart(levels: list[str], arguments: argparse.Namespace) -> int:
    """Measure each level in a process of its own; one that ends early is the last."""
    from nabla_fast.env import report

    documents: dict[str, Document] = {}
    worst = 0
    for level in levels:
        status, document = _apart(level, arguments)
        worst = max(worst, status)
        if document:
            documents[level] = document
        if not document or document["interrupted"]:
            break
    if not documents:
        return worst
    if arguments.isa != "all":
        _print(documents[arguments.isa], arguments.json)
    else:
        whole = {
            "rows": [row for document in documents.values() for row in document.pop("rows")],
            "levels": documents,
            "interrupted": len(documents) < len(levels)
            or any(document["interrupted"] for document in documents.values()),
            "environment": report(),
        }
        _print(whole, arguments.json)
    return worst


def _apart(level: str, arguments: argparse.Namespace) -> tuple[int, Document | None]:
    """Exit status, and what the process printed; it has said on standard error why, if that is nothing."""
    from nabla_fast.bench.levels import environment_of

    options = ["--isa", level, "--json", "--backend", arguments.backend, f"--seconds={arguments.seconds}"]
    options.append("--compile" if arguments.compile else "--no-compile")
    for name in ("device", "threads"):
        if (value := getattr(arguments, name)) is not None:
            options.append(f"--{name}={value}")
    options += [f"--{name}" for name in ("quick", "check") if getattr(arguments, name)]
    if arguments.rows:
        options.append(f"--rows={arguments.rows}")
    if arguments.op:
        options += ["--op", *arguments.op]
    if arguments.dtype:
        options += ["--dtype", *arguments.dtype]
    with tempfile.TemporaryFile() as printed:
        # In a session of its own, Ctrl-C does not reach it: it is passed on, once.
        process = subprocess.Popen(
            [sys.executable, "-m", "nabla_fast", "bench", "kernels", *options],
            env=os.environ | environment_of(level),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            start_new_session=True,
        )
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        printed.seek(0)
        text = printed.read()
    if status < 0:
        say(f"{level}: the process that measured it was ended by signal {-status}")
        return 1, None
    return status, json.loads(text) if text else None


# -- output ------------------------------------------------------------------------------------------


def _status(document: Document) -> int:
    return int(any(row["check"] != "passed" for row in document["rows"]))


def _print(document: Document, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document))
    elif "levels" not in document:
        _show(document["rows"], document["machine"], document["environment"]["isa"])
    else:
        for level, rest in document["levels"].items():
            _show([row for row in document["rows"] if row["isa"] == level], rest["machine"], level)


def _show(rows: list[dict], machine: dict | None, isa: str | None) -> None:
    title = "milliseconds, medians" + (f"; {isa}" if isa else "")
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
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
        if row["check"] != "passed" or "median_ms" not in row:
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
