"""Interleaved timings and peaks of memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast.decode.timing import PeakMemory

_FLUSH_BYTES = 256 << 20  # several times the last-level cache of a GPU or a CPU of today
_SLOW_S = 0.5  # a function that takes so long is warm after one run
_SLOWEST_S = 10.0  # and one that takes so long is not run again


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs: median, 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """Statistics of at least one run."""
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 2.0,
    reset: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time functions in turn, so that what the machine does meanwhile hits all of them alike.

    Each run starts with cold caches, its inputs in memory; on CUDA it is timed with events.

    Args:
        functions: by name; each runs at least three times, unless its first run takes very long: that is
            its time then.
        seconds: spent on all of them together, warm-up not counted.
        reset: called before each run, not timed.
    """
    time_one = _time_cuda if device.type == "cuda" else _time_cpu
    flush = cache_flush(device)
    runs: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        reset()
        flush()
        first = time_one(function)
        if first < 1e3 * _SLOW_S:
            reset()
            function()
        elif first > 1e3 * _SLOWEST_S:
            runs[name].append(first)
    turns = {name: function for name, function in functions.items() if not runs[name]}
    start = time.perf_counter()
    while turns and (time.perf_counter() - start < seconds or len(runs[next(iter(turns))]) < 3):
        for name, function in turns.items():
            reset()
            flush()
            runs[name].append(time_one(function))
    return {name: Timing.of(milliseconds) for name, milliseconds in runs.items()}


def replayed(function: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The launches of ``function`` as one CUDA graph; its results are those of the last replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles what is compiled at a first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def cache_flush(device: torch.device) -> Callable[[], object]:
    """A function that leaves nothing in the caches of ``device`` that is of use."""
    buffer = torch.zeros(_FLUSH_BYTES // 4, device=device)
    return buffer.zero_ if device.type == "cuda" else buffer.sum


def peak_bytes(
    function: Callable[[], list[Tensor]], device: torch.device, *, in_place: bool = False
) -> int | None:
    """Most memory that one run takes beyond what was in use before, its results excluded.

    The results' bytes are taken off the peak, whether or not all of them were there when it was reached.
    On a CPU resident pages are counted, so that less than some hundred kilobytes means nothing.

    Args:
        in_place: the results lie in memory that was there before: there is nothing to take off.
    Returns:
        Bytes, or None where the platform does not tell.
    """
    give_memory_back()
    peak = PeakMemory(device)
    results = function()
    total = peak.bytes()
    return None if total is None else max(0, total - (0 if in_place else _bytes_of(results)))


def give_memory_back() -> None:
    """Return to the system what was freed: reused, it would not show in a peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def _bytes_of(results: list[Tensor]) -> int:
    """Bytes of the memory of ``results``, shared memory counted once."""
    storages = {result.untyped_storage().data_ptr(): result.untyped_storage() for result in results}
    return sum(storage.nbytes() for storage in storages.values())


def _time_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _time_cuda(function: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
