"""Rows of logits: their slices, their errors, and the precision of arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import nabla_fast.ops.device_reports as device_reports
from nabla_fast.errors import RowError
from nabla_fast.plans.recording import step

# Status codes [N] int32 that kernels write; 0 is a good row.
OK, HAS_NAN, HAS_INF, ALL_MASKED, NOT_IN_POOL, NO_SLOT = range(6)
REASONS = {
    HAS_NAN: "has a NaN logit",
    HAS_INF: "has a +inf logit",
    ALL_MASKED: "has no finite logit",
    NOT_IN_POOL: "has a prefix that does not fit its block table, or a block that is not in the pool",
    NO_SLOT: "has a slot that is not in the pool",
}

# Elements of the largest [n, V] tensor of logits that a slice of rows makes.
_ELEMENTS = 1 << 22


def row_slices(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices that together are N rows, each so short that its logits [n, V] are no large tensor."""
    step = max(1, _ELEMENTS // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any argument is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_status(logits: Tensor) -> Tensor:
    """[N] int32 codes of ``logits`` [N, V]; one reduction, since NaN and infinity survive a maximum."""
    top = logits.amax(dim=-1)
    status = torch.where(top == torch.inf, HAS_INF, torch.where(top == -torch.inf, ALL_MASKED, OK))
    return torch.where(top.isnan(), HAS_NAN, status).to(torch.int32)


def report(op: str, status: Tensor) -> None:
    """Raise for bad rows: at once on the CPU, at the next :func:`synchronize` on a device.

    Args:
        op: name for the message.
        status: [N] int32 codes.
    Raises:
        RowError: ``status`` is on the CPU and a row is bad.
    """
    step(_report, op, status)


def _report(op: str, status: Tensor) -> None:
    if not status.is_cpu:
        device_reports.add(op, status)
    elif status.any():
        rows = status.nonzero().flatten().tolist()
        raise RowError(op, [(row, REASONS[int(status[row])]) for row in rows])


def synchronize() -> None:
    """Raise for rows that ops on devices found bad since the last call; waits for the devices, once each.

    A call in the capture of a CUDA graph is reported when the graph is replayed: by the first
    ``synchronize()`` after the replay, if the op was called before outside a capture, as graphs need it
    anyway to be compiled. That call should have had as many rows: of rows beyond, at least beyond 1,024,
    only the first is named. ``synchronize()`` itself does nothing inside a capture.

    Raises:
        RowError: a row was bad; the first op that met one is named, calls before replays.

    Example:
        >>> synchronize()
    """
    if found := device_reports.first():
        op, rows = found
        raise RowError(op, [(row, _reason(code)) for row, code in rows])


def _reason(code: int) -> str:
    return REASONS[code] if code > 0 else f"or a later one {REASONS[-code]}"
