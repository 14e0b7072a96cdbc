"""A tile of tokens in a step on hidden states: its logits, the softmax so far, what it adds to the sums.

Two schedules walk the tiles of a split of the vocabulary, with these functions and in this order, so
that a row has the same bits in both. What is summed over tokens is summed by a product, or place by place
of the tile and then in pairs: no order is left to the layout that a compiler chooses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponential import tempered_exp
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
def _dot(table, states, acc, UPCAST: tl.constexpr):
    """acc + table·states in float32.

    Float32 states meet a bfloat16 table as three bfloat16 terms, which hold their 24 bits; the rest is
    float32 arithmetic, nothing rounded to tf32.

    Args:
        table: [.., M, K].
        states: [.., K, ROWS] float32.
        acc: [.., M, ROWS] float32.
        UPCAST: multiply in float32 anyhow, for the interpreter, whose bfloat16 arithmetic is wrong.
    """
    if table.dtype == tl.bfloat16 and not UPCAST:
        high = states.to(tl.bfloat16)
        rest = states - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        acc = tl.dot(table, (rest - middle.to(tl.float32)).to(tl.bfloat16), acc)
        acc = tl.dot(table, middle, acc)
        acc = tl.dot(table, high, acc)
    else:
        acc = tl.dot(table.to(tl.float32), states, acc, input_precision="ieee")
    return acc


@triton.jit
def tile_logits(
    h_ptr,  # [N, H] float32
    head_ptr,  # [V, H]
    row,  # [ROWS] int64
    wanted,  # [ROWS], whether a row is read; one that is not has logits of 0
    token,  # [TOKENS] int64
    vocabulary,
    width,  # H
    h_stride,
    head_stride_v,
    head_stride_h,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """head·hᵀ: [TOKENS, ROWS] float32; 0 past the end.

    Every DEPTH columns fall into PARTS, each with a sum of its own: as a product of few rows and few
    tokens the whole would keep one warp busy and all others waiting.
    """
    part = tl.arange(0, PARTS)[:, None, None] * (DEPTH // PARTS)
    along = tl.arange(0, DEPTH // PARTS)
    of_head = part + along[None, None, :]
    of_states = part + along[None, :, None]
    known = (token < vocabulary)[None, :, None]
    table = head_ptr + token[None, :, None] * head_stride_v + of_head.to(tl.int64) * head_stride_h
    states = h_ptr + row[None, None, :] * h_stride + of_states
    acc = tl.zeros((PARTS, TOKENS, ROWS), dtype=tl.float32)
    for start in range(0, width, DEPTH):
        head = tl.load(table, mask=known & (of_head < width - start), other=0.0)
        state = tl.load(states, mask=wanted[None, None, :] & (of_states < width - start), other=0.0)
        acc = _dot(head, state, acc, UPCAST)
        table += DEPTH * head_stride_h
        states += DEPTH
    return tl.reshape(in_pairs(tl.reshape(acc, (PARTS, TOKENS * ROWS))), (TOKENS, ROWS))


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
def pulled(head, weights, scale, shift, sums, UPCAST: tl.constexpr):
    """Σ e w and Σ e (G − base) w with one more tile.

    The two stand side by side, row after row: one product takes both.

    Args:
        head: [TOKENS, WIDTH], 0 past the end.
        weights: [TOKENS, 2·ROWS] float32, weight and tilt of :func:`met` side by side.
        scale, shift: of :func:`met`.
        sums: [WIDTH, 2·ROWS] float32, so far.
    """
    plain, tilted = tl.split(tl.reshape(sums, (sums.shape[0], scale.shape[0], 2)))
    tilted = tl.fma(plain, shift[None, :], tilted) * scale[None, :]
    sums = side_by_side(plain * scale[None, :], tilted)
    # A sum, since Triton 3.7 fails for sm_100 where what a reshape gives is itself an operand in float32.
    return _dot(tl.trans(head), weights + 0.0, sums, UPCAST)


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
