"""Launches of one kernel for a GPU that is not there, beside Triton's own choice of what is compiled.

Run as a program without TRITON_INTERPRET: it prints one line of JSON. pytest runs it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from nabla_fast import ops
from nabla_fast.bench import launch as bench_launch
from nabla_fast.bench import launch_calls
from nabla_fast.bench.absent_gpu import Launches, absent_gpu
from nabla_fast.ops.registry import all_ops
from nabla_fast.plans import plan
from nabla_fast.triton_kernels.common.launch import Launched, launched, repeated

_ONE, _TWO, _THREE, _FOUR = (tl.constexpr(value) for value in range(1, 5))


@launched
@triton.jit(do_not_specialize=["turn"])
def kernel(
    x_ptr,
    y_ptr,
    pairs,
    size,
    turn,
    scale,
    other_ptr=None,
    WIDE: tl.constexpr = False,
    BLOCK: tl.constexpr = 16,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    value += tl.load(pairs[0] + at * pairs[1], mask=at < size, other=0.0)
    if other_ptr is not None:
        value += tl.load(other_ptr + at, mask=at < size, other=0.0)
    value = value * scale + turn * (_ONE + _TWO + _THREE + _FOUR)
    tl.store(y_ptr + at, value, mask=at < size)


def drawn(choose: random.Random) -> tuple[tuple, dict]:
    """Arguments of a launch."""
    numbers = torch.zeros(4096)

    def pointer() -> torch.Tensor:
        dtype = choose.choice([torch.float32, torch.bfloat16])
        return numbers.view(dtype)[choose.choice([0, 1, 8]) :]

    def integer() -> int:
        return choose.choice([1, 2, 16, 17, 2**31 - 1, 2**31, 2**31 + 1, 2**33])

    args = [pointer(), pointer(), (pointer(), integer()), integer(), integer(), choose.choice([0.5, 1.0])]
    options = {}
    for name, values in {
        "other_ptr": [None, pointer()],
        "WIDE": [False, True],
        "BLOCK": [16, 32],
        "num_warps": [1, 2],
    }.items():
        if choose.random() < 0.5:
            options[name] = choose.choice(values)
    return tuple(args), options


def compared() -> dict[str, int]:
    """How many launches by key there were of what Triton would have launched, and of something else."""
    run, choose = [], random.Random(0)
    launch = CudaLauncher.__call__

    def watched(self: object, *args: object) -> None:
        run.append((self, args[9:]))
        launch(self, *args)

    count = {"same": 0, "other": 0, "compiled": 0}
    draws = [drawn(choose) for _ in range(40)]
    with mock.patch.object(CudaLauncher, "__call__", watched):
        for args, options in itertools.chain(draws, draws):
            found = kernel._find(args, options)
            compiled = kernel.kernel[(3,)](*args, **options)
            assert isinstance(compiled, CompiledKernel)
            theirs = run.pop()
            kernel[(3,)](*args, **options)
            ours = run.pop()
            same = ours[0] is theirs[0] and all(a is b for a, b in zip(ours[1], theirs[1], strict=True))
            count["compiled" if found is None else "same" if same else "other"] += 1
    return count


def calls() -> dict[str, int]:
    """How many functions, Python's and built-in ones, a launch calls."""

    def counted(call: Callable[[], object]) -> int:
        count = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(None)
        return count

    x = torch.zeros(64)
    args = (x, x, (x, 1), 64, 3, 1.0, x)
    kernel[(4,)](*args, WIDE=False)
    named = dict(zip(("x_ptr", "y_ptr", "pairs", "size", "turn", "scale", "other_ptr"), args, strict=True))
    kernel[(4,)](**named, WIDE=False)
    again = repeated(kernel, (4,), "turn", **named, WIDE=False)
    return {
        "triton": counted(lambda: kernel.kernel[(4,)](*args, WIDE=False)),
        "launched": counted(lambda: kernel[(4,)](*args, WIDE=False)),
        "repeated": counted(lambda: again(7)),
    }


def addresses(values: object) -> list:
    """Arguments of a launch, tensors as their addresses."""
    if isinstance(values, tuple):
        return [part for value in values for part in addresses(value)]
    return [values.data_ptr() if isinstance(values, torch.Tensor) else values]


