"""The launch benchmark: what a call of an op costs on the CPU before its kernels run."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import nabla_fast.ops as ops
from nabla_fast.bench.absent_gpu import Launches, absent_gpu
from nabla_fast.bench.launch_calls import BFLOAT16, FLOAT32, REAL, TINY, Call, calls, yardsticks
from nabla_fast.errors import InputError
from nabla_fast.plans import plan

_AT_A_TIME = 20  # calls of one op before the next op's turn
# Calls of torch that put nothing on a GPU's queue.
# fmt: off
_NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "resize_", "set_", "result_type", "can_cast",
    "view", "view_as", "reshape", "_reshape_alias", "_unsafe_view", "flatten", "as_strided", "alias",
    "slice", "select", "narrow", "expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "unbind",
    "split", "split_with_sizes", "unsafe_split", "detach", "lift_fresh", "is_pinned",
}
# fmt: on


def run(
    device: torch.device,
    names: Sequence[str] | None,
    *,
    seconds: float,
    on_row: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Measure the ops' calls.

    Args:
        device: where there is a GPU, the ops are called on its tensors; on the CPU on those of a GPU that
            is not there, as :mod:`nabla_fast.bench.absent_gpu` has it.
        names: only ops with one of these in theirs.
        seconds: spent on each call.
        on_row: called with each row as it is done.
    Returns:
        Rows of ``op``, ``shape``, ``backend``, ``microseconds`` (median), ``p20`` and ``p80``, of Triton
        also ``launches`` of kernels, ``products`` of matrices and ``torch_calls`` that would put
        something on the device's queue; None where they are not counted.
    Raises:
        BackendUnavailable: there is no GPU, and none can be imagined.
        InputError: a name is in none of theirs.
    """
    cpu = torch.device("cpu")
    known = calls(REAL, device, BFLOAT16)
    for name in names or ():
        if not any(name in call.op for call in known):
            raise InputError(f"--op {name!r} is in no name; there are: {'; '.join(c.op for c in known)}")

    def chosen(made: list[Call]) -> list[Call]:
        return [call for call in made if not names or any(name in call.op for name in names)]

    rows: list[dict[str, Any]] = []

    def measure(
        backend: str, of: list[Call], launches: Launches | None, wait: Callable[[], object]
    ) -> None:
        for call in of:
            with ops.use_backend(backend):
                row = {"op": call.op, "shape": call.shape, "backend": backend}
                row |= _timed(call.prepare(), launches, seconds, wait)
            rows.append(row)
            on_row(row)

    measure("torch", yardsticks(), None, lambda: None)
    measure("cpu", chosen(calls(TINY, cpu, FLOAT32)), None, lambda: None)
    if device.type == "cuda":
        measure("triton", chosen(known), None, torch.cuda.synchronize)
    else:
        with absent_gpu() as launches, _no_reports():
            measure("triton", chosen(known), launches, lambda: None)
    measure("torch", yardsticks(), None, lambda: None)
    return rows


@contextlib.contextmanager
def _no_reports() -> Iterator[None]:
    """Drops what the ops said of their rows: no kernel has written it."""
    from nabla_fast.ops import device_reports

    former = dict(device_reports._devices)
    try:
        yield
    finally:
        device_reports._devices.clear()
        device_reports._devices.update(former)


def _timed(
    call: Callable[[], object], launches: Launches | None, seconds: float, wait: Callable[[], object]
) -> dict[str, Any]:
    """The times of a call like some made before: kernels are compiled, and the plan is there."""
    for _ in range(2 + plan.CALLS_BEFORE):
        call()
    wait()
    counts: dict[str, Any] = {"launches": None, "products": None, "torch_calls": None}
    if launches:
        launches.start()
        call()
        counts = {"launches": launches.kernels, "products": launches.products}
        selections = launches.selections
        counts["torch_calls"] = selections + _torch_calls(call)
    times: list[int] = []
    collects = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times) < 2 * _AT_A_TIME or time.perf_counter() < end:
            for _ in range(_AT_A_TIME):
                start = time.perf_counter_ns()
                call()
                times.append(time.perf_counter_ns() - start)
                wait()
    finally:
        if collects:
            gc.enable()
    times.sort()
    last = len(times) - 1
    return {
        "microseconds": statistics.median(times) / 1e3,
        "p20": times[round(0.2 * last)] / 1e3,
        "p80": times[round(0.8 * last)] / 1e3,
        **counts,
    }


def _torch_calls(call: Callable[[], object]) -> int:
    """Torch's own calls that would put something on a device's queue."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    outer = (e.name for e in profile.events() if e.cpu_parent is None or e.cpu_parent.name[:6] != "aten::")
    names = (name.removeprefix("aten::") for name in outer if name.startswith("aten::"))
    return sum(name not in _NO_LAUNCH for name in names)
