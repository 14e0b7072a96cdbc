"""Tiles of attention: rows of queries over tiles of keys.

The rows of a tile are the query heads of one key-value head, token after token: row r is head r mod G of
token r div G, so that any ratio G of heads fills a tile, and a key is loaded once for all of them.

Exponents are to base 2: a score times its unit (:func:`score_unit`) is log₂ of a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b, sums, UPCAST: tl.constexpr):
    """sums + a·b in float32; operands of one half-precision dtype as they are, others in float32.

    Args:
        a: [M, K].
        b: [K, N].
        sums: [M, N] float32, or None for 0.
        UPCAST: multiply in float32 anyhow, for the interpreter, whose bfloat16 arithmetic is wrong.
    """
    if UPCAST or a.dtype != b.dtype or a.dtype == tl.float32:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc=sums, input_precision="ieee")
    else:
        result = tl.dot(a, b, acc=sums)
    return result


@triton.jit
def tile_rows(
    ptr,
    strides,  # along batch, heads, tokens, D
    batch,
    kv_head,
    row,  # [ROWS]
    there,  # [ROWS]
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    """Rows of queries, outputs or cotangents; 0 where there are none: [ROWS, DIM]."""
    column = tl.arange(0, DIM)
    head, token = kv_head * GROUPS + row % GROUPS, row // GROUPS
    at = ptr + batch * strides[0] + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]
    mask = there[:, None] & (column < D)[None, :]
    return tl.load(at[:, None] + column[None, :] * strides[3], mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr,
    strides,
    batch,
    kv_head,
    row,
    there,
    x,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    """Where :func:`tile_rows` reads."""
    column = tl.arange(0, DIM)
    head, token = kv_head * GROUPS + row % GROUPS, row // GROUPS
    at = ptr + batch * strides[0] + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]
    mask = there[:, None] & (column < D)[None, :]
    tl.store(at[:, None] + column[None, :] * strides[3], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def score_unit(scale, softcap):
    """What a score of :func:`scores` is multiplied by to be an exponent to base 2.

    A scale of 0 becomes one so small that exponents are 0 all the same, but for −∞ of what is not seen.
    """
    if softcap is None:
        unit = tl.where(scale == 0, 1e-30, scale * _LOG2_E)
    else:
        unit = tl.full((), _LOG2_E, tl.float32)
    return unit


@triton.jit
def scores(q, keys, scale, softcap, UPCAST: tl.constexpr):
    """[ROWS, COLUMNS] of q [ROWS, DIM] and keys [COLUMNS, DIM].

    Products as they are; where there is a cap, capped, and then scaled before it.
    """
    s = product(q, tl.trans(keys), None, UPCAST)
    if softcap is not None:
        s = softcap * _tanh(s * (scale / softcap))
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
def rounded(x, one, other):
    """x in the dtype of ``one`` and ``other`` if they have the same, as it is elsewhere."""
    if one.dtype == other.dtype:
        x = x.to(one.dtype)
    return x


@triton.jit
def nothing(ROWS: tl.constexpr, DIM: tl.constexpr):
    """(top, total, mix) of no positions."""
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    return top, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, DIM), tl.float32)


@triton.jit
def attended(q, s, unit, values, top, total, mix, UPCAST: tl.constexpr):
    """One more tile.

    Where queries and values are of one half-precision dtype, weights are rounded to it for the product. The
    sum, of which the logsumexp is made, is of unrounded ones.

    Args:
        q: the rows' queries, for their dtype.
        s: [ROWS, COLUMNS] scores, −inf where a row does not see a position.
        unit: of scores.
        values: [COLUMNS, DIM].
        top: [ROWS], the largest exponent so far.
        total: [ROWS], Σ 2^(exponent − top).
        mix: [ROWS, DIM], Σ 2^(exponent − top) value.
    """
    new_top = tl.maximum(top, tl.max(s, axis=1) * unit)
    reference = tl.where(new_top == -float("inf"), 0.0, new_top)
    weight = tl.exp2(tl.fma(s, unit, -reference[:, None]))
    shrink = tl.exp2(top - reference)
    total = tl.fma(total, shrink, tl.sum(weight, axis=1))
    return new_top, total, product(rounded(weight, q, values), values, mix * shrink[:, None], UPCAST)


@triton.jit
def joined(top, total, mix, other_top, other_total, other_mix):
    """Two sets of positions as one."""
    new_top = tl.maximum(top, other_top)
    reference = tl.where(new_top == -float("inf"), 0.0, new_top)
    own, other = tl.exp2(top - reference), tl.exp2(other_top - reference)
    total = tl.fma(total, own, other_total * other)
    return new_top, total, tl.fma(mix, own[:, None], other_mix * other[:, None])


@triton.jit
def paged_rows(
    key_ptr,  # of pools
    value_ptr,
    key_strides,  # along blocks, slots, heads, D
    value_strides,
    table_ptr,  # of the sequence
    table_stride,
    position,  # [COLUMNS]
    stop,  # the end of the positions, or None if all are before it
    blocks,
    kv_head,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    """Keys and values of positions of the prefix, 0 where there is none: [COLUMNS, DIM] each.

    What a table names is taken for a block of the pool, whatever it is: it must not be a wrong address.
    """
    entry = table_ptr + (position // BLOCK).to(tl.int64) * table_stride
    column = tl.arange(0, DIM)
    mask = tl.full((position.shape[0],), True, tl.int1)[:, None] & (column < D)[None, :]
    if stop is None:
        block = tl.load(entry)
    else:
        block = tl.load(entry, mask=position < stop, other=0)
        mask = mask & (position < stop)[:, None]
    last = tl.maximum(blocks - 1, 0).to(tl.uint32)
    block = tl.minimum(block.to(tl.uint32), last).to(tl.int64)
    slot = (position % BLOCK).to(tl.int64)
    at = block * key_strides[0] + slot * key_strides[1] + kv_head * key_strides[2]
    keys = tl.load(key_ptr + at[:, None] + column[None, :] * key_strides[3], mask=mask, other=0.0)
    at = block * value_strides[0] + slot * value_strides[1] + kv_head * value_strides[2]
    values = tl.load(value_ptr + at[:, None] + column[None, :] * value_strides[3], mask=mask, other=0.0)
    return keys, values


@triton.jit
def own_rows(ptr, strides, batch, kv_head, token, suffix, D: tl.constexpr, DIM: tl.constexpr):
    """Keys or values of tokens of the suffix, 0 past its end: [COLUMNS, DIM]."""
    column = tl.arange(0, DIM)
    at = ptr + batch * strides[0] + kv_head * strides[1] + token.to(tl.int64) * strides[2]
    mask = (token < suffix)[:, None] & (column < D)[None, :]
    return tl.load(at[:, None] + column[None, :] * strides[3], mask=mask, other=0.0)


@triton.jit
def first_seen(position, start, window, COLUMNS: tl.constexpr):
    """The first tile from ``start`` on that a row at ``position``, or behind it, sees anything of."""
    if window is not None:
        start = tl.maximum(start, start + (position - window + 1 - start) // COLUMNS * COLUMNS)
    return start


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
def over_prefix(
    q,  # [ROWS, DIM]
    state,  # (top, total, mix)
    position,  # [ROWS], of the rows
    start,
    stop,
    length,  # of the prefix; None if all positions before ``stop`` are in it, and seen
    key_ptr,
    value_ptr,
    key_strides,  # along blocks, slots, heads, D
    value_strides,
    table_ptr,  # of the sequence
    table_stride,
    blocks,
    kv_head,
    scale,
    softcap,
    window,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(top, total, mix) with positions of the prefix from ``start`` to before ``stop``."""
    top, total, mix = state
    unit = score_unit(scale, softcap)
    # Where masks are for a few tiles at the ends alone, copying ahead would take registers from all others.
    STAGES: tl.constexpr = 1 if length is not None and q.dtype != tl.float32 and DIM <= 128 else None
    for first in tl.range(start, stop, COLUMNS, num_stages=STAGES):
        place = first + tl.arange(0, COLUMNS)
        keys, values = paged_rows(
            key_ptr,
            value_ptr,
            key_strides,
            value_strides,
            table_ptr,
            table_stride,
            place,
            length,
            blocks,
            kv_head,
            BLOCK,
            D,
            DIM,
        )
        s = scores(q, keys, scale, softcap, UPCAST)
        if length is not None:
            seen = (place < length)[None, :]
            if window is not None:
                seen = seen & (position[:, None] - place[None, :] < window)
            s = tl.where(seen, s, -float("inf"))
        top, total, mix = attended(q, s, unit, values, top, total, mix, UPCAST)
    return top, total, mix


