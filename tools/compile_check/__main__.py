"""``python -m tools.compile_check``: every kernel for every target, without a GPU.

Exit status 1 if a kernel does not compile, spills, has more shared memory than the target allows, or
multiplies half-precision tiles without tensor cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from tools.compile_check import launches
from tools.compile_check.checking import Row, check
from tools.compile_check.targets import TARGETS

DTYPES = ("bfloat16", "float32", "float16")


def run(targets: Sequence[str], ops: Sequence[str], dtypes: Sequence[str], workers: int) -> Iterator[Row]:
    """Rows as they are done."""
    tasks = [(target, op, dtype) for target in targets for op in ops for dtype in dtypes]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(check, *task) for task in tasks]):
            yield from future.result()


def listed() -> list[str]:
    """The ops that have launches."""
    return sorted(module.name for module in pkgutil.iter_modules(launches.__path__))


def show(row: Row) -> str:
    where = f"{row['target']:<7} {row['op']:<22} {row['dtype']:<9}"
    if row["kernel"] is None:
        return f"{where} {row['launch']}: {row['problem']}"
    cores = "tensor cores" if row["tensor_cores"] else "-"
    line = (
        f"{where} {row['kernel']:<28} {row['registers']:>4} registers {row['stack']:>4} stack "
        f"{row['shared']:>7} shared  {cores}"
    )
    return line + (f"   FAILED: {row['problem']}" if row["problem"] else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--ops", nargs="+", choices=listed(), default=listed())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cache", help="keep what is compiled in this directory, where Triton finds it if told of it"
    )
    arguments = parser.parse_args(argv)

    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        # Nothing of an earlier run unless asked for, nothing interpreted, in the processes that compile.
        cache = arguments.cache or stack.enter_context(tempfile.TemporaryDirectory())
        os.environ |= {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        os.environ.pop("TRITON_INTERPRET", None)
        rows = []
        for row in run(arguments.targets, arguments.ops, arguments.dtypes, arguments.workers):
            rows.append(row)
            print(show(row), file=sys.stderr, flush=True)
    failed = [row for row in rows if row["problem"]]
    seconds = round(time.monotonic() - started, 1)
    if arguments.json:
        print(json.dumps({"kernels": rows, "failed": len(failed), "seconds": seconds}))
    print(f"{len(rows)} kernels, {len(failed)} failed, {seconds} s", file=sys.stderr)
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    sys.exit(main())
