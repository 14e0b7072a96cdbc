"""Float32 states as three bfloat16 terms, which hold their 24 bits, for products with bfloat16 tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched
from .sizes import cdiv

TERMS = 3
STEP = 64  # rows of terms are padded to multiples of it; the depth of a step of a product divides it

_COLUMNS = 1024  # of a row, for one program


@triton.jit
def split(a):
    """High, middle and low term, in float32; a number that is not finite has a high term alone."""
    finite = tl.abs(a) < float("inf")
    high = a.to(tl.bfloat16).to(tl.float32)
    # What rounds to infinity is cut instead: of the 24 bits, 16 are then left for the other two.
    cut = (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    high = tl.where(finite & (tl.abs(high) == float("inf")), cut, high)
    rest = tl.where(finite, a - high, 0.0)
    middle = rest.to(tl.bfloat16).to(tl.float32)
    return high, middle, rest - middle


@launched
@triton.jit(do_not_specialize=["rows", "blocks"])
def _terms_kernel(
    state_ptr,  # [N, H] float32
    row_stride,
    column_stride,
    terms_ptr,  # [TERMS, N, W] bfloat16, contiguous: high, middle, low; 0 past H
    rows,  # N
    width,  # H
    padded,  # W
    blocks,  # of a row
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    at = state_ptr + row * row_stride + column.to(tl.int64) * column_stride
    high, middle, low = split(tl.load(at, mask=column < width, other=0.0))
    at = terms_ptr + row * padded + column
    apart = rows.to(tl.int64) * padded
    tl.store(at, high.to(tl.bfloat16), mask=column < padded)
    tl.store(at + apart, middle.to(tl.bfloat16), mask=column < padded)
    tl.store(at + 2 * apart, low.to(tl.bfloat16), mask=column < padded)


def terms_of(state: Tensor) -> Tensor:
    """The terms of [N, H] float32, any strides: [TERMS, N, W] bfloat16, W ≥ H a multiple of STEP."""
    rows, width = state.shape
    padded = _padded(width)
    terms = torch.empty(TERMS, rows, padded, dtype=torch.bfloat16, device=state.device)
    blocks = cdiv(padded, _COLUMNS)
    if rows:
        with torch.cuda.device_of(state):
            _terms_kernel[(rows * blocks,)](
                state, *state.stride(), terms, rows, width, padded, blocks, COLUMNS=_COLUMNS, num_warps=4
            )
    return terms


def row_bytes(width: int) -> int:
    """Of the terms of a row of H numbers."""
    return 2 * TERMS * _padded(width)


def _padded(width: int) -> int:
    return cdiv(width, STEP) * STEP
