"""``nabla-fast env``: versions, hardware, backends, and the files of the C interface."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from nabla_fast.cli.options import add_json_option
from nabla_fast.cli.output import table_console

# A section's rows: name, value.
Rows = list[tuple[str, str]]


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("env", help="versions, hardware, and which backends are there")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from nabla_fast.env import report

    environment = report() | {"native": _native()}
    if arguments.json:
        print(json.dumps(environment))
    else:
        _show(environment)
    return 0


def _show(environment: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, rows in _sections(environment):
        if table.row_count:
            table.add_row()
        table.add_row(Text(title, style="bold"))
        for name, value in rows:
            style = {"yes": "green", "no:": "red"}.get(value.split(" ")[0], "")
            table.add_row(f"  {name}", Text(value, style=style if title == "backends" else ""))
    console = table_console()
    console.print(table)


def _sections(environment: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    versions, cpu, native = (environment[key] for key in ("versions", "cpu", "native"))
    cuda = f"CUDA {versions['cuda']}" if versions["cuda"] else "without CUDA"
    yield (
        "versions",
        [
            *(
                (name, f"{version} ({cuda})" if name == "torch" else version or "not installed")
                for name, version in versions.items()
                if name != "cuda"
            ),
            ("commit", environment["commit"] or "unknown: not run from a checkout"),
        ],
    )
    gpus = [
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, {gpu['architecture']}"
        for gpu in environment["gpus"]
    ]
    yield (
        "hardware",
        [
            ("platform", environment["platform"]),
            ("CPU", f"{cpu['name']}, {cpu['count']} logical processors"),
            ("instruction sets", ", ".join(cpu["flags"]) or "none of those the kernels use"),
            ("kernels use", cpu["kernels"] or "none: the extension is not there"),
            ("threads", str(environment["threads"])),
            *((f"GPU {n}", text) for n, text in enumerate(gpus)),
            *([] if gpus else [("GPU", "none")]),
        ],
    )
    yield (
        "backends",
        [
            (name, "yes" if backend["available"] else f"no: {backend['why']}")
            for name, backend in environment["backends"].items()
        ],
    )
    yield (
        "C interface",
        [
            ("library", native["library"] or f"no: {native['why']}"),
            ("CUDA library", native["cuda_library"] or f"no: {native['why_no_cuda']}"),
            *((name, native[name]) for name in ("include", "cmake", "pkgconfig")),
        ],
    )


def _native() -> dict[str, str | None]:
    """Paths that other programs build with; where a library is missing it is null, and a line says why."""
    from nabla_fast._native import library as files

    library, why = _path(files.get_library)
    cuda_library, why_no_cuda = _path(files.get_cuda_library)
    return {
        "library": library,
        "why": why,
        "cuda_library": cuda_library,
        "why_no_cuda": why_no_cuda,
        "include": files.get_include(),
        "cmake": files.get_cmake_dir(),
        "pkgconfig": files.get_pkgconfig_dir(),
    }


def _path(library: Callable[[], str]) -> tuple[str | None, str | None]:
    """A library's path, or why there is none."""
    try:
        return library(), None
    except RuntimeError as error:
        return None, str(error)
