"""``python -m tools.compile_check``: every kernel for every target, without a GPU.

Exit status 1 if a kernel does not compile, spills, has more shared memory than the target allows,
multiplies half-precision tiles without tensor cores, or executes more instructions than ``counts.json``
says.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tools.compile_check import counts, results, versions
from tools.compile_check.checking import Row, check, not_compiled
from tools.compile_check.launches import ops
from tools.compile_check.targets import TARGETS

DTYPES = ("bfloat16", "float32", "float16")


def run(targets: Sequence[str], ops: Sequence[str], dtypes: Sequence[str], workers: int) -> Iterator[Row]:
    """Rows as they are done.

    Each target and dtype has processes of its own: a compiler keeps memory, 12 GB in a process that has
    compiled for four targets, or by Triton 3.6.0 for gfx942 alone. (``max_tasks_per_child`` would say it,
    and hangs in Python 3.11.)
    """
    context = multiprocessing.get_context("spawn")
    for target, dtype in itertools.product(targets, dtypes):
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            checks = {pool.submit(check, target, op, dtype): op for op in ops}
            for future in as_completed(checks):
                try:
                    yield from future.result()
                except BrokenProcessPool as error:
                    yield not_compiled({"op": checks[future], "dtype": dtype, "target": target}, error)


def show(row: Row) -> str:
    where = f"{row['target']:<7} {row['op']:<22} {row['dtype']:<9}"
    if row["kernel"] is None:
        return f"{where} {row['launch']}: {row['problem']}"
    line = (
        f"{where} {row['kernel']:<28} {row['registers']:>4} registers {row['stack']:>4} stack "
        f"{row['shared']:>7} shared {row['barriers']:>3} barriers"
    )
    if row["instructions_per_element"] is not None:
        line += f" {row['instructions_per_element']:>8g} instructions an element"
    if row["tensor_cores"]:
        line += (
            "  tensor cores"
            + {True: ", asynchronous", False: ", waited for", None: ""}[row["asynchronous"]]
        )
    return line


def failure(row: Row) -> str:
    """One line on a row with a problem."""
    kernel = row["kernel"] or "does not compile"
    where = f"{row['target']} {row['op']}, {row['dtype']}, {row['launch']}: {kernel}"
    return f"FAILED (Triton {row['triton']}) {where}: {row['problem']}"


def compiled(arguments: argparse.Namespace) -> list[Row]:
    """Rows of the Triton of this environment."""
    with contextlib.ExitStack() as stack:
        # Nothing of an earlier run unless asked for, nothing interpreted, in the processes that compile.
        cache = arguments.cache or stack.enter_context(tempfile.TemporaryDirectory())
        os.environ |= {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        os.environ.pop("TRITON_INTERPRET", None)
        rows = []
        for row in run(arguments.targets, arguments.ops, arguments.dtypes, arguments.workers):
            rows.append(row)
            print(show(row), file=sys.stderr, flush=True)
    return rows


def of_release(release: str, arguments: argparse.Namespace) -> list[Row]:
    """Rows of one release of Triton."""
    if release == versions.PIN:
        return compiled(arguments)
    passed = ["--targets", *arguments.targets, "--ops", *arguments.ops, "--dtypes", *arguments.dtypes]
    passed += ["--workers", str(arguments.workers)]
    if arguments.cache:
        passed += ["--cache", arguments.cache]
    return versions.check_with(release, passed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--ops", nargs="+", choices=ops(), default=ops())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cache", help="keep what is compiled in this directory, where Triton finds it if told of it"
    )
    parser.add_argument(
        "--triton",
        nargs="+",
        default=[versions.PIN],
        metavar="RELEASE",
        help="releases to compile with: pin (this environment's), newest, or a number such as 3.6.0, "
        "which are installed under build/",
    )
    parser.add_argument("--write", action="store_true", help="renew counts.json from the pin's rows")
    parser.add_argument(
        "--store", action="store_true", help="keep the rows under benchmarks/results/compile_check"
    )
    arguments = parser.parse_args(argv)

    started = time.monotonic()
    rows: list[Row] = []
    committed_with, committed = counts.load() if counts.PATH.exists() else ("", {})
    for release in arguments.triton:
        of_this = of_release(release, arguments)
        if release == versions.PIN and arguments.write and of_this:
            committed_with, committed = of_this[0]["triton"], counts.renewed(of_this, committed)
            counts.store(committed_with, committed)
        counts.compare([row for row in of_this if row["triton"] == committed_with], committed)
        rows += of_this
    if arguments.store:
        results.store(rows)
    failed = [row for row in rows if row["problem"]]
    for row in failed:
        print(failure(row), file=sys.stderr)
    seconds = round(time.monotonic() - started, 1)
    if arguments.json:
        print(json.dumps({"kernels": rows, "failed": len(failed), "seconds": seconds}))
    print(f"{len(rows)} kernels, {len(failed)} failed, {seconds} s", file=sys.stderr)
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    sys.exit(main())