@contextlib.contextmanager
def c_calls() -> Iterator[list[tuple[object, list]]]:
    """Of launchers made inside: calls of their functions in C, with the launcher and all arguments."""
    seen: list[tuple[object, list]] = []
    make = CudaLauncher.__init__

    def made(self: CudaLauncher, *args: object) -> None:
        make(self, *args)
        function = self.launch

        def watched(*passed: object) -> None:
            seen.append((self, addresses(passed)))
            function(*passed)

        self.launch = watched

    with mock.patch.object(CudaLauncher, "__init__", made):
        yield seen


def launcher_runs(call: Callable[[], object]) -> int:
    """How often a call runs the Python of Triton's launcher."""
    count, code = 0, CudaLauncher.__call__.__code__

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code is code

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def planned() -> dict[str, list]:
    """Ops whose plan launches other kernels than their launcher, or with other arguments, or no plan.

    Compared is all that functions in C get. Inputs have the same addresses in both. Memory that a call
    makes has not: of its addresses the place in a line of 16 bytes is compared. Of each op, how often its
    launcher and its plan run the Python of Triton's launcher.
    """
    other, unplanned, runs = [], [], {}
    sizes = launch_calls.Sizes(3, 9_000, (64, 32), 3)
    with c_calls() as seen, bench_launch._no_reports(), ops.use_backend("triton"):
        for case in launch_calls.calls(sizes, torch.device("cpu"), torch.bfloat16):
            call = case.prepare()
            with plan.enabled(False):
                call()
                seen.clear()
                by_launcher = launcher_runs(call)
            launcher = list(seen)
            for _ in range(2 + plan.CALLS_BEFORE):
                call()
            seen.clear()
            runs[case.op] = by_launcher, launcher_runs(call)
            by_plan = list(seen)
            same = len(by_plan) == len(launcher) and all(
                of_plan[0] is of_launcher[0]
                and len(of_plan[1]) == len(of_launcher[1])
                and all(
                    a == b or (type(a) is int and min(a, b) > 2**32 and a % 16 == b % 16)
                    for a, b in zip(of_plan[1], of_launcher[1], strict=True)
                )
                for of_plan, of_launcher in zip(by_plan, launcher, strict=True)
            )
            if not same or not launcher:
                other.append(case.op)
        for op in all_ops().values():
            plans = [known.plans for known in op._known._known.values() if known.plans]
            unplanned += [f"{op.name}: {one.reason}" for one in plans if not one._plans]
    return {"other": other, "unplanned": unplanned, "launcher_runs": runs}


def watched(launches: Launches) -> dict[str, int]:
    """How often whoever watches hears of a planned call's kernels, and what runs when nobody does."""
    logits = torch.zeros(3, 9_000)
    with bench_launch._no_reports(), ops.use_backend("triton"):

        def call() -> None:
            ops.token_stats(logits)

        for _ in range(2 + plan.CALLS_BEFORE):
            call()
        told = {"launches": 0, "hooks": 0, "run": 0, "launcher": 0}
        launches.start()
        told["by_plan"] = launcher_runs(call)

        def hook(metadata: object) -> None:
            told["hooks"] += 1

        runtime = triton.knobs.runtime
        former = runtime.launch_enter_hook, runtime.launch_exit_hook
        for chosen in ((hook, None), (None, hook)):
            runtime.launch_enter_hook, runtime.launch_exit_hook = chosen
            call()
        runtime.launch_enter_hook, runtime.launch_exit_hook = former

        def counted(owner: type, name: str, key: str) -> mock._patch:
            function = getattr(owner, name)

            def wrapper(*args: object, **kwargs: object) -> object:
                told[key] += 1
                return function(*args, **kwargs)

            return mock.patch.object(owner, name, wrapper)

        for owner, name, key in ((JITFunction, "run", "run"), (CudaLauncher, "__call__", "launcher")):
            with counted(owner, name, key):
                call()
        told["by_plan_again"] = launcher_runs(call)
        told["launches"] = launches.kernels
    return told


def main() -> None:
    assert isinstance(kernel, Launched)
    with absent_gpu() as launches:
        result = {"launches": compared()} | {"calls": calls()}
        result["planned"] = planned()
        result["watched"] = watched(launches)
        launches.start()
        again = repeated(
            kernel, (4,), "turn", torch.zeros(9), torch.zeros(9), (torch.zeros(9), 5), 9, turn=1, scale=1.0
        )
        for turn in range(5):
            again(turn)
        result["repeated"] = launches.kernels
    print(json.dumps(result))


if __name__ == "__main__":
    main()
