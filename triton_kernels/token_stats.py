"""Logsumexp, confidence, entropy and argmax of rows of logits, or of hidden states under a head.

Programs take the sums of slices of the vocabulary, relative to the slice's largest logit; another
kernel joins the slices of a row in a fixed order, in double precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.exponential import exp, inverse_parts, scaled
from .common.products import operands, tile_arguments, tile_of, upcast, vocabulary_tile

_TILE = 4096  # tokens of a slice of logits
# Statistics after a product hold several tiles in registers: smaller ones than of a product alone.
_TILES = {
    "half": {"ROWS": 64, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
    "split": {"ROWS": 64, "COLUMNS": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 2},
    "float32": {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 2},
}
_JOINED = 1024  # slices joined at a time
# Sums of a slice: the largest logit; its token, less _NAN if a logit is NaN; how many tokens are at the
# largest; over the others Σ exp(x) and Σ x exp(x), x = (z − largest)/τ. Tokens at the largest are
# counted apart: added to 1, a sum below 2⁻²⁴ would be lost, and with it the entropy of a peaked row.
_FIELDS = tl.constexpr(5)
_TOP, _TOKEN, _COUNT, _SUM, _SUM_X = (tl.constexpr(n) for n in range(5))
_NAN = tl.constexpr(1 << 21)  # more than any token; float32 holds the differences


@triton.jit
def _store_slice(
    parts_ptr,  # [N, _FIELDS, slices] float32
    row,  # [ROWS] int64
    slice,
    rows,
    slices,
    z,  # [ROWS, COLUMNS], −inf past the vocabulary
    column,  # [COLUMNS] int32
    inverse,
    inverse_low,
):
    nan = z != z
    clean = tl.where(nan, -float("inf"), z)
    top = tl.max(clean, axis=1)
    at_top = clean == top[:, None]
    token = column[None, :]
    key = tl.min(tl.where(nan, token - _NAN, tl.where(at_top, token, _NAN)), axis=1)
    reference = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    x = scaled(clean - reference[:, None], inverse, inverse_low)
    e = tl.where(at_top, 0.0, exp(x))
    at = parts_ptr + row * (_FIELDS * slices) + slice
    there = row < rows
    tl.store(at + _TOP * slices, top, mask=there)
    tl.store(at + _TOKEN * slices, key.to(tl.float32), mask=there)
    tl.store(at + _COUNT * slices, tl.sum(at_top.to(tl.float32), axis=1), mask=there)
    tl.store(at + _SUM * slices, tl.sum(e, axis=1), mask=there)
    tl.store(at + _SUM_X * slices, tl.sum(tl.where(e > 0, x, 0.0) * e, axis=1), mask=there)


@triton.jit
def _logits_kernel(
    logits_ptr,  # [N, V]
    row_stride,
    column_stride,
    parts_ptr,  # [N, _FIELDS, slices] float32
    rows,
    vocabulary,
    slices,
    inverse,
    inverse_low,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // slices).to(tl.int64) + tl.zeros((1,), tl.int64)
    slice = tl.program_id(0) % slices
    column = slice * COLUMNS + tl.arange(0, COLUMNS)
    at = logits_ptr + row[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    z = tl.load(at, mask=(column < vocabulary)[None, :], other=-float("inf")).to(tl.float32)
    _store_slice(parts_ptr, row, slice, rows, slices, z, column, inverse, inverse_low)


@triton.jit
def _hidden_kernel(
    states,
    tables,
    state_strides,
    table_strides,
    widths,
    parts_ptr,  # [N, _FIELDS, slices] float32
    rows,
    vocabulary,
    tiles_of_rows,
    slices,
    inverse,
    inverse_low,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row, column, slice = tile_of(tiles_of_rows, rows, vocabulary, ROWS, COLUMNS)
    z = vocabulary_tile(
        states,
        tables,
        state_strides,
        table_strides,
        widths,
        tl.minimum(row, rows - 1),
        tl.minimum(column, vocabulary - 1),
        ROWS,
        COLUMNS,
        DEPTH,
        UPCAST,
    )
    z = tl.where((column < vocabulary)[None, :], z, -float("inf"))
    column = column.to(tl.int32)
    _store_slice(parts_ptr, row, slice, rows, slices, z, column, inverse, inverse_low)


@triton.jit
def _log1p(x):
    """log(1 + x) of x ≥ 0 in double precision: 1 + x loses the end of x, and so does what it is
    divided by."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))


