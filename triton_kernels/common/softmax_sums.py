"""The largest logit of each row, its token, and Σ exp((z − max)/τ): from slices, joined in order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponential import exp_base, tempered_exp
from .gumbel import gumbel_row
from .lanes import first_place, lane_sum, larger_or_nan, load_tiles, top_of, vector, warps
from .launch import launched
from .scratch import row_blocks, share
from .sizes import cdiv, next_power_of_2

_SLICE = 4096  # tokens: fixed, so that a row's sums do not depend on the batch
_NOISY_SLICE = 1024  # of a slice whose noise is drawn, some hundred instructions a token
_THREADS = 64  # of a slice's program


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
def _slice_tiles(
    row_ptr,
    column_stride,
    seed,
    position,
    start,
    vocabulary,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    NOISE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A slice of a row of z + g."""
    tiles = load_tiles(row_ptr, column_stride, start, vocabulary, -float("inf"), LANES, TILES, MASKED)
    if NOISE:
        quiet = tiles
        tiles = ()
        for t in tl.static_range(TILES):
            noise = gumbel_row(seed, position, start + t * LANES, LANES)
            tiles += (quiet[t] + noise,)
    return tiles


@triton.jit
def _measure(
    tops_ptr,
    totals_ptr,
    row_ptr,
    column_stride,
    seed,
    position,
    start,
    vocabulary,
    base,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    NOISE: tl.constexpr,
    MASKED: tl.constexpr,
):
    tiles = _slice_tiles(
        row_ptr, column_stride, seed, position, start, vocabulary, LANES, TILES, NOISE, MASKED
    )
    top = top_of(tiles)
    reference = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    total = tl.zeros((LANES,), tl.float32)
    for t in tl.static_range(TILES):
        total += tempered_exp(tiles[t] - reference, base)
    tl.store(tops_ptr, top)
    tl.store(totals_ptr, lane_sum(total, VECTOR))


@launched
@triton.jit(do_not_specialize=["slices"])
def _slice_kernel(
    logits_ptr,  # [N, V]
    row_stride,
    column_stride,
    seed_ptr,  # [N] int64 if NOISE
    position_ptr,  # [N] int64 if NOISE
    tops_ptr,  # [N, slices] float32: the largest, NaN if one is
    totals_ptr,  # [N, slices] float32: Σ exp((z − largest)/τ)
    vocabulary,
    slices,
    base,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    NOISE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // slices
    start = (program % slices).to(tl.int32) * (LANES * TILES)
    tops_ptr += program
    totals_ptr += program
    row_ptr = logits_ptr + row * row_stride
    seed, position = row, row
    if NOISE:
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    whole = start + LANES * TILES <= vocabulary
    if NOISE:
        # What a mask costs does not show beside the noise, whose code is not to be there twice.
        whole = False
    if whole:
        _measure(
            tops_ptr,
            totals_ptr,
            row_ptr,
            column_stride,
            seed,
            position,
            start,
            vocabulary,
            base,
            LANES,
            TILES,
            VECTOR,
            NOISE,
            False,
        )
    else:
        _measure(
            tops_ptr,
            totals_ptr,
            row_ptr,
            column_stride,
            seed,
            position,
            start,
            vocabulary,
            base,
            LANES,
            TILES,
            VECTOR,
            NOISE,
            True,
        )


@launched
@triton.jit(do_not_specialize=["slices"])
def _join_kernel(
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,
    position_ptr,
    tops_ptr,
    totals_ptr,
    top_ptr,
    total_ptr,
    token_ptr,
    status_ptr,
    vocabulary,
    slices,
    base,
    SLICES: tl.constexpr,  # a power of two ≥ slices
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Join the slices of a row; its token is sought in the one that holds the largest z."""
    row = tl.program_id(0).to(tl.int64)
    slice = tl.arange(0, SLICES)
    at = row * slices + slice
    tops = tl.load(tops_ptr + at, mask=slice < slices, other=-float("inf"))
    totals = tl.load(totals_ptr + at, mask=slice < slices, other=0.0)
    top = tl.reduce(tops, 0, larger_or_nan)
    winner = tl.min(tl.where(tops == top, slice, slices - 1), axis=0)
    start = winner * (LANES * TILES)
    seed, position = row, row
    if NOISE:
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    tiles = _slice_tiles(
        row_ptr, column_stride, seed, position, start, vocabulary, LANES, TILES, NOISE, True
    )
    token = tl.minimum(start + first_place(tiles, top), vocabulary - 1)
    status = tl.where(top != top, 1, tl.where(top == float("inf"), 2, tl.where(top == -float("inf"), 3, 0)))
    share = tempered_exp(tops - tl.where(status == 0, top, 0.0), base)
    total = tl.sum(share * totals, axis=0)
    tl.store(top_ptr + row, tl.where(status == 0, top, float("nan")))
    tl.store(total_ptr + row, tl.where(status == 0, total, 1.0))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(status_ptr + row, status.to(tl.int32))


def softmax_sums(logits: Tensor, tau: float, noise: tuple[Tensor, Tensor] | None = None) -> SoftmaxSums:
    """Sums of each row of z = logits + noise. A row's are the same bits whatever the other rows.

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
    width = _THREADS * vector(logits.element_size())
    columns = _SLICE if noise is None else max(_NOISY_SLICE, width)
    lanes = {"LANES": width, "TILES": columns // width, "NOISE": noise is not None}
    slices = cdiv(vocabulary, columns)
    for part in row_blocks(rows, 8 * slices, share(1)):
        of_part = (noise[0][part], noise[1][part]) if noise else None
        _sum(logits[part], tau, of_part, sums.part(part), slices, lanes)
    return sums


def _sum(
    logits: Tensor,
    tau: float,
    noise: tuple[Tensor, Tensor] | None,
    sums: SoftmaxSums,
    slices: int,
    lanes: dict[str, int],
) -> None:
    rows, vocabulary = logits.shape
    tops, totals = logits.new_empty(2, rows, slices, dtype=torch.float32)
    given = (logits, *logits.stride(), *(noise or (sums.token, sums.token)), tops, totals)
    base, options = exp_base(tau), {"num_warps": warps(_THREADS), "enable_fp_fusion": False}
    with torch.cuda.device_of(logits):
        _slice_kernel[(rows * slices,)](
            *given, vocabulary, slices, base, VECTOR=vector(logits.element_size()), **lanes, **options
        )
        _join_kernel[(rows,)](
            *given,
            *sums,
            vocabulary,
            slices,
            base,
            SLICES=next_power_of_2(slices),
            **lanes,
            **options,
        )
