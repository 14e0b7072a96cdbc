"""Sums along rows in a fixed order: what the programs of a row leave is joined here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched

_COLUMNS = 1024


@launched
@triton.jit(do_not_specialize=["parts"])
def _row_totals_kernel(
    parts_ptr,  # [N, M] float32, contiguous
    totals_ptr,  # [N] float32
    parts,  # M
    ROOT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    lanes = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, parts, COLUMNS):
        lanes += tl.load(parts_ptr + row * parts + start + column, mask=column < parts - start, other=0.0)
    total = tl.sum(lanes, axis=0)
    tl.store(totals_ptr + row, tl.sqrt(total) if ROOT else total)


def row_totals(parts: Tensor, *, root: bool = False) -> Tensor:
    """Σ_m parts[n, m], or its square root.

    Args:
        parts: [N, M] float32, contiguous.
    Returns:
        [N] float32, the same bits in a row whatever the other rows.
    """
    totals = parts.new_empty(len(parts))
    if len(parts):
        with torch.cuda.device_of(parts):
            _row_totals_kernel[(len(parts),)](parts, totals, parts.shape[1], ROOT=root, COLUMNS=_COLUMNS)
    return totals
