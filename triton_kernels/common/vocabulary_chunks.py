"""Chunks of the vocabulary, as many tokens as the L2 cache holds for the rows at hand, and their slices.

A chunk is what one library product takes; a slice is what one program of an elementwise kernel takes. A
row's slices have fixed places, whatever the chunks are, so that its sums do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl

from . import scratch
from .gumbel import gumbel_row
from .sizes import cdiv

SLICE = 4096  # tokens
WARPS = 8  # of a slice's program
CHUNK_SHARE = 9  # sixteenths of the scratch memory: 36 MB, of the 50 MB that Hopper's L2 cache has


class Partition(NamedTuple):
    """How a problem of N rows and V tokens is cut."""

    rows: list[slice]
    tokens: int  # of a chunk, a multiple of SLICE

    @property
    def most_rows(self) -> int:
        """Of a part: its scratch memory serves the others too."""
        return max((part.stop - part.start for part in self.rows), default=0)

    def chunks(self, vocabulary: int) -> Iterator[tuple[int, int]]:
        """First token and end of each chunk."""
        for first in range(0, vocabulary, self.tokens):
            yield first, min(first + self.tokens, vocabulary)


def partition(rows: int, vocabulary: int, *, row_bytes: int, token_bytes: int) -> Partition:
    """Parts of the rows and chunks of the vocabulary whose scratch memory fits.

    Args:
        row_bytes: that a row of a part takes.
        token_bytes: that a token of a chunk takes for each row of a part.
    """
    budget = scratch.share(15)
    fewest = min(SLICE, vocabulary)
    cut = Partition(list(scratch.row_blocks(rows, row_bytes + fewest * token_bytes, budget)), SLICE)
    most = max(cut.most_rows, 1)
    left = min(budget - most * row_bytes, scratch.share(CHUNK_SHARE))
    tokens = max(left // (most * max(1, token_bytes)) // SLICE, 1) * SLICE
    # Chunks of nearly equal size.
    slices, per_chunk = cdiv(vocabulary, SLICE), tokens // SLICE
    return cut._replace(tokens=cdiv(slices, cdiv(slices, per_chunk)) * SLICE)


@triton.jit
def logits_slice(
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,  # [N] int64 if NOISE
    position_ptr,  # [N] int64 if NOISE
    row,  # int64
    start,  # the slice's first token, a multiple of 4
    end,  # of the chunk
    origin,  # token of the logits' first column
    COLUMNS: tl.constexpr,
    NOISE: tl.constexpr,
):
    """z + g of a slice in float32, −inf past the chunk: [COLUMNS]."""
    token = start + tl.arange(0, COLUMNS)
    at = logits_ptr + row * row_stride + (token - origin).to(tl.int64) * column_stride
    z = tl.load(at, mask=token < end, other=-float("inf")).to(tl.float32)
    if NOISE:
        z += gumbel_row(tl.load(seed_ptr + row), tl.load(position_ptr + row), start, COLUMNS)
    return z
