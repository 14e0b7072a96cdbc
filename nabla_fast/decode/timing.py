"""Wall-clock by stage, and the peak of memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nabla_fast.models.interrupts import deferred
from nabla_fast.results import Stats

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def timed(stats: Stats, stage: str) -> Iterator[None]:
    """Add the seconds spent inside to ``stats.seconds[stage]``.

    Device work that nothing waits for is counted in the stage that waits.
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        stats.seconds[stage] = stats.seconds.get(stage, 0.0) + time.perf_counter() - start


class PeakMemory:
    """The most memory in use above what was in use at construction.

    On CUDA the allocator's own count; elsewhere the resident memory of the process as Linux
    counts it, which includes the allocator's reserve.
    """

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            with deferred(), suppress(OSError):
                _CLEAR.write_text("5")  # resets VmHWM
            self._start = _resident("VmRSS")

    def bytes(self) -> int | None:
        """The peak so far, or None where the platform does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        peak = _resident("VmHWM")
        return None if peak is None or self._start is None else max(0, peak - self._start)


def _resident(field: str) -> int | None:
    # A handler that raises between an open and its `with` would leave the file open.
    with deferred(), suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None
