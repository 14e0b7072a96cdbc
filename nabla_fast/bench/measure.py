"""Interleaved timings, and the ceilings of the machine they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nabla_fast.timing import PeakMemory

_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU of today


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs: median, 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """Of at least one run."""
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def interleaved(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 2.0,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time functions in turn, so that what the machine does meanwhile hits all of them alike.

    On CUDA each run is timed with events and starts with a cold L2.

    Args:
        functions: by name; each runs at least three times.
        seconds: spent on all of them together, warm-up not counted.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    runs: dict[str, list[float]] = {name: [] for name in functions}
    time_one = _time_cuda if device.type == "cuda" else _time_cpu
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(runs.values()))) < 3:
        for name, function in functions.items():
            runs[name].append(time_one(function, flush))
    return {name: Timing.of(milliseconds) for name, milliseconds in runs.items()}


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that one run takes above what was in use before."""
    peak = PeakMemory(device)
    function()
    return peak.bytes()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes counted."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.5)["copy"]
    return 2 * size / (timing.median_ms / 1e3)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product in ``dtype``."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.empty(size, size, device=device).normal_().to(dtype) for _ in range(2))
    timing = interleaved({"matmul": lambda: left @ right}, device, seconds=0.5)["matmul"]
    return 2 * size**3 / (timing.median_ms / 1e3)


def _time_cpu(function: Callable[[], object], _: None) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _time_cuda(function: Callable[[], object], flush: torch.Tensor) -> float:
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
