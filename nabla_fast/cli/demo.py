"""``nabla-fast demo``: the bundled models on held-out Countdown problems."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nabla_fast.cli.options import (
    add_config_options,
    add_device_options,
    add_json_option,
    check_device,
    config_from,
)
from nabla_fast.errors import InputError


def add_parser(commands: argparse._SubParsersAction) -> None:
    from nabla_fast.demo.settings import CONFIG

    parser = commands.add_parser(
        "demo",
        help="solve held-out problems with the bundled models",
        description="Greedy, self-consistency, Best-of-8 and ∇-decoding on held-out problems.",
    )
    parser.add_argument("--problems", type=int, default=100, metavar="N", help="how many problems")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the problems and of all draws"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads; the bundled models are too small for two to help",
    )
    add_json_option(parser)
    add_device_options(parser)
    add_config_options(parser, CONFIG)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from nabla_fast.demo import countdown
    from nabla_fast.demo.methods import Demo, MethodReport
    from nabla_fast.demo.show import (
        TITLES,
        agreement,
        beside_best_of_n,
        most_telling,
        revised_answer,
        table,
    )

    if arguments.problems < 1:
        raise InputError(f"--problems must be at least 1, got {arguments.problems}")
    if not 0 <= arguments.seed < 2**62 - arguments.problems:
        raise InputError(f"--seed must be from 0 to 2**62 less the problems, got {arguments.seed}")
    if arguments.threads < 1:
        raise InputError(f"--threads must be at least 1, got {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    try:
        problems = countdown.held_out(arguments.problems, arguments.seed)
    except ValueError as error:
        raise InputError(f"--problems {arguments.problems}: {error}") from None
    demo = Demo(check_device(arguments.device), arguments.dtype, config_from(arguments))
    seed = arguments.seed
    reports = {name: MethodReport() for name in TITLES}
    results: dict[str, dict] = {"nabla": {}, "nabla_sequential": {}}
    interrupted = False
    columns = TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {
            name: progress.add_task(title, total=len(problems), start=False)
            for name, title in TITLES.items()
        }

        def started(name: str):
            progress.start_task(tasks[name])
            return reports[name], lambda count: progress.advance(tasks[name], count)

        try:
            demo.greedy(problems, *started("greedy"))
            demo.self_consistency(problems, seed, *started("self_consistency"))
            demo.best_of_n(problems, seed, *started("best_of_n"))
            for name, loop in (("nabla", "batched"), ("nabla_sequential", "sequential")):
                demo.nabla(problems, seed, *started(name), loop=loop, results=results[name])
        except KeyboardInterrupt:
            interrupted = True
    if arguments.json:
        from nabla_fast.env import report

        methods = {name: entry.to_dict() for name, entry in reports.items() if entry.correct}
        summary = {"problems": len(problems), "seed": seed, "interrupted": interrupted}
        print(json.dumps({**summary, "methods": methods, "environment": report()}))
    else:
        console = Console()
        console.print(table(reports))
        cost = beside_best_of_n({name: report.to_dict() for name, report in reports.items()})
        if cost is not None:
            console.print(cost)
        shown = most_telling(problems, results["nabla"])
        if shown is not None:
            console.print(revised_answer(problems[shown], results["nabla"][shown], demo.tokenizer))
        console.print(agreement(results["nabla"], results["nabla_sequential"]), style="dim")
    if interrupted:
        raise KeyboardInterrupt("interrupted: the figures are those of the problems that were finished")
    return 0
