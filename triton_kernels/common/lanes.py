"""Slices of a row by lanes: sums whose order does not follow the layout of the loads.

A compiler lays a tile out as the alignment of its pointers lets it load, several neighbours a thread or
one, and the order of a sum over the tile follows the layout. So a slice is a tuple of tiles of LANES
tokens, which are added place by place. VECTOR neighbouring lanes, as many as a thread can load at once,
are added in pairs, and what is left has one layout, a number a thread, wherever it came from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 16  # that a thread loads at once
_TWO_LOWEST = tl.constexpr(-0x7F0080)  # −inf in both halves of an int32


def vector(*element_sizes: int) -> int:
    """VECTOR for arrays whose elements have these sizes, of which the widest decides."""
    return _BYTES // max(element_sizes)


def warps(threads: int) -> int:
    """How many warps these are."""
    return max(1, threads // (64 if torch.version.hip else 32))


@triton.jit
def load_tiles(
    row_ptr,
    stride,
    start,
    end,
    other,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    MASKED: tl.constexpr,
    wanted=True,
):
    """Elements start..start + TILES·LANES − 1 of a row: a tuple of [LANES] float32.

    Args:
        stride: between neighbours.
        end: of the row; past it ``other`` stands if MASKED, and without that nothing may be past it.
        wanted: if it is false nothing is read, and what the tiles hold is undefined.
    """
    lane = tl.arange(0, LANES)
    # Tiles are a constant apart where neighbours are: one address serves all. A scalar that is a mask, or
    # part of one, is an integer to Triton's interpreter, which 3.9 refuses: so it chooses between masks.
    first = row_ptr + (start + lane).to(tl.int64) * stride
    tiles = ()
    for t in tl.static_range(TILES):
        at = first + t * LANES * stride
        if MASKED:
            there = tl.where(wanted, lane < end - start - t * LANES, False)
            tile = tl.load(at, mask=there, other=other)
        else:
            tile = tl.load(at, mask=tl.where(wanted, lane >= 0, False))
        tiles += (tile.to(tl.float32),)
    return tiles


@triton.jit
def load_pairs(row_ptr, start, end, LANES: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr):
    """As :func:`load_tiles`, −inf past the end, of bfloat16 neighbours that share an integer.

    The upper of two is the integer without its lower half: one instruction, where a compiler that takes
    them apart by itself has two.

    Args:
        row_ptr: of :func:`in_pairs`.
        start, end: of the row's bfloat16 numbers, both even.
    Returns:
        2·TILES of [LANES/2] float32: of each tile those at even places, and those at odd ones.
    """
    lane = tl.arange(0, LANES // 2)
    first = row_ptr + (start // 2 + lane).to(tl.int64)
    tiles = ()
    for t in tl.static_range(TILES):
        at = first + t * (LANES // 2)
        if MASKED:
            pair = tl.load(at, mask=lane < (end - start - t * LANES) // 2, other=_TWO_LOWEST)
        else:
            pair = tl.load(at)
        tiles += ((pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True))
    return tiles


def in_pairs(rows: Tensor) -> Tensor | None:
    """[N, V] bfloat16 as [N, V/2] int32, a pair of neighbours each; None if they do not lie so."""
    if rows.dtype != torch.bfloat16 or rows.stride(1) != 1 or rows.data_ptr() % 4:
        return None
    if any(number % 2 for number in (rows.shape[1], rows.stride(0), rows.storage_offset())):
        return None
    return rows.view(torch.int32)


@triton.jit
def store_tiles(row_ptr, start, end, tiles, MASKED: tl.constexpr):
    """The reverse of :func:`load_tiles` where neighbours in a row are neighbours in memory."""
    lanes: tl.constexpr = tiles[0].shape[0]
    lane = tl.arange(0, lanes)
    first = row_ptr + (start + lane).to(tl.int64)
    for t in tl.static_range(len(tiles)):
        if MASKED:
            tl.store(first + t * lanes, tiles[t], mask=lane < end - start - t * lanes)
        else:
            tl.store(first + t * lanes, tiles[t])


@triton.jit
def larger_or_nan(a, b):
    """The larger, or NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def top_of(tiles):
    """The largest element of a slice, or NaN if one is NaN."""
    top = tiles[0]
    for t in tl.static_range(1, len(tiles)):
        top = larger_or_nan(top, tiles[t])
    return tl.reduce(top, 0, larger_or_nan)


@triton.jit
def first_place(tiles, value):
    """The place of the first element that equals ``value``; the slice's size if none does."""
    lanes: tl.constexpr = tiles[0].shape[0]
    count: tl.constexpr = len(tiles)
    lane = tl.arange(0, lanes)
    first = tl.full((lanes,), count * lanes, tl.int32)
    for back in tl.static_range(count):
        first = tl.where(tiles[count - 1 - back] == value, (count - 1 - back) * lanes, first)
    return tl.minimum(tl.min(first + lane, axis=0), count * lanes)


@triton.jit
def _added(a, b, c, d):
    return a + c, b + d


@triton.jit
def _neighbours(x, VECTOR: tl.constexpr):
    """[LANES] as the sums of VECTOR neighbours each, in pairs."""
    for level in tl.static_range(4):
        if VECTOR >> level > 1:
            even, odd = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
            x = even + odd
    return x


@triton.jit
def lane_sum(x, VECTOR: tl.constexpr):
    """Σ x, [LANES], in one order whatever the layout of x is."""
    return tl.sum(_neighbours(x, VECTOR), axis=0)


@triton.jit
def lane_sums(a, b, VECTOR: tl.constexpr):
    """:func:`lane_sum` of two at once."""
    return tl.reduce((_neighbours(a, VECTOR), _neighbours(b, VECTOR)), 0, _added)
