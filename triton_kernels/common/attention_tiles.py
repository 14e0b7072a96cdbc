"""Tiles of attention: rows of queries over tiles of keys, and what joins spans of positions.

The rows of a tile are the query heads of one key-value head, token after token: row r is head r mod G of
token r div G, so that any ratio G of heads fills a tile, and a key is loaded once for all of them.

A prefix is attended to in spans of SPAN positions from its beginning, each by itself, and spans are joined
in order: whether one program goes over all of them or each has its own, a row has the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPAN = 512  # positions
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a·b in float32; operands of one half-precision dtype as they are, others in float32.

    Args:
        a: [M, K].
        b: [K, N].
        UPCAST: multiply in float32 anyhow, for the interpreter, whose bfloat16 arithmetic is wrong.
    """
    if UPCAST or a.dtype != b.dtype or a.dtype == tl.float32:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b)
    return result


@triton.jit
def tile_rows(
    ptr,
    strides,  # along batch, heads, tokens, D
    batch,
    kv_head,
    row,  # [ROWS]
    there,  # [ROWS]
    dim,  # D
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Rows of queries, outputs or cotangents; 0 where there are none: [ROWS, DIM]."""
    column = tl.arange(0, DIM)
    head, token = kv_head * GROUPS + row % GROUPS, row // GROUPS
    at = ptr + batch * strides[0] + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]
    mask = there[:, None] & (column < dim)[None, :]
    return tl.load(at[:, None] + column[None, :] * strides[3], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, strides, batch, kv_head, row, there, dim, x, GROUPS: tl.constexpr, DIM: tl.constexpr):
    """Where :func:`tile_rows` reads."""
    column = tl.arange(0, DIM)
    head, token = kv_head * GROUPS + row % GROUPS, row // GROUPS
    at = ptr + batch * strides[0] + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]
    mask = there[:, None] & (column < dim)[None, :]
    tl.store(at[:, None] + column[None, :] * strides[3], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def paged_rows(
    ptr,  # of a pool
    strides,  # along blocks, slots, heads, D
    table_ptr,  # of the sequence
    table_stride,
    position,  # [COLUMNS]
    there,  # [COLUMNS]
    block_size,
    blocks,
    kv_head,
    dim,
    DIM: tl.constexpr,
):
    """Keys or values of positions of the prefix, 0 where there is none: [COLUMNS, DIM].

    What a table names is taken for a block of the pool, whatever it is: it must not be a wrong address.
    """
    block = tl.load(table_ptr + (position // block_size).to(tl.int64) * table_stride, mask=there, other=0)
    block = tl.minimum(tl.maximum(block.to(tl.int64), 0), tl.maximum(blocks - 1, 0))
    slot = (position % block_size).to(tl.int64)
    at = block * strides[0] + slot * strides[1] + kv_head * strides[2]
    column = tl.arange(0, DIM)
    mask = there[:, None] & (column < dim)[None, :]
    return tl.load(ptr + at[:, None] + column[None, :] * strides[3], mask=mask, other=0.0)


@triton.jit
def scores(q, keys, scale, softcap, UPCAST: tl.constexpr):
    """[ROWS, COLUMNS] of q [ROWS, DIM] and keys [COLUMNS, DIM], capped where there is a cap."""
    s = product(q, tl.trans(keys), UPCAST) * scale
    if softcap is not None:
        s = softcap * _tanh(s / softcap)
    return s


@triton.jit
def capped_slope(s, softcap):
    """∂(c·tanh(x/c))/∂x, of what it gave."""
    return 1.0 - (s / softcap) * (s / softcap)


@triton.jit
def _tanh(x):
    """tanh by exp of what is at most 0, which does not overflow."""
    small = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
    # Near 0 the difference from 1 is lost: there the first terms of the series hold float32's bits.
    square = x * x
    series = x * (
        1.0 + square * (-0.3333333333333333 + square * (0.13333333333333333 - square * 0.05396825))
    )
    large = tl.where(x < 0, small - 1.0, 1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.1, series, large)


@triton.jit
def rounded_gradient(x, one, other):
    """As :func:`rounded`, but not to float16, which holds nothing below 6·10⁻⁸: gradients often are."""
    if one.dtype == other.dtype and one.dtype != tl.float16:
        x = x.to(one.dtype)
    return x


@triton.jit
def nothing(ROWS: tl.constexpr, DIM: tl.constexpr):
    """(top, total, mix) of no positions."""
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    return top, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, DIM), tl.float32)


@triton.jit
def weights(s, reference):
    """exp(s − reference)."""
    return tl.exp2((s - reference) * _LOG2_E)


@triton.jit
def rounded(x, one, other):
    """x in the dtype of ``one`` and ``other`` if they have the same, as it is elsewhere."""
    if one.dtype == other.dtype:
        x = x.to(one.dtype)
    return x


@triton.jit
def attended(q, s, values, top, total, mix, UPCAST: tl.constexpr):
    """One more tile.

    Where queries and values are of one half-precision dtype, weights are rounded to it for the product. The
    sum, of which the logsumexp is made, is of unrounded ones.

    Args:
        q: the rows' queries, for their dtype.
        s: [ROWS, COLUMNS] scores, −inf where a row does not see a position.
        values: [COLUMNS, DIM].
        top: [ROWS], the largest score so far.
        total: [ROWS], Σ exp(s − top).
        mix: [ROWS, DIM], Σ exp(s − top) value.
    """
    new_top = tl.maximum(top, tl.max(s, axis=1))
    reference = tl.where(new_top == -float("inf"), 0.0, new_top)
    weight = weights(s, reference[:, None])
    shrink = weights(top, reference)
    total = tl.fma(total, shrink, tl.sum(weight, axis=1))
    mixed = product(rounded(weight, q, values), values, UPCAST)
    return new_top, total, tl.fma(mix, shrink[:, None], mixed)


@triton.jit
def joined(top, total, mix, other_top, other_total, other_mix):
    """Two sets of positions as one."""
    new_top = tl.maximum(top, other_top)
    reference = tl.where(new_top == -float("inf"), 0.0, new_top)
    own, other = weights(top, reference), weights(other_top, reference)
    total = tl.fma(total, own, other_total * other)
    return new_top, total, tl.fma(mix, own[:, None], other_mix * other[:, None])


@triton.jit
def first_seen(position, start, window, COLUMNS: tl.constexpr):
    """The first tile from ``start`` on that a row at ``position``, or behind it, sees anything of."""
    if window is not None:
        start = tl.maximum(start, start + (position - window + 1 - start) // COLUMNS * COLUMNS)
    return start


@triton.jit
def prefix_span(
    q,  # [ROWS, DIM]
    position,  # [ROWS], of the rows, ascending
    first_position,  # of the first row
    key_ptr,
    value_ptr,
    key_strides,  # along blocks, slots, heads, D
    value_strides,
    table_ptr,  # of the sequence
    table_stride,
    block_size,
    blocks,
    kv_head,
    start,  # of the span
    stop,  # its end, or the prefix'
    scale,
    softcap,
    window,
    dim,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(top, total, mix) of rows over a span of the prefix."""
    top, total, mix = nothing(ROWS, DIM)
    for first in range(first_seen(first_position, start, window, COLUMNS), stop, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        there = place < stop
        keys = paged_rows(
            key_ptr,
            key_strides,
            table_ptr,
            table_stride,
            place,
            there,
            block_size,
            blocks,
            kv_head,
            dim,
            DIM,
        )
        s = scores(q, keys, scale, softcap, UPCAST)
        seen = there[None, :] & (position[:, None] >= 0)
        if window is not None:
            seen = seen & (position[:, None] - place[None, :] < window)
        values = paged_rows(
            value_ptr,
            value_strides,
            table_ptr,
            table_stride,
            place,
            there,
            block_size,
            blocks,
            kv_head,
            dim,
            DIM,
        )
        s = tl.where(seen, s, -float("inf"))
        top, total, mix = attended(q, s, values, top, total, mix, UPCAST)
    return top, total, mix


@triton.jit
def own_seen(token, other, suffix, window):
    """Which tokens of a suffix its rows see: [ROWS, COLUMNS].

    Args:
        token: of the rows, [ROWS].
        other: tokens, [COLUMNS].
    """
    distance = token[:, None] - other[None, :]
    seen = (distance >= 0) & (other < suffix)[None, :]
    if window is not None:
        seen = seen & (distance < window)
    return seen


@triton.jit
def own_rows(ptr, strides, batch, kv_head, token, suffix, dim, DIM: tl.constexpr):
    """Keys or values of tokens of the suffix, 0 past its end: [COLUMNS, DIM]."""
    column = tl.arange(0, DIM)
    at = ptr + batch * strides[0] + kv_head * strides[1] + token.to(tl.int64) * strides[2]
    mask = (token < suffix)[:, None] & (column < dim)[None, :]
    return tl.load(at[:, None] + column[None, :] * strides[3], mask=mask, other=0.0)
