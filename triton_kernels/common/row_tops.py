"""The largest logit of each slice of a row and its token: what a maximum of a row is joined from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched
from .sizes import cdiv, next_power_of_2
from .vocabulary_chunks import SLICE, WARPS, logits_slice

Noise = tuple[Tensor, Tensor] | None


@launched
@triton.jit(do_not_specialize=["first_slice", "chunk_slices", "slices"])
def _tops_kernel(
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,
    position_ptr,
    tops_ptr,  # [N, slices] float32: NaN where a logit of the slice is
    tokens_ptr,  # [N, slices] int32
    end,
    origin,
    first_slice,
    chunk_slices,
    slices,
    COLUMNS: tl.constexpr,
    NOISE: tl.constexpr,
):
    row = (tl.program_id(0) // chunk_slices).to(tl.int64)
    slice = first_slice + tl.program_id(0) % chunk_slices
    start = slice * COLUMNS
    z = logits_slice(
        logits_ptr,
        row_stride,
        column_stride,
        seed_ptr,
        position_ptr,
        row,
        start,
        end,
        origin,
        COLUMNS,
        NOISE,
    )
    nan = tl.max((z != z).to(tl.int32), axis=0)
    top = tl.max(tl.where(z != z, -float("inf"), z), axis=0)
    token = tl.min(tl.where(z == top, start + tl.arange(0, COLUMNS), end - 1), axis=0)
    at = row * slices + slice
    tl.store(tops_ptr + at, tl.where(nan > 0, float("nan"), top))
    tl.store(tokens_ptr + at, token)


@triton.jit
def row_status(tops, top):
    """The code of a row: 0 good, 1 NaN, 2 +inf, 3 no finite logit.

    Args:
        tops: its slices' largest logits.
        top: the largest of those that are numbers.
    """
    nan = tl.max((tops != tops).to(tl.int32), axis=0)
    infinite = tl.where(top == float("inf"), 2, tl.where(top == -float("inf"), 3, 0))
    return tl.where(nan > 0, 1, infinite).to(tl.int32)


@launched
@triton.jit(do_not_specialize=["slices"])
def _join_kernel(
    tops_ptr,  # [N, slices] float32
    tokens_ptr,  # [N, slices] int32
    token_ptr,  # [N] int64
    status_ptr,  # [N] int32
    slices,
    SLICES: tl.constexpr,  # a power of two ≥ slices
):
    row = tl.program_id(0).to(tl.int64)
    slice = tl.arange(0, SLICES)
    tops = tl.load(tops_ptr + row * slices + slice, mask=slice < slices, other=-float("inf"))
    tokens = tl.load(tokens_ptr + row * slices + slice, mask=slice < slices, other=1 << 30)
    top = tl.max(tl.where(tops == tops, tops, -float("inf")), axis=0)
    token = tl.min(tl.where(tops == top, tokens, 1 << 30), axis=0)
    status = row_status(tops, top)
    tl.store(token_ptr + row, tl.where(status == 0, token, 0).to(tl.int64))
    tl.store(status_ptr + row, status)


class RowTops:
    """The largest logits of the slices of some rows, filled chunk by chunk.

    Its memory serves one part of the rows after another, of at most N.

    Attributes:
        tops: [N, slices] float32; NaN where a logit of the slice is.
        tokens: [N, slices] int32, the lowest index among equals.
    """

    def __init__(self, like: Tensor, rows: int, vocabulary: int):
        self.slices = cdiv(vocabulary, SLICE)
        self.tops = like.new_empty(rows, self.slices, dtype=torch.float32)
        self.tokens = like.new_empty(rows, self.slices, dtype=torch.int32)

    def measure(self, logits: Tensor, noise: Noise, first: int, end: int, origin: int) -> None:
        """The tokens first..end − 1, a chunk.

        Args:
            logits: [N, ..], whose first column is the token ``origin``.
            noise: seed and position [N] int64, contiguous, or None.
        """
        of_chunk = cdiv(end - first, SLICE)
        with torch.cuda.device_of(logits):
            _tops_kernel[(len(logits) * of_chunk,)](
                logits,
                *logits.stride(),
                *(noise or (self.tokens, self.tokens)),
                self.tops,
                self.tokens,
                end,
                origin,
                first // SLICE,
                of_chunk,
                self.slices,
                COLUMNS=SLICE,
                NOISE=noise is not None,
                # Noise in double precision takes registers.
                num_warps=WARPS if noise is None else 2 * WARPS,
            )

    def join(self, token: Tensor, status: Tensor) -> None:
        """The rows' tokens [N] int64 and status [N] int32, into these; a bad row has token 0."""
        with torch.cuda.device_of(token):
            _join_kernel[(len(token),)](
                self.tops,
                self.tokens,
                token,
                status,
                self.slices,
                SLICES=next_power_of_2(self.slices),
                num_warps=4,
            )
