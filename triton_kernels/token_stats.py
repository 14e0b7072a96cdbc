"""Logsumexp, confidence, entropy and argmax of rows of logits, or of hidden states under a head.

Programs take the sums of slices of the vocabulary, relative to the slice's largest logit; another
kernel joins the slices of a row in a fixed order, in double precision.

The sums of a row are those over the tokens other than its hard token: added to that one's 1, a sum below
2⁻²⁴ would be lost, and with it the entropy of a peaked row. Which token that is costs a comparison an
element, so a slice of logits leaves the sums over all of its tokens, and the join reads the one slice
again that holds the largest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.exponential import exp_base, inverse_tau, tempered_exp
from .common.lanes import (
    first_place,
    in_pairs,
    lane_sums,
    larger_or_nan,
    load_pairs,
    load_tiles,
    top_of,
    vector,
    warps,
)
from .common.launch import launched
from .common.products import parts_in_terms, tile_arguments, tile_config, tile_of, upcast, vocabulary_tile
from .common.sizes import cdiv, next_power_of_2

_SLICE = 4096  # tokens of a slice of logits
# What a thread does once, whatever it sums, it does for 128 bfloat16 tokens where one warp takes a slice. A
# row's join waits for its own steps, and has fewer of them in more warps.
_THREADS = 64 if torch.version.hip else 32
_JOIN_THREADS = 64
_JOINED = 1024  # slices joined at a time
# Sums of a slice: the largest logit, NaN if one is; Σ exp(x/τ) and Σ x exp(x/τ), x = z − largest; and of
# a slice of products, whose logits lie nowhere: the token, which is then left out of the sums.
_FIELDS = tl.constexpr(3)
_TOP, _SUM, _SUM_X, _TOKEN = (tl.constexpr(n) for n in range(4))


@triton.jit
def _reference(top):
    """What the differences of a slice are taken from."""
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def _weights(tiles, t: tl.constexpr, reference, skipped, base, SKIP: tl.constexpr):
    """x and exp(x/τ) of a tile of :func:`_slice_sums`."""
    # From −inf on, a number whose exponential is 0 too.
    x = tl.maximum(tiles[t] - reference, base[2])
    e = tempered_exp(x, base)
    if SKIP:
        lanes: tl.constexpr = tiles[0].shape[0]
        e = tl.where(tl.arange(0, lanes) == skipped - t * lanes, 0.0, e)
    return x, e


@triton.jit
def _slice_sums(
    tiles, top, skipped, base, SKIP: tl.constexpr, VECTOR: tl.constexpr, PAIRS: tl.constexpr = False
):
    """Σ exp(x/τ) and Σ x exp(x/τ) of a slice, x = z − top, without the token at ``skipped`` if SKIP.

    The same bits from tiles as :func:`load_tiles` and as :func:`load_pairs` has them, these if PAIRS.
    """
    apart: tl.constexpr = 2 if PAIRS else 1
    reference = _reference(top)
    totals, totals_x = (), ()
    for first in tl.static_range(apart):
        x, total = _weights(tiles, first, reference, skipped, base, SKIP)
        total_x = x * total
        for t in tl.static_range(first + apart, len(tiles), apart):
            x, e = _weights(tiles, t, reference, skipped, base, SKIP)
            total += e
            total_x = tl.fma(x, e, total_x)
        totals += (total,)
        totals_x += (total_x,)
    if PAIRS:
        return lane_sums(totals[0] + totals[1], totals_x[0] + totals_x[1], VECTOR // 2)
    else:
        return lane_sums(totals[0], totals_x[0], VECTOR)


@triton.jit
def _measure(
    row_ptr,
    column_stride,
    start,
    vocabulary,
    base,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The largest logit of a slice, and its sums."""
    if PAIRS:
        tiles = load_pairs(row_ptr, start, vocabulary, LANES, TILES, MASKED)
    else:
        tiles = load_tiles(row_ptr, column_stride, start, vocabulary, -float("inf"), LANES, TILES, MASKED)
    top = top_of(tiles)
    total, total_x = _slice_sums(tiles, top, 0, base, False, VECTOR, PAIRS)
    return top, total, total_x


