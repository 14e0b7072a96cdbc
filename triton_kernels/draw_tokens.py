"""Draws from filtered logits: two launches, and nothing that waits for the host.

Without filters each slice of a row gives its best token, and a second kernel joins them. With filters the
first kernel takes the largest logit of each group of neighbours. The k largest of these are at least as
many tokens, so that the k-th largest token is in one of the k groups, or of those that tie: the second
kernel, a program a row, reads these groups alone.

A value is found four bits at a time, from how many tokens, or how much mass, lie on one side of sixteen
candidates: eight steps whatever the logits are.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.gumbel import draw_noise
from .common.launch import launched
from .common.scratch import BYTES, row_blocks
from .common.sizes import cdiv, next_power_of_2

_SLICE = 4096  # tokens of a program
_GROUP = 128  # tokens that share a maximum
_TOGETHER = 8  # groups that are read together
_LISTED = 512  # keys that are compared together, with sixteen candidates each
_WARPS = 8

# Below the key of every number.
_NO_KEY = tl.constexpr(-(1 << 31))


@triton.jit
def _key(z):
    """int32 in the order of float32 numbers: −0 as 0, NaN as −inf."""
    z = tl.where(z == z, z, -float("inf")) + 0.0
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    """The float32 that a key is of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _score(z, temperature):
    """z / T in double precision; T as the bits of a double."""
    return z.to(tl.float64) / temperature.to(tl.float64, bitcast=True)


