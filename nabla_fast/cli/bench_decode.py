"""``nabla-fast bench decode``: time per answer of both loops, after their tokens were compared."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nabla_fast.cli.options import add_json_option, add_threads_option, check_device, set_threads
from nabla_fast.cli.output import table_console
from nabla_fast.errors import InputError

# Parts beside the cases.
_GENERATE, _LENGTHS, _STEPS, _PREFIX, _SHAPE = "generate", "lengths", "steps", "prefix", "shape-0.5b"


def add_parser(parts: argparse._SubParsersAction) -> None:
    parser = parts.add_parser("decode", help="the loops beside Best-of-N with as many samples")
    parser.add_argument("--device", default="cpu", help="the models' torch device")
    add_threads_option(parser)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each case")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="TEXT",
        help=f"only cases with one of these texts in their name; also '{_GENERATE}' (time per token beside "
        f"transformers' generate), '{_STEPS}' (of rollouts, beside generate with a static cache), "
        f"'{_PREFIX}' (gradient passes after a frozen prefix), '{_SHAPE}' (models of a checkpoint's shape) "
        f"and '{_LENGTHS}' (of answers) (default: all)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the models' weights in all cases; in half precision tokens are compared with those of a "
        f"float32 copy of the weights, and '{_GENERATE}' is left out (default: float32, '{_SHAPE}' also "
        "bfloat16)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny cases and one run: does it work?")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from nabla_fast.bench.decode import all_same
    from nabla_fast.env import report

    if arguments.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {arguments.repeats}")
    set_threads(arguments.threads)
    device = torch.device(check_device(arguments.device))
    results: dict[str, Any] = {"cases": [], "lengths": [], "shapes": []}
    results |= dict.fromkeys((_GENERATE, _STEPS, _PREFIX))
    steps = _chosen(_steps(device, arguments, results), arguments.cases)
    interrupted = False
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(steps))
        try:
            for name, step in steps.items():
                progress.update(task, description=name)
                step(lambda side, name=name: progress.update(task, description=f"{name}: {side}"))
                progress.advance(task)
                progress.console.print(f"{name}: done", highlight=False)
        except KeyboardInterrupt:
            interrupted = True
    speedups = [entry["speedup"] for entry in results["cases"] if "speedup" in entry]
    if arguments.json:
        summary = {
            "median_speedup": statistics.median(speedups) if speedups else None,
            "quick": arguments.quick,
            "repeats": 1 if arguments.quick else arguments.repeats,
            "interrupted": interrupted,
        }
        print(json.dumps({**results, **summary, "environment": report()}))
    else:
        _show(results)
    if interrupted:
        raise KeyboardInterrupt("interrupted: the cases are those that were finished")
    entries = [*results["cases"], *results["lengths"], results["generate"], results["steps"]]
    prefix = results["prefix"]
    same = all(map(all_same, filter(None, entries))) and (prefix is None or prefix["same_gradients"])
    # In bfloat16 two ways of adding part at near ties.
    exact = [entry for entry in results["shapes"] if entry["dtype"] == "float32"]
    same = same and all(entry["same_tokens"] == entry["prompts"] for entry in exact)
    return int(not same)


def _steps(
    device: Any, arguments: argparse.Namespace, results: dict[str, Any]
) -> dict[str, Callable[[Callable[[str], None]], None]]:
    """The measurements by name; each adds its entry to the results."""
    import torch

    from nabla_fast.bench.decode import measure
    from nabla_fast.bench.decode_cases import named_cases
    from nabla_fast.bench.lengths import LENGTHS, QUICK_LENGTHS, measure_length
    from nabla_fast.bench.prefix_speed import measure_prefix
    from nabla_fast.bench.rollout_speed import measure_rollouts
    from nabla_fast.bench.shape_speed import DTYPES, measure_shape
    from nabla_fast.bench.step_speed import measure_steps

    quick = arguments.quick
    repeats = 1 if quick else arguments.repeats
    chosen = getattr(torch, arguments.dtype) if arguments.dtype else None
    dtype = chosen or torch.float32

    def generate(on_side: Callable[[str], None]) -> None:
        results["generate"] = measure_rollouts(device, repeats, tokens=8 if quick else 40)

    def step_times(on_side: Callable[[str], None]) -> None:
        results["steps"] = measure_steps(device, repeats, quick=quick, dtype=chosen)

    def prefix_times(on_side: Callable[[str], None]) -> None:
        results["prefix"] = measure_prefix(device, repeats, quick=quick, dtype=chosen)

    steps = {
        named.name: lambda on_side, named=named: results["cases"].append(
            measure(named.build(device), repeats, on_side)
        )
        for named in named_cases(quick=quick, dtype=dtype)
    }
    for length in QUICK_LENGTHS if quick else LENGTHS:
        steps[f"{_LENGTHS}: {length} tokens"] = lambda on_side, length=length: results["lengths"].append(
            measure_length(length, device, on_side, dtype)
        )
    for shaped in DTYPES if chosen is None else (chosen,):
        name = f"{_SHAPE}, {str(shaped).removeprefix('torch.')}"
        steps[name] = lambda on_side, shaped=shaped: results["shapes"].append(
            measure_shape(device, shaped, repeats, on_side, quick=quick)
        )
    # Its draws are compared with those of the modules, which round.
    beside_generate = {_GENERATE: generate} if dtype == torch.float32 else {}
    return steps | beside_generate | {_STEPS: step_times, _PREFIX: prefix_times}


def _chosen(steps: dict[str, Any], texts: list[str] | None) -> dict[str, Any]:
    """The steps with one of the texts in their name.

    Raises:
        InputError: a text is in none of the names.
    """
    if texts is None:
        return steps
    for text in texts:
        if not any(text in name for name in steps):
            raise InputError(f"--cases {text!r} is in no name; there are: {'; '.join(steps)}")
    return {name: step for name, step in steps.items() if any(text in name for text in texts)}


def _show(results: dict[str, Any]) -> None:
    from nabla_fast.bench.decode_tables import tables

    console = table_console()
    for found in tables(results):
        table = Table(title=found.title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in found.header:
            justify = "left" if name in ("", "#", "case") else "right"
            table.add_column(name, justify=justify, overflow="fold")
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
        console.print(found.note + "\n", style="dim", highlight=False)