@triton.jit
def over_suffix(
    q,  # [ROWS, DIM]
    state,  # (top, total, mix)
    token,  # [ROWS], of the rows
    start,
    stop,
    k_ptr,
    v_ptr,
    k_strides,  # along batch, heads, tokens, D
    v_strides,
    batch,
    kv_head,
    suffix,
    scale,
    softcap,
    window,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(top, total, mix) with tokens of the suffix from ``start`` to before ``stop``."""
    top, total, mix = state
    unit = score_unit(scale, softcap)
    for first in tl.range(start, stop, COLUMNS, num_stages=2):
        other = first + tl.arange(0, COLUMNS)
        keys = own_rows(k_ptr, k_strides, batch, kv_head, other, suffix, D, DIM)
        values = own_rows(v_ptr, v_strides, batch, kv_head, other, suffix, D, DIM)
        s = scores(q, keys, scale, softcap, UPCAST)
        s = tl.where(own_seen(token, other, suffix, window), s, -float("inf"))
        top, total, mix = attended(q, s, unit, values, top, total, mix, UPCAST)
    return top, total, mix


@triton.jit
def store_attention(
    top,
    total,
    mix,
    sink_ptr,  # [Hq], or None
    output_ptr,
    output_strides,
    logsumexp_ptr,  # [B, Hq, S] float32, contiguous
    batch,
    kv_head,
    kv_heads,
    row,
    suffix,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    """Rows' outputs and logsumexp, sinks among what they see."""
    head, there = kv_head * GROUPS + row % GROUPS, row < suffix * GROUPS
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=there, other=0.0).to(tl.float32) * _LOG2_E
        _top, zeros, none = nothing(ROWS, DIM)
        top, total, mix = joined(top, total, mix, sink, zeros + 1.0, none)
    output = mix * (1.0 / total)[:, None]
    store_rows(output_ptr, output_strides, batch, kv_head, row, there, output, GROUPS, D, DIM)
    at = logsumexp_ptr + (batch * (kv_heads * GROUPS) + head) * suffix + row // GROUPS
    tl.store(at, (top + tl.log2(total)) * _LN_2, mask=there)