@triton.jit
def _join_kernel(
    parts_ptr,  # [N, _FIELDS, slices] float32
    logsumexp_ptr,  # [N] float32
    confidence_ptr,  # [N] float32
    entropy_ptr,  # [N] float32
    argmax_ptr,  # [N] int64
    status_ptr,  # [N] int32
    slices,
    inverse,
    inverse_low,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    parts_ptr += row * (_FIELDS * slices)
    slice = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, slices, BLOCK):
        at = parts_ptr + _TOP * slices + start + slice
        best = tl.maximum(best, tl.load(at, mask=slice < slices - start, other=-float("inf")))
    top = tl.max(best, axis=0)
    reference = tl.where(tl.abs(top) < float("inf"), top, 0.0)

    keys = tl.full((BLOCK,), 1 << 21, tl.float32)
    at_top = tl.zeros((BLOCK,), tl.float64)
    others = tl.zeros((BLOCK,), tl.float64)
    sum_x = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, slices, BLOCK):
        there = slice < slices - start
        at = parts_ptr + start + slice
        tops = tl.load(at + _TOP * slices, mask=there, other=-float("inf"))
        key = tl.load(at + _TOKEN * slices, mask=there, other=1 << 21)
        count = tl.load(at + _COUNT * slices, mask=there, other=0.0).to(tl.float64)
        part = tl.load(at + _SUM * slices, mask=there, other=0.0).to(tl.float64)
        part_x = tl.load(at + _SUM_X * slices, mask=there, other=0.0).to(tl.float64)
        here = tops == top
        keys = tl.minimum(keys, tl.where(here | (key < 0), key, 1 << 21))
        # A slice below the largest logit moves to it; so does one that holds nothing, by far.
        distance = tl.maximum(tops.to(tl.float64) - reference, -1e30)
        distance = tl.minimum(distance * inverse + distance * inverse_low, 0.0)
        share = tl.where(here, 0.0, tl.exp(distance))
        at_top += tl.where(here, count, 0.0)
        others += tl.where(here, part, share * (count + part))
        sum_x += tl.where(here, part_x, share * (part_x + distance * (count + part)))
    key = tl.min(keys, axis=0)
    infinite = tl.where(top == float("inf"), 2, tl.where(top == -float("inf"), 3, 0))
    status = tl.where(key < 0, 1, infinite)
    good = status == 0
    count = tl.where(good, tl.sum(at_top, axis=0), 1.0)
    other = tl.where(good, tl.sum(others, axis=0), 0.0)
    log_total = tl.log(count) + _log1p(other / count)
    wide = reference.to(tl.float64)
    logsumexp = wide * inverse + wide * inverse_low + log_total
    entropy = log_total - tl.sum(sum_x, axis=0) / (count + other)
    nan = float("nan")
    tl.store(logsumexp_ptr + row, tl.where(good, logsumexp, nan).to(tl.float32))
    tl.store(confidence_ptr + row, tl.where(good, 1.0 / (count + other), nan).to(tl.float32))
    tl.store(entropy_ptr + row, tl.where(good, entropy, nan).to(tl.float32))
    tl.store(argmax_ptr + row, tl.where(good, key, -1.0).to(tl.int64))
    tl.store(status_ptr + row, status.to(tl.int32))


def token_stats(rows: Tensor, head: Tensor | None, tau: float) -> tuple[Tensor, ...]:
    """As ``nabla_fast.ops.token_stats``. A row's numbers are the same bits whatever the other rows.

    Args:
        rows: logits [N, V], or hidden states [N, H] with ``head``; float32, bfloat16 or float16, any
            strides.
        head: [V, H], likewise, or None.
        tau: τ in [2⁻⁶⁴, 2⁶⁴].
    Returns:
        logsumexp, confidence, entropy [N] float32, argmax [N] int64, status [N] int32; of a row with
        another status than 0, NaN and −1.
    """
    count, device = len(rows), rows.device
    results = [torch.empty(count, dtype=torch.float32, device=device) for _ in range(3)]
    results += [torch.empty(count, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32)]
    if count == 0:
        return tuple(results)
    inverse = inverse_parts(tau)
    vocabulary = rows.shape[1] if head is None else len(head)
    config = {"COLUMNS": _TILE, "num_warps": 8}
    if head is not None:
        config = _TILES[operands([rows], [head])]
    slices = triton.cdiv(vocabulary, config["COLUMNS"])
    parts = torch.empty(count, _FIELDS.value, slices, dtype=torch.float32, device=device)
    with torch.cuda.device_of(rows):
        if head is None:
            _logits_kernel[(count * slices,)](
                rows, *rows.stride(), parts, count, vocabulary, slices, *inverse, **config
            )
        else:
            tiles = triton.cdiv(count, config["ROWS"])
            _hidden_kernel[(tiles * slices,)](
                *tile_arguments([rows], [head]),
                parts,
                count,
                vocabulary,
                tiles,
                slices,
                *inverse,
                UPCAST=upcast(rows),
                **config,
            )
        block = min(_JOINED, triton.next_power_of_2(slices))
        _join_kernel[(count,)](parts, *results, slices, *inverse, BLOCK=block)
    return tuple(results)