@launched
@triton.jit(do_not_specialize=["temperature", "domain", "slices"])
def _slice_draws_kernel(
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,  # [N] int64, as the three that follow
    start_ptr,
    visit_ptr,
    position_ptr,
    best_ptr,  # [N, slices] float64
    token_ptr,  # [N, slices] int32
    temperature,
    domain,
    vocabulary,
    slices,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // slices).to(tl.int64)
    slice = tl.program_id(0) % slices
    token = slice * COLUMNS + tl.arange(0, COLUMNS)
    at = logits_ptr + row * row_stride + token.to(tl.int64) * column_stride
    z = tl.load(at, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    last = tl.load(visit_ptr + row) * 4 + domain
    noise = draw_noise(
        tl.load(seed_ptr + row), tl.load(start_ptr + row), last, tl.load(position_ptr + row), token
    )
    score = _score(tl.where(z == z, z, -float("inf")), temperature) + noise
    best = tl.max(score, axis=0)
    at = row * slices + slice
    tl.store(best_ptr + at, best)
    tl.store(token_ptr + at, tl.min(tl.where(score == best, token, vocabulary - 1), axis=0))


@launched
@triton.jit(do_not_specialize=["slices"])
def _join_kernel(
    best_ptr,  # [N, slices] float64
    token_ptr,  # [N, slices] int32
    drawn_ptr,  # [N] int64
    slices,
    SLICES: tl.constexpr,  # a power of two ≥ slices
):
    row = tl.program_id(0).to(tl.int64)
    slice = tl.arange(0, SLICES)
    best = tl.load(best_ptr + row * slices + slice, mask=slice < slices, other=-float("inf"))
    token = tl.load(token_ptr + row * slices + slice, mask=slice < slices, other=1 << 30)
    chosen = tl.min(tl.where(best == tl.max(best, axis=0), token, 1 << 30), axis=0)
    tl.store(drawn_ptr + row, chosen.to(tl.int64))


@launched
@triton.jit(do_not_specialize=["slices"])
def _maxima_kernel(
    logits_ptr,
    row_stride,
    column_stride,
    maxima_ptr,  # [N, slices · COLUMNS / GROUP] int32: keys
    vocabulary,
    slices,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = (tl.program_id(0) // slices).to(tl.int64)
    slice = tl.program_id(0) % slices
    token = slice * COLUMNS + tl.arange(0, COLUMNS)
    at = logits_ptr + row * row_stride + token.to(tl.int64) * column_stride
    z = tl.load(at, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    maxima = tl.max(tl.reshape(_key(z), [COLUMNS // GROUP, GROUP]), axis=1)
    group = slice * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    tl.store(maxima_ptr + row * slices * (COLUMNS // GROUP) + group, maxima)


@triton.jit
def _kth_largest(key_ptr, count, k, LISTED: tl.constexpr):
    """The k-th largest of ``count`` keys; _NO_KEY if there are fewer."""
    digit = tl.arange(0, 16)
    found = tl.full((), _NO_KEY, tl.int32)
    for step in range(8):
        candidate = found + (digit << (28 - 4 * step))
        larger = tl.zeros([16], tl.int32)
        for first in range(0, count, LISTED):
            at = first + tl.arange(0, LISTED)
            key = tl.load(key_ptr + at, mask=at < count, other=_NO_KEY)
            larger += tl.sum((key[:, None] >= candidate[None, :]).to(tl.int32), axis=0)
        enough = tl.sum((larger >= k).to(tl.int32), axis=0)
        found += tl.maximum(enough - 1, 0) << (28 - 4 * step)
    return found


@triton.jit
def _fits(mass, total, limit):
    """Whether mass may be dropped."""
    return (mass / total).to(tl.float32) <= limit


@launched
@triton.jit(do_not_specialize=["temperature", "domain", "groups", "top_k"])
def _filtered_draws_kernel(
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,  # [N] int64, as the three that follow
    start_ptr,
    visit_ptr,
    position_ptr,
    maxima_ptr,  # [N, groups] int32: keys
    chosen_ptr,  # [N, groups] int32: groups that are read
    token_ptr,  # [N, groups · GROUP] int32: tokens of the groups that are read, then those that top-k keeps
    key_ptr,  # as many int32: their keys
    mass_ptr,  # as many float64: exp((z − max z) / T)
    drawn_ptr,  # [N] int64
    temperature,
    domain,
    vocabulary,
    groups,
    top_k,
    limit,  # 1 − p
    TOP_P: tl.constexpr,  # whether p < 1
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    LISTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    maxima_ptr += row * groups
    chosen_ptr += row * groups
    token_ptr += row * groups * GROUP
    key_ptr += row * groups * GROUP
    mass_ptr += row * groups * GROUP

    # The groups whose maximum is one of the k largest, or ties with the k-th.
    least = _kth_largest(maxima_ptr, groups, top_k, LISTED)
    top = tl.full((), _NO_KEY, tl.int32)
    chosen = tl.full((), 0, tl.int32)
    for first in range(0, groups, LISTED):
        group = first + tl.arange(0, LISTED)
        maxima = tl.load(maxima_ptr + group, mask=group < groups, other=_NO_KEY)
        top = tl.maximum(top, tl.max(maxima, axis=0))
        stays = (maxima >= least) & (group < groups)
        tl.store(chosen_ptr + chosen + tl.cumsum(stays.to(tl.int32), axis=0) - 1, group, mask=stays)
        chosen += tl.sum(stays.to(tl.int32), axis=0)
    tl.debug_barrier()

    # Their tokens' keys.
    for first in range(0, chosen, TOGETHER):
        at = first + tl.arange(0, TOGETHER)
        group = tl.load(chosen_ptr + at, mask=at < chosen, other=0)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        there = (at < chosen)[:, None] & (token < vocabulary)
        z = tl.load(logits_ptr + token.to(tl.int64) * column_stride, mask=there, other=0.0)
        place = at[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(token_ptr + place, token, mask=there)
        key = tl.where(there, _key(z.to(tl.float32)), _NO_KEY)
        tl.store(key_ptr + place, key, mask=(at < chosen)[:, None])
    count = chosen * GROUP
    tl.debug_barrier()

    # The tokens that top-k keeps, in their order, and the mass of each, to the front of the same memory.
    least = _kth_largest(key_ptr, count, top_k, LISTED)
    top_score = _score(_number(top), temperature)
    kept = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, count, LISTED):
        at = first + tl.arange(0, LISTED)
        key = tl.load(key_ptr + at, mask=at < count, other=_NO_KEY)
        token = tl.load(token_ptr + at, mask=at < count, other=0)
        stays = (key >= least) & (key > _NO_KEY)
        tl.debug_barrier()  # all of it is read before any of it is overwritten
        place = kept + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.store(token_ptr + place, token, mask=stays)
        tl.store(key_ptr + place, key, mask=stays)
        if TOP_P:
            mass = tl.exp(_score(_number(tl.where(stays, key, top)), temperature) - top_score)
            tl.store(mass_ptr + place, mass, mask=stays)
            total += tl.sum(tl.where(stays, mass, 0.0), axis=0)
        kept += tl.sum(stays.to(tl.int32), axis=0)
    tl.debug_barrier()

    # The least value that top-p keeps: the largest below which the mass may be dropped.
    bound = tl.full((), _NO_KEY, tl.int32)
    below = tl.full((), 0.0, tl.float64)
    each = tl.full((), 0.0, tl.float64)
    ties = tl.full((), 0, tl.int32)
    if TOP_P:
        digit = tl.arange(0, 16)
        for step in range(8):
            candidate = bound + (digit << (28 - 4 * step))
            less = tl.zeros([16], tl.float64)
            for first in range(0, kept, LISTED):
                at = first + tl.arange(0, LISTED)
                key = tl.load(key_ptr + at, mask=at < kept, other=_NO_KEY)
                mass = tl.load(mass_ptr + at, mask=at < kept, other=0.0)
                less += tl.sum(tl.where(key[:, None] < candidate[None, :], mass[:, None], 0.0), axis=0)
            fitting = tl.sum(_fits(less, total, limit).to(tl.int32), axis=0)
            bound += tl.maximum(fitting - 1, 0) << (28 - 4 * step)
        bound = tl.minimum(bound, top)
        for first in range(0, kept, LISTED):
            at = first + tl.arange(0, LISTED)
            key = tl.load(key_ptr + at, mask=at < kept, other=_NO_KEY)
            mass = tl.load(mass_ptr + at, mask=at < kept, other=0.0)
            below += tl.sum(tl.where(key < bound, mass, 0.0), axis=0)
            tied = (at < kept) & (key == bound)
            each = tl.maximum(each, tl.max(tl.where(tied, mass, 0.0), axis=0))
            ties += tl.sum(tied.to(tl.int32), axis=0)

    # The best of those that are left; of tokens that score as the bound the first are dropped.
    seed, start, position = tl.load(seed_ptr + row), tl.load(start_ptr + row), tl.load(position_ptr + row)
    last = tl.load(visit_ptr + row) * 4 + domain
    best = tl.full((), -float("inf"), tl.float64)
    drawn = tl.full((), 0, tl.int32)
    passed = tl.full((), 0, tl.int32)
    for first in range(0, kept, LISTED):
        at = first + tl.arange(0, LISTED)
        token = tl.load(token_ptr + at, mask=at < kept, other=0)
        key = tl.load(key_ptr + at, mask=at < kept, other=_NO_KEY)
        stays = (at < kept) & (key >= bound)
        if TOP_P:
            tied = (at < kept) & (key == bound)
            number = passed + tl.cumsum(tied.to(tl.int32), axis=0)
            final = (bound == top) & (number == ties)
            dropped = tied & _fits(below + number.to(tl.float64) * each, total, limit) & (final == 0)
            stays = stays & (dropped == 0)
            passed += tl.sum(tied.to(tl.int32), axis=0)
        score = _score(_number(tl.where(stays, key, top)), temperature)
        score += draw_noise(seed, start, last, position, token)
        score = tl.where(stays, score, -float("inf"))
        highest = tl.max(score, axis=0)
        lowest = tl.min(tl.where(score == highest, token, vocabulary - 1), axis=0)
        drawn = tl.where(highest > best, lowest, drawn)
        best = tl.maximum(best, highest)
    tl.store(drawn_ptr + row, drawn.to(tl.int64))


def draw_tokens(
    logits: Tensor,
    key: tuple[Tensor, Tensor, Tensor, Tensor],
    redraw: bool,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """One token a row.

    Args:
        logits: z [N, V], float32, bfloat16 or float16.
        key: seed, start, visit and position [N] int64.
        redraw: the domain is 2, not 1.
        temperature: T > 0.
        top_k: 0 keeps all.
        top_p: in (0, 1].
    Returns:
        [N] int64.
    """
    rows, vocabulary = logits.shape
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return drawn
    key = tuple(part.contiguous() for part in key)
    (bits,) = struct.unpack("<q", struct.pack("<d", temperature))
    domain, slices = 2 if redraw else 1, cdiv(vocabulary, _SLICE)
    with torch.cuda.device_of(logits):
        if not 0 < top_k < vocabulary and top_p == 1:
            best = torch.empty(rows, slices, dtype=torch.float64, device=logits.device)
            token = torch.empty(rows, slices, dtype=torch.int32, device=logits.device)
            _slice_draws_kernel[(rows * slices,)](
                logits,
                *logits.stride(),
                *key,
                best,
                token,
                bits,
                domain,
                vocabulary,
                slices,
                COLUMNS=_SLICE,
                num_warps=_WARPS,
            )
            _join_kernel[(rows,)](best, token, drawn, slices, SLICES=next_power_of_2(slices), num_warps=4)
            return drawn
        for part in row_blocks(rows, 16 * slices * _SLICE, BYTES):
            _filtered(
                logits[part],
                tuple(of_key[part] for of_key in key),
                drawn[part],
                bits,
                domain,
                top_k if 0 < top_k < vocabulary else vocabulary,
                top_p,
            )
    return drawn


def _filtered(
    logits: Tensor,
    key: tuple[Tensor, ...],
    drawn: Tensor,
    temperature: int,
    domain: int,
    top_k: int,
    top_p: float,
) -> None:
    rows, vocabulary = logits.shape
    slices = cdiv(vocabulary, _SLICE)
    groups = slices * (_SLICE // _GROUP)
    maxima, chosen = torch.empty(2, rows, groups, dtype=torch.int32, device=logits.device)
    tokens, keys = torch.empty(2, rows, groups * _GROUP, dtype=torch.int32, device=logits.device)
    mass = keys  # read and written if p < 1 alone
    if top_p < 1:
        mass = torch.empty(rows, groups * _GROUP, dtype=torch.float64, device=logits.device)
    _maxima_kernel[(rows * slices,)](
        logits,
        *logits.stride(),
        maxima,
        vocabulary,
        slices,
        COLUMNS=_SLICE,
        GROUP=_GROUP,
        num_warps=_WARPS,
    )
    _filtered_draws_kernel[(rows,)](
        logits,
        *logits.stride(),
        *key,
        maxima,
        chosen,
        tokens,
        keys,
        mass,
        drawn,
        temperature,
        domain,
        vocabulary,
        groups,
        top_k,
        1 - top_p,
        TOP_P=top_p < 1,
        GROUP=_GROUP,
        TOGETHER=_TOGETHER,
        LISTED=_LISTED,
        num_warps=_WARPS,
    )
