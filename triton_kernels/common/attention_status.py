"""What kernels of attention say of a sequence's block table."""

from __future__ import annotations

import triton
import triton.language as tl

OUTSIDE = tl.constexpr(4)  # a table names what is not in the pool, or is too short
_ENTRIES = tl.constexpr(128)  # checked at a time


@triton.jit
def store_status(status_ptr, table_ptr, table_stride, length, blocks, entries, BLOCK: tl.constexpr):
    """Whether a prefix fits its table, and its blocks the pool."""
    bad = (length < 0) | (length > entries * BLOCK)
    used = tl.minimum(tl.maximum(length + BLOCK - 1, 0) // BLOCK, entries)
    outside = tl.zeros((_ENTRIES,), tl.int32)
    for first in range(0, used, _ENTRIES):
        entry = first + tl.arange(0, _ENTRIES)
        block = tl.load(table_ptr + entry.to(tl.int64) * table_stride, mask=entry < used, other=0)
        outside += ((entry < used) & ((block < 0) | (block >= blocks))).to(tl.int32)
    bad = bad | (tl.sum(outside, axis=0) > 0)
    tl.store(status_ptr, tl.where(bad, OUTSIDE, 0))
