"""From hidden states to the sums of a step: Σ e, Σ e (G − c), Σ e w and Σ e (G − c) w over each split.

For few rows one kernel reads the head once: it takes a tile's logits, and then the tile again for what it
adds to the sums while the L2 cache still holds it (TOKENS · H elements of every program that runs at a
time); HOLD chunks of it stay in shared memory meanwhile. The sums over w, 2·H floats a row, stay in
registers for the whole split. That takes a kernel for each H, of FEW_WIDTH at most, and tiles of two
rows. For more rows the head is read twice: one kernel leaves the logits, and another keeps the sums of
some columns.

Predicted for an H200 with a bfloat16 head of 3584 columns, and measured nowhere: a tile of 32 tokens is
229 kB, 7.0 µs of a multiprocessor's share of the memory, or 12,400 cycles. Its instructions take 6,700
cycles of issue, its accesses to shared memory 7,500, its products 3,400 and its barriers 1,400: the sum
of all but the first is 12,300. The L2 cache moves 426 kB of the head, 229 and 6/7 of them again, and 11
kB of h for each row: 10.4 µs at 5.5 TB/s, which is what a tile takes, with two rows 10.7 µs. Each of the
14 chunks that HOLD names more would spare 3.5 %, but 255 registers hold no more than two without a spill:
sums of 3584 columns take 56 of them. A float32 head's chunks of 128 columns and 16 tokens take fewer: with
16 of them held a step is predicted to take 18 % less at 3584 columns, 6 % at 4096.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .latents_tiles import (
    begun,
    columns_of,
    few_logits,
    met,
    moved,
    of_chunk,
    operands,
    pulled,
    store_met,
    tile_logits,
    with_tile,
)
from .launch import launched


@launched
@triton.jit(do_not_specialize=["turn", "rows"])
def logits_kernel(
    h_ptr,  # [N, H] float32
    head_ptr,  # [V, H]
    noise_ptr,  # [N, V] float32, contiguous, or None
    y_ptr,  # [N, V] float32, contiguous
    records_ptr,
    team_ptr,
    stopped_ptr,
    rows,
    vocabulary,
    width,  # H
    tiles_of_rows,
    turn,
    h_stride,
    head_stride_v,
    head_stride_h,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y = z + noise of the rows that took step ``turn``; of all rows for turn 0."""
    # Programs that follow each other share a tile of the head.
    row = (tl.program_id(0) % tiles_of_rows * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (tl.program_id(0) // tiles_of_rows * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    within = tl.minimum(row, rows - 1)
    moves = moved(records_ptr, team_ptr, stopped_ptr, within, turn) & (row < rows)
    if tl.max(moves.to(tl.int32), axis=0) > 0:
        y = tile_logits(
            h_ptr,
            head_ptr,
            within,
            moves,
            token,
            vocabulary,
            width,
            h_stride,
            head_stride_v,
            head_stride_h,
            TOKENS,
            ROWS,
            DEPTH,
            PARTS,
            UPCAST,
        )
        at = within[None, :] * vocabulary + token[:, None]
        known = moves[None, :] & (token < vocabulary)[:, None]
        if noise_ptr is not None:
            y += tl.load(noise_ptr + at, mask=known, other=0.0)
        tl.store(y_ptr + at, y, mask=known)


@launched
@triton.jit(do_not_specialize=["turn", "rows"])
def sums_kernel(
    y_ptr,  # [N, V] float32, contiguous
    grad_ptr,  # [N, V]
    sums_ptr,  # [N, FIELDS, splits] float32
    records_ptr,
    team_ptr,
    stopped_ptr,
    rows,
    vocabulary,
    splits,
    split_size,  # tokens, a multiple of TOKENS
    tiles_of_rows,
    turn,
    grad_stride,
    temper,
    TRIPLES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of a split without those over w, for the rows that took step ``turn``."""
    row = (tl.program_id(0) % tiles_of_rows * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    split = tl.program_id(0) // tiles_of_rows
    within = tl.minimum(row, rows - 1)
    moves = moved(records_ptr, team_ptr, stopped_ptr, within, turn) & (row < rows)
    if tl.max(moves.to(tl.int32), axis=0) > 0:
        top, key, base, sums, tilts, lost = begun(TOKENS, ROWS)
        first = split * split_size
        # There is no product here for whose sake a compiler would load ahead by itself.
        for start in tl.range(first, tl.minimum(first + split_size, vocabulary), TOKENS, num_stages=3):
            token = start + tl.arange(0, TOKENS)
            known = moves[None, :] & (token < vocabulary)[:, None]
            y = tl.load(
                y_ptr + within[None, :] * vocabulary + token[:, None], mask=known, other=-float("inf")
            )
            at = grad_ptr + within[None, :] * grad_stride + token[:, None]
            grad = tl.load(at, mask=known, other=0.0).to(tl.float32)
            _w, _t, _scale, _shift, top, key, base, sums, tilts, lost = met(
                y, grad, token, top, key, base, sums, tilts, lost, temper, TRIPLES
            )
        store_met(sums_ptr, row, moves, splits, split, top, key, base, sums, tilts, lost)


@launched
@triton.jit(do_not_specialize=["turn", "rows"])
def pull_kernel(
    y_ptr,  # [N, V] float32, contiguous
    grad_ptr,  # [N, V]
    head_ptr,  # [V, H]
    partial_ptr,  # [splits, N, 2, H] float32
    records_ptr,
    team_ptr,
    stopped_ptr,
    rows,
    vocabulary,
    width,  # H
    splits,
    split_size,
    tiles_of_rows,
    tiles_of_width,
    turn,
    grad_stride,
    head_stride_v,
    head_stride_h,
    temper,
    TRIPLES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The sums over w of a split and some columns, for the rows that take step ``turn``."""
    program = tl.program_id(0)
    row = (program % tiles_of_rows * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = program // tiles_of_rows % tiles_of_width * WIDTH + columns_of(PARTS, WIDTH)
    split = program // tiles_of_rows // tiles_of_width
    within = tl.minimum(row, rows - 1)
    moves = moved(records_ptr, team_ptr, stopped_ptr, within, turn) & (row < rows)
    if tl.max(moves.to(tl.int32), axis=0) > 0:
        top, key, base, sums, tilts, lost = begun(TOKENS, ROWS)
        pulls = tl.zeros((PARTS, WIDTH // PARTS, 2 * ROWS), tl.float32)
        there = column < width
        first = split * split_size
        for start in range(first, tl.minimum(first + split_size, vocabulary), TOKENS):
            token = start + tl.arange(0, TOKENS)
            known = moves[None, :] & (token < vocabulary)[:, None]
            y = tl.load(
                y_ptr + within[None, :] * vocabulary + token[:, None], mask=known, other=-float("inf")
            )
            at = grad_ptr + within[None, :] * grad_stride + token[:, None]
            grad = tl.load(at, mask=known, other=0.0).to(tl.float32)
            weight, tilt, scale, shift, top, key, base, sums, tilts, lost = met(
                y, grad, token, top, key, base, sums, tilts, lost, temper, TRIPLES
            )
            at = head_ptr + token.to(tl.int64)[None, None, :] * head_stride_v
            at += column.to(tl.int64) * head_stride_h
            head = tl.load(at, mask=(token < vocabulary)[None, None, :] & there, other=0.0)
            weights = operands(weight, tilt, PARTS, 1, head.dtype == tl.bfloat16)
            new = pulled(head, weights[0], tl.zeros_like(pulls), UPCAST)
            pulls = with_tile(pulls, new, scale, shift, 1)
        lane = tl.program_id(0) % tiles_of_rows * (2 * ROWS) + tl.arange(0, 2 * ROWS)
        at = partial_ptr + (split.to(tl.int64) * (2 * rows) + lane)[None, None, :] * width + column
        tl.store(at, pulls, mask=(lane < 2 * rows)[None, None, :] & there)


@launched
@triton.jit(do_not_specialize=["turn", "rows"])
def one_pass_kernel(
    states_ptr,  # [N, 3, H] bfloat16, the terms of h, for a bfloat16 head; else [N, 1, H] float32
    head_ptr,  # [V, H]
    noise_ptr,  # [N, V] float32, contiguous, or None
    grad_ptr,  # [N, V]
    sums_ptr,  # [N, FIELDS, splits] float32
    partial_ptr,  # [splits, N, 2, H] float32, or None for a last look at the tokens
    records_ptr,
    team_ptr,
    stopped_ptr,
    rows,
    vocabulary,
    width,  # H
    splits,
    split_size,  # tokens, a multiple of TOKENS
    tiles_of_rows,
    turn,
    grad_stride,
    head_stride_v,
    head_stride_h,
    temper,
    TRIPLES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,  # columns of a chunk
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of H
    HOLD: tl.constexpr,  # so many chunks of a tile are loaded once
    GROUPS: tl.constexpr,  # chunks whose sums share the columns of a product
    UPCAST: tl.constexpr,
):
    """All sums of a split after step ``turn``, for the rows that took it; of all rows for turn 0."""
    row = (tl.program_id(0) % tiles_of_rows * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    split = tl.program_id(0) // tiles_of_rows
    within = tl.minimum(row, rows - 1)
    moves = moved(records_ptr, team_ptr, stopped_ptr, within, turn) & (row < rows)
    if tl.max(moves.to(tl.int32), axis=0) > 0:
        top, key, base, sums, tilts, lost = begun(TOKENS, ROWS)
        column = columns_of(PARTS, DEPTH)
        pulls = ()
        if partial_ptr is not None:
            for _c in tl.static_range(0, CHUNKS, GROUPS):
                pulls += (tl.zeros((PARTS, DEPTH // PARTS, GROUPS * 2 * ROWS), tl.float32),)
        first = split * split_size
        for start in range(first, tl.minimum(first + split_size, vocabulary), TOKENS):
            token = start + tl.arange(0, TOKENS)
            known = moves[None, :] & (token < vocabulary)[:, None]
            table = head_ptr + token.to(tl.int64)[None, None, :] * head_stride_v
            there = (token < vocabulary)[None, None, :]
            held = ()
            if partial_ptr is not None:
                for c in tl.static_range(HOLD):
                    mask = of_chunk(there, column, width, c, CHUNKS, DEPTH)
                    at = table + (c * DEPTH + column).to(tl.int64) * head_stride_h
                    held += (tl.load(at, mask=mask, other=0.0),)
            grad_at = grad_ptr + within[None, :] * grad_stride + token[:, None]
            grad = tl.load(grad_at, mask=known, other=0.0).to(tl.float32)
            y = few_logits(
                states_ptr,
                head_ptr,
                held,
                within,
                moves,
                token.to(tl.int64),
                vocabulary,
                width,
                head_stride_v,
                head_stride_h,
                TOKENS,
                ROWS,
                DEPTH,
                PARTS,
                CHUNKS,
                UPCAST,
            )
            if noise_ptr is not None:
                noise_at = noise_ptr + within[None, :] * vocabulary + token[:, None]
                y += tl.load(noise_at, mask=known, other=0.0)
            y = tl.where(known, y, -float("inf"))
            weight, tilt, scale, shift, top, key, base, sums, tilts, lost = met(
                y, grad, token, top, key, base, sums, tilts, lost, temper, TRIPLES
            )
            if partial_ptr is not None:
                weights = operands(weight, tilt, PARTS, GROUPS, states_ptr.dtype.element_ty == tl.bfloat16)
                moved_on = ()
                for p in tl.static_range(len(pulls)):
                    new = tl.zeros_like(pulls[p])
                    if p > 0:
                        # The same zeros, that wait for the sums before: else ptxas leaves all of these to
                        # the end, and spills.
                        new = tl.minimum(tl.abs(moved_on[p - 1]), new)
                    for g in tl.static_range(GROUPS):
                        if p * GROUPS + g < HOLD:
                            new = pulled(held[p * GROUPS + g], weights[g], new, UPCAST)
                        elif p * GROUPS + g < CHUNKS:
                            mask = of_chunk(there, column, width, p * GROUPS + g, CHUNKS, DEPTH)
                            at = table + ((p * GROUPS + g) * DEPTH + column).to(tl.int64) * head_stride_h
                            head = tl.load(at, mask=mask, other=0.0)
                            new = pulled(head, weights[g], new, UPCAST)
                    moved_on += (with_tile(pulls[p], new, scale, shift, GROUPS),)
                pulls = moved_on
        store_met(sums_ptr, row, moves, splits, split, top, key, base, sums, tilts, lost)
        if partial_ptr is not None:
            lane = tl.arange(0, GROUPS * 2 * ROWS)
            of_sum = tl.program_id(0) % tiles_of_rows * (2 * ROWS) + lane % (2 * ROWS)
            at = partial_ptr + (split.to(tl.int64) * (2 * rows) + of_sum)[None, None, :] * width
            for p in tl.static_range(len(pulls)):
                own = (p * GROUPS + lane // (2 * ROWS))[None, None, :] * DEPTH + column
                tl.store(at + own, pulls[p], mask=(of_sum < 2 * rows)[None, None, :] & (own < width))
