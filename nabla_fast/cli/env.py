"""``nabla-fast env``: versions, hardware, which backends are there, and where the C interface lies."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("env", help="versions, hardware, and which backends are there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from nabla_fast.env import report

    environment = report() | {"native": _native()}
    if arguments.json:
        print(json.dumps(environment))
        return 0
    table = Table(show_header=False, box=None)
    for key, value in environment.items():
        if key != "backends":
            table.add_row(key, value if isinstance(value, str) else json.dumps(value))
    for name, backend in environment["backends"].items():
        state = "[green]available[/]" if backend["available"] else f"[red]missing[/]: {backend['why']}"
        table.add_row(f"backend {name}", state)
    Console().print(table)
    return 0


def _native() -> dict[str, str | None]:
    """What other programs build with; ``library`` is null, and ``why`` a line, where it was not built."""
    import nabla_fast

    try:
        library, why = nabla_fast.get_library(), None
    except RuntimeError as error:
        library, why = None, str(error)
    return {
        "library": library,
        "why": why,
        "include": nabla_fast.get_include(),
        "cmake": nabla_fast.get_cmake_dir(),
        "pkgconfig": nabla_fast.get_pkgconfig_dir(),
    }
