"""The largest logit of each row, its token, and Σ exp((z − max)/τ): from slices, joined in order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponential import exp, inverse_parts, scaled
from .gumbel import gumbel_tile
from .scratch import row_blocks, share

_COLUMNS = 4096  # of a slice: fixed, so that a row's sums do not depend on the batch


class SoftmaxSums(NamedTuple):
    """Sums of each row of z that p = exp((z − top)/τ) / total needs, and the row's hard token."""

    top: Tensor  # [N] float32; NaN in a bad row
    total: Tensor  # [N] float32; 1 in a bad row
    token: Tensor  # [N] int64, the lowest index among equals; in 0..V−1 whatever the row
    status: Tensor  # [N] int32: 0 good, 1 NaN, 2 +inf, 3 no finite logit

    def part(self, rows: slice) -> SoftmaxSums:
        """Those of some of the rows."""
        return SoftmaxSums(*(field[rows] for field in self))


@triton.jit
def perturbed_tile(
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,  # [N] int64 if NOISE
    position_ptr,  # [N] int64 if NOISE
    row,  # [ROWS] int64, in 0..N−1
    start,  # a multiple of 4
    vocabulary,
    COLUMNS: tl.constexpr,
    NOISE: tl.constexpr,
):
    """A tile of z + g in float32, −inf past the vocabulary: [ROWS, COLUMNS]."""
    column = start + tl.arange(0, COLUMNS)
    at = logits_ptr + row[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    z = tl.load(at, mask=(column < vocabulary)[None, :], other=-float("inf")).to(tl.float32)
    if NOISE:
        z += gumbel_tile(tl.load(seed_ptr + row), tl.load(position_ptr + row), start, COLUMNS)
    return z


@triton.jit
def exp_tile(z, top, inverse, inverse_low):
    """exp((z − top)/τ) of a tile [ROWS, COLUMNS] with top [ROWS]; 0 where z is −inf, and in bad rows."""
    difference = z - top[:, None]
    difference = tl.where(difference == difference, difference, -float("inf"))
    return exp(scaled(difference, inverse, inverse_low))


@triton.jit(do_not_specialize=["slices"])
def _slice_kernel(
    logits_ptr,  # [N, V]
    row_stride,
    column_stride,
    seed_ptr,
    position_ptr,
    tops_ptr,  # [N, slices] float32
    totals_ptr,  # [N, slices] float32
    keys_ptr,  # [N, slices] int32: the token; −1 if a logit is NaN
    vocabulary,
    slices,
    inverse,
    inverse_low,
    COLUMNS: tl.constexpr,
    NOISE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // slices + tl.zeros((1,), tl.int64)
    start = (program % slices).to(tl.int32) * COLUMNS
    z = perturbed_tile(
        logits_ptr,
        row_stride,
        column_stride,
        seed_ptr,
        position_ptr,
        row,
        start,
        vocabulary,
        COLUMNS,
        NOISE,
    )
    bad = tl.max((z != z).to(tl.int32), axis=1)
    z = tl.where(z != z, -float("inf"), z)
    top = tl.max(z, axis=1)
    column = start + tl.arange(0, COLUMNS)[None, :]
    token = tl.min(tl.where(z == top[:, None], column, vocabulary - 1), axis=1)
    finite = tl.abs(top) < float("inf")
    kept = tl.where(finite[:, None], z, -float("inf"))
    total = tl.sum(exp_tile(kept, tl.where(finite, top, 0.0), inverse, inverse_low), axis=1)
    at = program + tl.zeros((1,), tl.int64)
    tl.store(tops_ptr + at, top)
    tl.store(totals_ptr + at, total)
    tl.store(keys_ptr + at, tl.where(bad > 0, -1, token))


@triton.jit(do_not_specialize=["slices"])
def _join_kernel(
    tops_ptr,
    totals_ptr,
    keys_ptr,
    top_ptr,
    total_ptr,
    token_ptr,
    status_ptr,
    slices,
    inverse,
    inverse_low,
    SLICES: tl.constexpr,  # a power of two ≥ slices
):
    row = tl.program_id(0).to(tl.int64)
    slice = tl.arange(0, SLICES)
    at = row * slices + slice
    tops = tl.load(tops_ptr + at, mask=slice < slices, other=-float("inf"))
    totals = tl.load(totals_ptr + at, mask=slice < slices, other=0.0)
    keys = tl.load(keys_ptr + at, mask=slice < slices, other=1 << 30)
    top = tl.max(tops, axis=0)
    token = tl.min(tl.where(tops == top, keys, 1 << 30), axis=0)
    infinite = tl.where(top == float("inf"), 2, tl.where(top == -float("inf"), 3, 0))
    status = tl.where(tl.min(keys, axis=0) < 0, 1, infinite)
    kept = tl.where(status == 0, tops, -float("inf"))
    share = exp(scaled(kept - tl.where(status == 0, top, 0.0), inverse, inverse_low))
    total = tl.sum(share * totals, axis=0)
    tl.store(top_ptr + row, tl.where(status == 0, top, float("nan")))
    tl.store(total_ptr + row, tl.where(status == 0, total, 1.0))
    tl.store(token_ptr + row, tl.maximum(token, 0).to(tl.int64))
    tl.store(status_ptr + row, status.to(tl.int32))


def softmax_sums(logits: Tensor, tau: float, noise: tuple[Tensor, Tensor] | None = None) -> SoftmaxSums:
    """Sums of each row of z = logits + noise.

    Args:
        logits: [N, V] float32, bfloat16 or float16, any strides.
        tau: τ.
        noise: seed and position [N] int64 of the rows' Gumbel noise, contiguous, or None.
    """
    rows, vocabulary = logits.shape
    sums = SoftmaxSums(
        *(logits.new_empty(rows, dtype=dtype) for dtype in (torch.float32, torch.float32)),
        *(logits.new_empty(rows, dtype=dtype) for dtype in (torch.int64, torch.int32)),
    )
    row_bytes = 12 * triton.cdiv(vocabulary, _COLUMNS)
    for part in row_blocks(rows, row_bytes, share(1)):
        of_part = (noise[0][part], noise[1][part]) if noise else None
        _sum(logits[part], tau, of_part, sums.part(part))
    return sums


def _sum(logits: Tensor, tau: float, noise: tuple[Tensor, Tensor] | None, sums: SoftmaxSums) -> None:
    rows, vocabulary = logits.shape
    slices = triton.cdiv(vocabulary, _COLUMNS)
    tops, totals = (logits.new_empty(rows, slices, dtype=torch.float32) for _ in range(2))
    keys = logits.new_empty(rows, slices, dtype=torch.int32)
    inverse, inverse_low = inverse_parts(tau)
    with torch.cuda.device_of(logits):
        _slice_kernel[(rows * slices,)](
            logits,
            *logits.stride(),
            *(noise or (keys, keys)),
            tops,
            totals,
            keys,
            vocabulary,
            slices,
            inverse,
            inverse_low,
            COLUMNS=_COLUMNS,
            NOISE=noise is not None,
        )
        _join_kernel[(rows,)](
            tops,
            totals,
            keys,
            *sums,
            slices,
            inverse,
            inverse_low,
            SLICES=triton.next_power_of_2(slices),
        )
