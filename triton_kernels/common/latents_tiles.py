"""A tile of tokens in a step on hidden states: its logits, the softmax so far, what it adds to the sums.

Two schedules walk the tiles of a split of the vocabulary, with these functions and in this order, so
that a row has the same bits in both. What is summed over tokens is summed by a product, or place by place
of the tile and then in pairs: no order is left to the layout that a compiler chooses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponential import tempered_exp
from .products import APART
from .row_sums import FIELDS, GRAD, LOST, NAN, SUM, TILT, TOKEN, TOP, finite_or_0, first_of_larger

RECORD = tl.constexpr(3)  # of a row: token, steps taken, flags


@triton.jit
def moved(records_ptr, team_ptr, stopped_ptr, row, turn):
    """Whether rows took step ``turn``, if that is the last one taken: not done, of a team that goes on."""
    going = tl.load(records_ptr + row * RECORD + 2) == 0
    if team_ptr is not None:
        going = going & (tl.load(stopped_ptr + tl.load(team_ptr + row)) > turn)
    return going


@triton.jit
def in_pairs(x):
    """The sum along the first dimension, a power of two, of neighbours, of neighbouring sums, and so on."""
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            pairs = tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1]))
            even, odd = tl.split(tl.permute(pairs, (0, 2, 1)))
            x = even + odd
    return x


@triton.jit
def terms(x):
    """Three bfloat16 numbers that hold a float32's 24 bits: low, middle and high."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return (rest - middle.to(tl.float32)).to(tl.bfloat16), middle, high


@triton.jit
def _product(a, b, UPCAST: tl.constexpr):
    """a·b in float32 of bfloat16 tiles, to be added to others outside (see ``products.product``).

    Args:
        a: [B, M, K].
        b: [B, K, N] of the same dtype.
        UPCAST: for the interpreter, whose bfloat16 arithmetic is wrong, and whose sums have an order that
            changes with the shape: in float64, where that does not show.
    """
    if UPCAST:
        result = tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    else:
        result = tl.dot(a, b, max_num_imprecise_acc=APART)
    return result


@triton.jit
def _sum_of_terms(x):
    """Of low, middle, high and 0 of each row, along the second dimension: (low + middle) + high."""
    x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2, x.shape[2])), axis=2)
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2, x.shape[2])), axis=2)


@triton.jit
def _sum_of_parts(x):
    """[PARTS, ROWS, TOKENS] without the parts, neighbours first, as :func:`in_pairs`: [TOKENS, ROWS]."""
    # As sums of two: in registers of one thread all parts would take more of them than there are.
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1], x.shape[2])), axis=1)
    return tl.trans(tl.reshape(x, (x.shape[1], x.shape[2])))