@launched
@triton.jit(do_not_specialize=["slices"])
def _logits_kernel(
    logits_ptr,  # [N, V], or [N, V/2] int32 if PAIRS
    row_stride,
    column_stride,
    parts_ptr,  # [N, _FIELDS, slices] float32
    vocabulary,  # V
    slices,
    base,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slice = tl.program_id(1)
    start = slice * (LANES * TILES)
    row_ptr = logits_ptr + row * row_stride
    if start + LANES * TILES <= vocabulary:
        top, total, total_x = _measure(
            row_ptr, column_stride, start, vocabulary, base, LANES, TILES, VECTOR, PAIRS, False
        )
    else:
        top, total, total_x = _measure(
            row_ptr, column_stride, start, vocabulary, base, LANES, TILES, VECTOR, PAIRS, True
        )
    # Made here, and not twice above: a compiler would hold it in registers through the sums.
    parts_ptr += row * (_FIELDS * slices) + slice
    tl.store(parts_ptr + _TOP * slices, top)
    tl.store(parts_ptr + _SUM * slices, total)
    tl.store(parts_ptr + _SUM_X * slices, total_x)


@launched
@triton.jit(do_not_specialize=["rows", "tiles_of_rows", "slices"])
def _hidden_kernel(
    states,
    tables,
    state_strides,
    table_strides,
    widths,
    parts_ptr,  # [N, _FIELDS + 1, slices] float32
    rows,
    vocabulary,
    tiles_of_rows,
    slices,
    base,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row, column, slice = tile_of(tiles_of_rows, vocabulary, state_strides, ROWS, COLUMNS)
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
    token = column.to(tl.int32)[None, :]
    top = tl.reduce(z, 1, larger_or_nan)
    key = tl.min(tl.where(z == top[:, None], token, vocabulary - 1), axis=1)
    x = tl.maximum(z - _reference(top)[:, None], base[2])
    e = tl.where(token == key[:, None], 0.0, tempered_exp(x, base))
    at = parts_ptr + row * ((_FIELDS + 1) * slices) + slice
    there = row < rows
    tl.store(at + _TOP * slices, top, mask=there)
    tl.store(at + _SUM * slices, tl.sum(e, axis=1), mask=there)
    tl.store(at + _SUM_X * slices, tl.sum(x * e, axis=1), mask=there)
    tl.store(at + _TOKEN * slices, key.to(tl.float32), mask=there)


@triton.jit
def _log1p(x):
    """log(1 + x) of x ≥ 0 in double precision: 1 + x loses the end of x, and so does what it is
    divided by."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))


@launched
@triton.jit(do_not_specialize=["slices"])
def _join_kernel(
    logits_ptr,  # [N, V]; None after products
    row_stride,
    column_stride,
    parts_ptr,  # [N, _FIELDS, slices] float32; of products [N, _FIELDS + 1, slices]
    logsumexp_ptr,  # [N] float32
    confidence_ptr,  # [N] float32
    entropy_ptr,  # [N] float32
    argmax_ptr,  # [N] int64
    status_ptr,  # [N] int32
    vocabulary,
    slices,
    base,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    FIELDS: tl.constexpr = _FIELDS + (1 if logits_ptr is None else 0)
    parts_ptr += row * (FIELDS * slices)
    slice = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, slices, BLOCK):
        tops = tl.load(
            parts_ptr + _TOP * slices + start + slice, mask=slice < slices - start, other=-float("inf")
        )
        best = larger_or_nan(best, tops)
    top = tl.reduce(best, 0, larger_or_nan)
    found = tl.full((BLOCK,), 1 << 30, tl.int32)
    for start in range(0, slices, BLOCK):
        tops = tl.load(
            parts_ptr + _TOP * slices + start + slice, mask=slice < slices - start, other=float("nan")
        )
        found = tl.minimum(found, tl.where(tops == top, start + slice, 1 << 30))
    # The first slice that holds the largest logit; where there is none, any.
    winner = tl.minimum(tl.min(found, axis=0), slices - 1)

    inverse = inverse_tau(base)
    reference = _reference(top).to(tl.float64)
    others = tl.zeros((BLOCK,), tl.float64)
    sum_x = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, slices, BLOCK):
        there = (slice < slices - start) & (start + slice != winner)
        at = parts_ptr + start + slice
        tops = tl.load(at + _TOP * slices, mask=there, other=-float("inf"))
        part = tl.load(at + _SUM * slices, mask=there, other=0.0).to(tl.float64)
        part_x = tl.load(at + _SUM_X * slices, mask=there, other=0.0).to(tl.float64)
        if logits_ptr is None:
            part += 1.0
        # A slice below the largest logit moves to it; so does one that holds nothing, by far.
        distance = tl.minimum(tl.maximum(tops.to(tl.float64) - reference, -1e30) * inverse, 0.0)
        share = tl.exp(distance)
        others += share * part
        sum_x += share * (part_x * inverse + distance * part)
    if logits_ptr is None:
        own = tl.load(parts_ptr + _SUM * slices + winner)
        own_x = tl.load(parts_ptr + _SUM_X * slices + winner)
        token = tl.load(parts_ptr + _TOKEN * slices + winner).to(tl.int32)
    else:
        start = winner * (LANES * TILES)
        row_ptr = logits_ptr + row * row_stride
        tiles = load_tiles(row_ptr, column_stride, start, vocabulary, -float("inf"), LANES, TILES, True)
        place = first_place(tiles, top)
        own, own_x = _slice_sums(tiles, top, place, base, True, VECTOR)
        token = start + place
    status = tl.where(top != top, 1, tl.where(top == float("inf"), 2, tl.where(top == -float("inf"), 3, 0)))
    good = status == 0
    other = tl.where(good, tl.sum(others, axis=0) + own.to(tl.float64), 0.0)
    log_total = _log1p(other)
    entropy = log_total - (tl.sum(sum_x, axis=0) + own_x.to(tl.float64) * inverse) / (1.0 + other)
    nan = float("nan")
    tl.store(logsumexp_ptr + row, tl.where(good, reference * inverse + log_total, nan).to(tl.float32))
    tl.store(confidence_ptr + row, tl.where(good, 1.0 / (1.0 + other), nan).to(tl.float32))
    tl.store(entropy_ptr + row, tl.where(good, entropy, nan).to(tl.float32))
    tl.store(argmax_ptr + row, tl.where(good, token, -1).to(tl.int64))
    tl.store(status_ptr + row, status.to(tl.int32))


def _lanes(rows: Tensor, threads: int) -> dict[str, int]:
    """How a slice falls into tiles, a vector of each for a thread."""
    width = vector(rows.element_size())
    return {"VECTOR": width, "LANES": threads * width, "TILES": _SLICE // (threads * width)}


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
    # What a compiler would contract is written as fma: it must not choose, by what surrounds it.
    base, options = exp_base(tau), {"enable_fp_fusion": False}
    vocabulary = rows.shape[1] if head is None else len(head)
    config = None if head is None else tile_config("vocabulary_statistics", [rows], [head])
    slices = cdiv(vocabulary, _SLICE if config is None else config["COLUMNS"])
    fields = _FIELDS.value + (config is not None)
    parts = torch.empty(count, fields, slices, dtype=torch.float32, device=device)
    with torch.cuda.device_of(rows):
        if config is None:
            logits = (rows, *rows.stride())
            pairs = in_pairs(rows)
            _logits_kernel[(count, slices)](
                *(logits if pairs is None else (pairs, *pairs.stride())),
                parts,
                vocabulary,
                slices,
                base,
                **_lanes(rows, _THREADS),
                PAIRS=pairs is not None,
                num_warps=warps(_THREADS),
                **options,
            )
        else:
            logits = (None, 0, 0)
            for part, of_part in parts_in_terms([rows], [head]):
                size = part.stop - part.start
                tiles = cdiv(size, config["ROWS"])
                _hidden_kernel[(tiles * slices,)](
                    *tile_arguments(of_part, [head]),
                    parts[part],
                    size,
                    vocabulary,
                    tiles,
                    slices,
                    base,
                    UPCAST=upcast(rows),
                    **config,
                    **options,
                )
        _join_kernel[(count,)](
            *logits,
            parts,
            *results,
            vocabulary,
            slices,
            base,
            BLOCK=min(_JOINED, next_power_of_2(slices)),
            **_lanes(rows, _JOIN_THREADS),
            num_warps=warps(_JOIN_THREADS) if config is None else 8,
            **options,
        )
    return tuple(results)
