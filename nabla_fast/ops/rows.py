"""Rows of logits: their slices, their errors, and the precision of arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nabla_fast.errors import RowError

# Status codes [N] int32 that kernels write; 0 is a good row.
OK, HAS_NAN, HAS_INF, ALL_MASKED = range(4)
REASONS = {
    HAS_NAN: "has a NaN logit",
    HAS_INF: "has a +inf logit",
    ALL_MASKED: "has no finite logit",
}

# (op, status [N]) on a device, for synchronize to read.
_pending: list[tuple[str, Tensor]] = []
_MOST_PENDING = 64

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
    if status.device.type == "cpu":
        _raise(op, status)
    elif not (status.is_cuda and torch.cuda.is_current_stream_capturing()):
        _pending.append((op, status))
        if len(_pending) > _MOST_PENDING:
            synchronize()


def synchronize() -> None:
    """Raise for rows that ops on a device found bad since the last call; waits for the device.

    Raises:
        RowError: a row was bad; the first op that met one is named.

    Example:
        >>> synchronize()
    """
    pending = list(_pending)
    _pending.clear()
    for op, status in pending:
        _raise(op, status)


def _raise(op: str, status: Tensor) -> None:
    if status.any():
        rows = status.nonzero().flatten().tolist()
        raise RowError(op, [(row, REASONS[int(status[row])]) for row in rows])