@triton.jit
def _added(acc, states, head, UPCAST: tl.constexpr):
    """acc + states·head; multiply-adds round to the nearest, so their sum may stay in an accumulator."""
    if UPCAST or head.dtype == tl.bfloat16:
        acc += _product(states, head, UPCAST)
    else:
        acc = tl.dot(states, head.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def tile_logits(
    h_ptr,  # [N, H] float32
    head_ptr,  # [V, H]
    row,  # [ROWS] int64
    wanted,  # [ROWS], whether a row is read; one that is not has logits of 0
    token,  # [TOKENS] int64
    vocabulary,
    width,
    h_stride,
    head_stride_v,
    head_stride_h,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """head·hᵀ of many rows: [TOKENS, ROWS] float32; 0 past the end.

    Every DEPTH columns fall into PARTS, each with a sum of its own: as a product of few rows and few
    tokens the whole would keep one warp busy and all others waiting. A bfloat16 head meets h as three
    bfloat16 terms, each with a sum of its own too.
    """
    column = columns_of(PARTS, DEPTH)
    of_states = tl.permute(column, (0, 2, 1))
    known = (token < vocabulary)[None, None, :]
    table = head_ptr + token[None, None, :] * head_stride_v + column.to(tl.int64) * head_stride_h
    states = h_ptr + row[None, :, None] * h_stride + of_states
    # 64 bits: a head's columns may lie far apart.
    step = tl.full((), DEPTH, tl.int64) * head_stride_h
    low = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    middle, high = low, low
    for start in range(0, width, DEPTH):
        head = tl.load(table, mask=known & (column < width - start), other=0.0)
        state = tl.load(states, mask=wanted[None, :, None] & (of_states < width - start), other=0.0)
        if head_ptr.dtype.element_ty == tl.bfloat16:
            own_low, own_middle, own_high = terms(state)
            low = _added(low, own_low, head, UPCAST)
            middle = _added(middle, own_middle, head, UPCAST)
            high = _added(high, own_high, head, UPCAST)
        else:
            high = _added(high, state, head, UPCAST)
        table += step
        states += DEPTH
    return _sum_of_parts((low + middle) + high)


@triton.jit
def few_logits(
    states_ptr,  # [N, 3, H] bfloat16, the terms of h, for a bfloat16 head; else [N, 1, H] float32
    head_ptr,  # [V, H]
    held,  # the first chunks of the head: [PARTS, DEPTH / PARTS, TOKENS] each
    row,  # [ROWS] int64
    wanted,  # [ROWS], whether a row is read; one that is not has logits of 0
    token,  # [TOKENS] int64
    vocabulary,
    width,
    head_stride_v,
    head_stride_h,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """As :func:`tile_logits`, to the bit, for few rows: one product takes the terms of all of them.

    What the caller has loaded of the head for other uses too, ``held``, is not loaded again.
    """
    TERMS: tl.constexpr = states_ptr.dtype.element_ty == tl.bfloat16
    LINES: tl.constexpr = 4 * ROWS if TERMS else ROWS
    HELD: tl.constexpr = len(held) * DEPTH
    column = columns_of(PARTS, DEPTH)
    of_states = tl.permute(column, (0, 2, 1))
    known = (token < vocabulary)[None, None, :]
    if TERMS:
        term = tl.arange(0, LINES) % 4
        there = tl.reshape(tl.broadcast_to(wanted[:, None], (ROWS, 4)), (LINES,)) & (term < 3)
        line = tl.reshape(tl.broadcast_to(row[:, None], (ROWS, 4)), (LINES,)) * 3 + term
    else:
        there, line = wanted, row
    states = states_ptr + line[None, :, None] * width + of_states
    acc = tl.zeros((PARTS, LINES, TOKENS), tl.float32)
    for c in tl.static_range(len(held)):
        mask = of_chunk(there[None, :, None], of_states, width, c, CHUNKS, DEPTH)
        acc = _added(acc, tl.load(states + c * DEPTH, mask=mask, other=0.0), held[c], UPCAST)
    states += HELD
    table = head_ptr + token[None, None, :] * head_stride_v
    table += (HELD + column).to(tl.int64) * head_stride_h
    step = tl.full((), DEPTH, tl.int64) * head_stride_h
    for start in range(HELD, width, DEPTH):
        head = tl.load(table, mask=known & (column < width - start), other=0.0)
        state = tl.load(states, mask=there[None, :, None] & (of_states < width - start), other=0.0)
        acc = _added(acc, state, head, UPCAST)
        table += step
        states += DEPTH
    if TERMS:
        acc = _sum_of_terms(acc)
    return _sum_of_parts(acc)


@triton.jit
def columns_of(PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of a chunk, a part after the other: [PARTS, WIDTH / PARTS, 1]."""
    part = tl.arange(0, PARTS)[:, None, None] * (WIDTH // PARTS)
    return part + tl.arange(0, WIDTH // PARTS)[None, :, None]


@triton.jit
def of_chunk(there, column, width, c: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """``there`` where a chunk has a column: masks of all chunks but the last would only take registers."""
    if c + 1 == CHUNKS:
        there = there & (column < width - c * WIDTH)
    return there


@triton.jit
def begun(TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """The state of :func:`met` before the first tile: (top, key, base, sums, tilts, lost)."""
    nothing = tl.full((ROWS,), -float("inf"), tl.float32)
    none = tl.full((ROWS,), NAN, tl.int32)
    lanes = tl.zeros((TOKENS, ROWS), tl.float32)
    return nothing, none, tl.zeros((ROWS,), tl.float32), lanes, lanes, lanes - float("inf")


@triton.jit
def met(y, grad, token, top, key, base, sums, tilts, lost, temper, TRIPLES: tl.constexpr):
    """One more tile in the softmax of rows.

    Weights are relative to the largest y so far, ``top``, and G to that of its token, ``base``: after a
    new largest one, what was summed is multiplied by ``scale`` and moved by ``shift`` times the plain sum.

    Args:
        y: [TOKENS, ROWS] float32, −inf past the end.
        grad: [TOKENS, ROWS] float32, finite past the end.
        token: [TOKENS] int32, ascending, from one tile to the next too.
        top: [ROWS] float32, the largest y so far, +inf from the first NaN on.
        key: [ROWS] int32, its token, the first of equals; of the first NaN less NAN.
        base: [ROWS] float32, G of the token, 0 if it is not finite.
        sums, tilts: [TOKENS, ROWS] float32, Σ e and Σ e (G − base) of each place in a tile.
        lost: [TOKENS, ROWS] float32, the largest y at which G is not finite.
        temper: of :func:`~.exponential.exp_base`.
        TRIPLES: find the largest y, its token and its G by one reduction, not by three: the same numbers,
            with a third of the barriers and more registers.
    Returns:
        weight e = exp((y − top)/τ) and tilt e (G − base), [TOKENS, ROWS]; scale and shift, [ROWS]; then
        ``top`` to ``lost`` with this tile.
    """
    nan = y != y
    finite = tl.abs(grad) < float("inf")
    rank = tl.where(nan, float("inf"), y)
    keys = tl.where(nan, token[:, None] - NAN, token[:, None])
    if TRIPLES:
        triples = (rank, keys, tl.where(finite, grad, 0.0))
        tile_top, tile_key, tile_base = tl.reduce(triples, 0, first_of_larger)
    else:
        tile_top = tl.max(rank, axis=0)
        tile_key = tl.min(tl.where(rank == tile_top[None, :], keys, NAN), axis=0)
        # A sum of one number and zeros, in which nothing is left to an order.
        tile_base = tl.sum(tl.where((keys == tile_key[None, :]) & finite, grad, 0.0), axis=0)
    new_top, key, new_base = first_of_larger(top, key, base, tile_top, tile_key, tile_base)
    reference = finite_or_0(new_top)
    scale = tempered_exp(top - reference, temper)
    shift = base - new_base
    weight = tempered_exp(y - reference[None, :], temper)
    # G may be infinite where p is 0; elsewhere it spoils the row, by `lost`.
    tilt = weight * (tl.where(finite & (weight > 0), grad, new_base[None, :]) - new_base[None, :])
    tilts = tl.fma(tl.fma(sums, shift[None, :], tilts), scale[None, :], tilt)
    sums = tl.fma(sums, scale[None, :], weight)
    lost = tl.maximum(lost, tl.where(finite, -float("inf"), y))
    return weight, tilt, scale, shift, new_top, key, new_base, sums, tilts, lost


@triton.jit
def side_by_side(a, b):
    """[M, N] and [M, N] as [M, 2·N]: a column of ``a``, the same of ``b``, the next."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def operands(weight, tilt, PARTS: tl.constexpr, GROUPS: tl.constexpr, TERMS: tl.constexpr):
    """The right-hand sides of :func:`pulled`'s products: a tuple for each group, of terms from low to high.

    Args:
        weight, tilt: [TOKENS, ROWS] of :func:`met`.
        PARTS: that have all the same.
        GROUPS: 1 or 2: two chunks of the head whose sums share the columns of a product, each having zeros
            where the other has its weights.
        TERMS: three bfloat16 terms, for a bfloat16 head.
    """
    weights = side_by_side(weight, tilt)
    if GROUPS == 2:
        pair = tl.join(weights, tl.zeros_like(weights)), tl.join(tl.zeros_like(weights), weights)
        shape: tl.constexpr = (weights.shape[0], 2 * weights.shape[1])
        result = (
            _for_parts(tl.reshape(tl.permute(pair[0], (0, 2, 1)), shape), PARTS, TERMS),
            _for_parts(tl.reshape(tl.permute(pair[1], (0, 2, 1)), shape), PARTS, TERMS),
        )
    else:
        result = (_for_parts(weights, PARTS, TERMS),)
    return result


@triton.jit
def _for_parts(weights, PARTS: tl.constexpr, TERMS: tl.constexpr):
    shape: tl.constexpr = (PARTS, weights.shape[0], weights.shape[1])
    if TERMS:
        low, middle, high = terms(weights)
        low = tl.broadcast_to(low[None, :, :], shape)
        middle = tl.broadcast_to(middle[None, :, :], shape)
        result = (low, middle, tl.broadcast_to(high[None, :, :], shape))
    else:
        result = (tl.broadcast_to(weights[None, :, :], shape),)
    return result


@triton.jit
def pulled(head, weights, new, UPCAST: tl.constexpr):
    """Σ e w and Σ e (G − base) w of a tile of tokens alone, added to ``new``.

    The two stand side by side, row after row: one product takes both.

    Args:
        head: [PARTS, WIDTH / PARTS, TOKENS], 0 past the end.
        weights: of a group of :func:`operands`.
        new: [PARTS, WIDTH / PARTS, COLUMNS] float32: zeros, or the other group's.
    """
    for t in tl.static_range(len(weights)):
        if UPCAST:
            new += _product(head, weights[t], UPCAST)
        elif head.dtype == tl.bfloat16:
            new = tl.dot(head, weights[t], new, max_num_imprecise_acc=APART)
        else:
            new = tl.dot(head.to(tl.float32), weights[t], new, input_precision="ieee")
    return new


@triton.jit
def with_tile(sums, new, scale, shift, GROUPS: tl.constexpr):
    """Σ e w and Σ e (G − base) w with one more tile.

    Args:
        sums: [PARTS, WIDTH / PARTS, GROUPS·2·ROWS] float32, so far.
        new: of :func:`pulled`.
        scale, shift: of :func:`met`, [ROWS].
    """
    pairs: tl.constexpr = (sums.shape[0], sums.shape[1], sums.shape[2] // 2, 2)
    plain, tilted = tl.split(tl.reshape(sums, pairs))
    new_plain, new_tilted = tl.split(tl.reshape(new, pairs))
    scale = _for_groups(scale, GROUPS)
    tilted = tl.fma(tl.fma(plain, _for_groups(shift, GROUPS), tilted), scale, new_tilted)
    return tl.reshape(tl.join(tl.fma(plain, scale, new_plain), tilted), sums.shape)


@triton.jit
def _for_groups(x, GROUPS: tl.constexpr):
    rows: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[None, :], (GROUPS, rows)), (1, 1, GROUPS * rows))


@triton.jit
def store_met(sums_ptr, row, there, splits, split, top, key, base, sums, tilts, lost):
    """The sums of a split, where and as :func:`~.row_sums.joined_sums` reads it.

    Args:
        sums_ptr: [N, FIELDS, splits] float32.
        row, there: [ROWS], rows and which of them are stored.
        top to lost: of :func:`met`.
    """
    at = sums_ptr + row * (FIELDS * splits) + split
    rows: tl.constexpr = sums.shape[1]
    tl.store(at + TOP * splits, top, mask=there)
    tl.store(at + TOKEN * splits, key.to(tl.float32), mask=there)
    tl.store(at + SUM * splits, tl.reshape(in_pairs(sums), (rows,)), mask=there)
    tl.store(at + TILT * splits, tl.reshape(in_pairs(tilts), (rows,)), mask=there)
    tl.store(at + GRAD * splits, base, mask=there)
    tl.store(at + LOST * splits, tl.max(lost, axis=0), mask=there)
