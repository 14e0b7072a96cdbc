"""Compare the kernels of two builds: ``python -m tools.compare_builds OLD NEW [--isa LEVEL] [--op NAME]``.

OLD and NEW are source trees with the C++ extension built in place. Each has a process that uses its own
tree's package, so that their C interfaces may differ. On every case of ``bench kernels`` the two run in
turns on the same cores, with cold caches and inputs of one seed, and a pair's ratio is the new build's
time over the old one's. What a process has by chance, where its memory lies above all, would show as a
difference of the builds: everything is measured in fresh processes as often as ``--passes`` says, and a
row counts as slower or faster where every pass says so. With one thread the time is the CPU's, so that
other programs' turns are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_LEAST_PAIRS, _MOST_PAIRS = 7, 300


class Pass(NamedTuple):
    """Ratios new / old of one pass: the median, and an interval that holds it 19 times of 20."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Pass:
        """The interval between two ranks, which a median of any distribution lies in so often."""
        ordered = sorted(ratios)
        skipped = max(0, math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2))
        return cls(statistics.median(ordered), ordered[skipped], ordered[-1 - skipped])


def verdict(passes: Sequence[Pass], least: float) -> str:
    """ "slower" or "faster" where every pass lies beyond 1 by more than its noise and by ``least``."""
    if all(one.low > 1 and one.median >= 1 + least for one in passes):
        return "slower"
    if all(one.high < 1 and one.median <= 1 - least for one in passes):
        return "faster"
    return ""


# -- a tree's process --------------------------------------------------------------------------------


def work(level: str, threads: int) -> None:
    """Answer lines of JSON on standard input, each with one on standard output."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    del sys.path[0]  # this file's folder
    import torch

    from nabla_fast import _native, ops
    from nabla_fast.bench.kernel_cases import cases
    from nabla_fast.bench.measure import cache_flush

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    native, cpu = _native.extension(), torch.device("cpu")
    if level:
        native.limit_cpu_isa(_native.ISA_NAMES.index(level))
    known = {f"{case.op} {case.shape} {case.dtype}": case for case in cases(cpu)}
    flush = cache_flush(cpu)
    answers = os.fdopen(os.dup(1), "w")

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"package": ops.__file__, "isa": _native.cpu_isa(), "cases": list(known)})
    versions = None
    with ops.use_backend("cpu", "torch"):
        for line in sys.stdin:
            name = json.loads(line)
            if name:  # a case: make its inputs, and run it once
                versions = None
                torch.manual_seed(0)
                versions = known[name].prepare()
                versions.reset()
                answer([_digest(result) for result in versions.ours()])
                continue
            versions.reset()
            flush()
            start = clock()
            versions.ours()
            answer(clock() - start)


def _digest(result: Any) -> str:
    import hashlib

    import torch

    # bfloat16 has no dtype in numpy. A number by itself has no axis to be viewed along.
    octets = result.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(octets.numpy().tobytes()).hexdigest()


class Worker:
    """A tree's process.

    Raises:
        SystemExit: it does not start, or it uses a package that is not the tree's.
    """

    def __init__(self, tree: Path, level: str, threads: int):
        self._tree = tree
        arguments = ["--work", level, str(threads)]
        # Threads that wait are asleep: the other process's turn has the cores.
        environment = os.environ | {
            "PYTHONPATH": str(tree),
            "OMP_WAIT_POLICY": "passive",
            "OMP_NUM_THREADS": str(threads),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *arguments],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._answer()
        if tree not in Path(self.about["package"]).parents:
            self.close()
            raise SystemExit(f"{tree} has no package of its own: {self.about['package']} was imported")

    def ask(self, name: str = "") -> Any:
        """Digests of a case's results, after which no name means the seconds of another run of it."""
        self._process.stdin.write(json.dumps(name) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self._tree} ended: exit status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with self._process:
            pass


# -- both ----------------------------------------------------------------------------------------------


def compared(
    trees: Sequence[Path], level: str, threads: int, seconds: float, names: Sequence[str] | None
) -> Iterator[tuple[str, bool, list[float], list[float]]]:
    """Of each case that both trees have: name, whether results have the same bits, old and new seconds."""
    workers: list[Worker] = []
    try:
        workers += [Worker(tree, level, threads) for tree in trees]
        old, new = workers
        if old.about["isa"] != new.about["isa"]:
            raise SystemExit(f"the builds run at different levels: {old.about['isa']}, {new.about['isa']}")
        for name in old.about["cases"]:
            if name not in new.about["cases"] or (names and not any(part in name for part in names)):
                continue
            same = old.ask(name) == new.ask(name)
            yield name, same, *in_turns(old.ask, new.ask, seconds)
    finally:
        for worker in workers:
            worker.close()


def in_turns(
    old: Callable[[], float], new: Callable[[], float], seconds: float
) -> tuple[list[float], list[float]]:
    """Times of both, run after run; first comes the one that came second before."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + seconds
    while len(times[0]) < _LEAST_PAIRS or (len(times[0]) < _MOST_PAIRS and time.monotonic() < end):
        order = ((0, old), (1, new)) if len(times[0]) % 2 == 0 else ((1, new), (0, old))
        for which, run in order:
            times[which].append(run())
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each case; 1 if any is slower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--isa", nargs="+", default=[""], metavar="LEVEL", help="default: the CPU's own")
    parser.add_argument(
        "--op", nargs="+", metavar="NAME", help="only cases with one of these in their name"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of a case in a pass")
    parser.add_argument("--passes", type=int, default=2, metavar="N", help="in fresh processes")
    parser.add_argument("--least", type=float, default=0.02, metavar="X", help="difference that counts")
    arguments = parser.parse_args(argv)
    trees = [tree.resolve() for tree in (arguments.old, arguments.new)]
    slower = 0
    for level in arguments.isa:
        rows: dict[str, list[Pass]] = {}
        fastest: dict[str, list[float]] = {}
        differ = set()
        for turn in range(arguments.passes):
            given = level, arguments.threads, arguments.seconds, arguments.op
            for name, same, old, new in compared(trees, *given):
                one = Pass.of([b / a for a, b in zip(old, new, strict=True)])
                rows.setdefault(name, []).append(one)
                fastest.setdefault(name, []).append(min(new) / min(old))
                if not same:
                    differ.add(name)
                print(f"pass {turn + 1}: {name}: {one.median:.3f}", file=sys.stderr, flush=True)
        where = f"{level or 'the own level'}, {arguments.threads} threads"
        print(f"new / old at {where}: median and interval of each pass, fastest / fastest")
        for name, passes in rows.items():
            said = verdict(passes, arguments.least)
            slower += said == "slower"
            figures = "  ".join(f"{one.median:.3f} ({one.low:.3f} to {one.high:.3f})" for one in passes)
            minima = "/".join(f"{value:.3f}" for value in fastest[name])
            notes = [said, "other bits" if name in differ else ""]
            print(f"{name:76} {figures}  {minima}  {', '.join(filter(None, notes))}".rstrip())
    return int(slower > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())
