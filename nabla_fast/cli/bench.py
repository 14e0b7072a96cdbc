"""``nabla-fast bench``: benchmarks that check their results before they print a time."""

from __future__ import annotations

import argparse

from nabla_fast.cli.bench_decode import add_parser as add_decode_parser
from nabla_fast.cli.bench_kernels import add_parser as add_kernels_parser
from nabla_fast.cli.bench_launch import add_parser as add_launch_parser


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("bench", help="measure kernels and decoding on this machine")
    parts = parser.add_subparsers(dest="part", required=True, metavar="part")
    add_kernels_parser(parts)
    add_decode_parser(parts)
    add_launch_parser(parts)
