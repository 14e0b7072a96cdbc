"""Attention of a few rows over a long prefix, as in a decode: one program for each span of positions.

Spans are cut by position alone, and joined in order by a second kernel, with the suffix behind them. Where
sequences that follow each other in a batch have the same blocks in a span, as proposals that continue one
text have, one program reads them for all of these: a tile has room for several sequences' rows, which the
tensor cores multiply together anyway, and a row's numbers are the same bits wherever in a tile it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common.attention_status import store_status
from .common.attention_tiles import (
    first_seen,
    joined,
    nothing,
    over_prefix,
    over_suffix,
    store_attention,
    tile_rows,
)
from .common.launch import launched
from .common.scratch import share
from .common.sizes import cdiv, next_power_of_2

SPAN = 512  # positions
_JOINED_ROWS, _JOINED_COLUMNS = 16, 16


@triton.jit
def _differing(
    table_ptr,
    table_strides,
    sequence,  # to compare with
    others,  # [SHARED]
    known,  # [SHARED], whether there is such a sequence
    first,
    stop,  # entries of block tables
    ENTRIES: tl.constexpr,
    SHARED: tl.constexpr,
):
    """How many of these entries differ: [SHARED]."""
    count = tl.zeros((SHARED,), tl.int32)
    for start in range(first, stop, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        used = entry < stop
        at = table_ptr + entry.to(tl.int64) * table_strides[1]
        own = tl.load(at + sequence * table_strides[0], mask=used, other=0)
        mask = known[:, None] & used[None, :]
        theirs = tl.load(at[None, :] + others[:, None] * table_strides[0], mask=mask, other=0)
        count += tl.sum(((theirs != own[None, :]) & mask).to(tl.int32), axis=1)
    return count


@triton.jit
def _each_row(x, SHARED: tl.constexpr, ROWS: tl.constexpr):
    """What there is of each sequence, for each of its rows: [ROWS]."""
    return tl.reshape(tl.broadcast_to(x[:, None], (SHARED, ROWS // SHARED)), (ROWS,))


@launched
@triton.jit(do_not_specialize=["batch_size", "tiles"])
def _span_kernel(
    q_ptr,  # [B, Hq, S, D]
    key_ptr,  # [blocks, BLOCK, Hkv, D]
    value_ptr,
    table_ptr,  # [B, M]
    length_ptr,  # [B]
    stats_ptr,  # [B, Hkv, spans, 2, rows] float32
    mix_ptr,  # [B, Hkv, spans, rows, D] float32
    q_strides,
    key_strides,
    value_strides,
    table_strides,
    batch_size,
    suffix,  # S
    kv_heads,
    blocks,
    entries,  # M
    tiles,  # of a sequence's rows; 1 if a tile has several sequences
    scale,  # at least 0
    softcap,
    window,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,  # of a span
    SHARED: tl.constexpr,  # sequences that have room in a tile, a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    kv_head, span = tl.program_id(1).to(tl.int64), tl.program_id(2)
    start = span * LENGTH
    most = entries * BLOCK
    length = tl.minimum(tl.load(length_ptr + batch).to(tl.int32), most)
    stop = tl.minimum(start + LENGTH, length)
    # Of sequences whose positions in the span are in the same blocks, the first one's program takes all.
    if SHARED > 1:
        sequence = batch // SHARED * SHARED + tl.arange(0, SHARED)
        known = sequence < batch_size
        lengths = tl.minimum(tl.load(length_ptr + sequence, mask=known, other=-1).to(tl.int32), most)
        known = known & (tl.minimum(start + LENGTH, lengths) == stop)
        differing = _differing(
            table_ptr,
            table_strides,
            batch,
            sequence,
            known,
            start // BLOCK,
            tl.cdiv(stop, BLOCK),
            32,
            SHARED,
        )
        known = known & (differing == 0)
        first = tl.min(tl.where(known, sequence, batch), axis=0)
    else:
        sequence = batch + tl.arange(0, 1)
        known = sequence >= 0
        lengths = length + tl.arange(0, 1)
        first = batch
    if (start < length) & (first == batch):
        place = tl.arange(0, ROWS)
        row = tile * ROWS + place % (ROWS // SHARED)
        rows = suffix * GROUPS
        sequences = _each_row(sequence, SHARED, ROWS)
        there = _each_row(known.to(tl.int32), SHARED, ROWS) > 0
        there = there & (row < rows)
        q = tile_rows(q_ptr, q_strides, sequences, kv_head, row, there, GROUPS, D, DIM)
        position = _each_row(lengths, SHARED, ROWS) + row // GROUPS
        state = nothing(ROWS, DIM)
        if window is None and q.dtype != tl.float32 and DIM <= 128:
            whole = start + (stop - start) // COLUMNS * COLUMNS
            state = over_prefix(
                q,
                state,
                position,
                start,
                whole,
                None,
                key_ptr,
                value_ptr,
                key_strides,
                value_strides,
                table_ptr + batch * table_strides[0],
                table_strides[1],
                blocks,
                kv_head,
                scale,
                softcap,
                window,
                BLOCK,
                COLUMNS,
                D,
                DIM,
                UPCAST,
            )
        else:
            earliest = tl.min(tl.where(there, position, most + suffix), axis=0)
            whole = first_seen(earliest, start, window, COLUMNS)
        top, total, mix = over_prefix(
            q,
            state,
            position,
            whole,
            stop,
            stop,
            key_ptr,
            value_ptr,
            key_strides,
            value_strides,
            table_ptr + batch * table_strides[0],
            table_strides[1],
            blocks,
            kv_head,
            scale,
            softcap,
            window,
            BLOCK,
            COLUMNS,
            D,
            DIM,
            UPCAST,
        )
        part = (sequences * kv_heads + kv_head) * tl.num_programs(2) + span
        tl.store(stats_ptr + part * (2 * rows) + row, top, mask=there)
        tl.store(stats_ptr + part * (2 * rows) + rows + row, total, mask=there)
        column = tl.arange(0, DIM)
        at = mix_ptr + (part * rows + row)[:, None] * D + column[None, :]
        tl.store(at, mix, mask=there[:, None] & (column < D)[None, :])


@launched
@triton.jit(do_not_specialize=["spans"])
def _join_kernel(
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,
    table_ptr,  # [B, M]
    length_ptr,  # [B]
    sink_ptr,  # [Hq], or None
    stats_ptr,  # [B, Hkv, spans, 2, rows] float32
    mix_ptr,  # [B, Hkv, spans, rows, D] float32
    output_ptr,  # [B, Hq, S, D]
    logsumexp_ptr,  # [B, Hq, S] float32, contiguous
    status_ptr,  # [B] int32
    q_strides,
    k_strides,
    v_strides,
    table_strides,
    output_strides,
    suffix,  # S
    kv_heads,
    blocks,
    entries,  # M
    spans,
    scale,  # at least 0
    softcap,
    window,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,  # of a span
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(length_ptr + batch).to(tl.int32)
    if (tile == 0) & (kv_head == 0):
        table_ptr += batch * table_strides[0]
        store_status(status_ptr + batch, table_ptr, table_strides[1], length, blocks, entries, BLOCK)
    length = tl.minimum(tl.maximum(length, 0), entries * BLOCK)
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = suffix * GROUPS
    there = row < rows
    column = tl.arange(0, DIM)
    mask = there[:, None] & (column < D)[None, :]
    top, total, mix = nothing(ROWS, DIM)
    for span in range(0, tl.cdiv(length, LENGTH)):
        part = (batch * kv_heads + kv_head) * spans + span
        span_top = tl.load(stats_ptr + part * (2 * rows) + row, mask=there, other=-float("inf"))
        span_total = tl.load(stats_ptr + part * (2 * rows) + rows + row, mask=there, other=0.0)
        at = mix_ptr + (part * rows + row)[:, None] * D + column[None, :]
        span_mix = tl.load(at, mask=mask, other=0.0)
        top, total, mix = joined(top, total, mix, span_top, span_total, span_mix)
    first_token = tile * ROWS // GROUPS
    last_token = tl.minimum((tile * ROWS + ROWS - 1) // GROUPS, suffix - 1)
    q = tile_rows(q_ptr, q_strides, batch, kv_head, row, there, GROUPS, D, DIM)
    top, total, mix = over_suffix(
        q,
        (top, total, mix),
        row // GROUPS,
        first_seen(first_token, 0, window, COLUMNS),
        last_token + 1,
        k_ptr,
        v_ptr,
        k_strides,
        v_strides,
        batch,
        kv_head,
        suffix,
        scale,
        softcap,
        window,
        COLUMNS,
        D,
        DIM,
        UPCAST,
    )
    store_attention(
        top,
        total,
        mix,
        sink_ptr,
        output_ptr,
        output_strides,
        logsumexp_ptr,
        batch,
        kv_head,
        kv_heads,
        row,
        suffix,
        ROWS,
        GROUPS,
        D,
        DIM,
    )


_OF_SEQUENCES = (
    "q_ptr",
    "k_ptr",
    "v_ptr",
    "table_ptr",
    "length_ptr",
    "output_ptr",
    "logsumexp_ptr",
    "status_ptr",
)
_JOIN_ONLY = ("k_ptr", "v_ptr", "sink_ptr", "output_ptr", "logsumexp_ptr", "status_ptr")
_JOIN_ONLY += ("k_strides", "v_strides", "output_strides")
_SPAN_ONLY = ("key_ptr", "value_ptr", "key_strides", "value_strides")


def launch(given: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Attention of sequences with few rows.

    Args:
        given: tensors and strides by the kernels' names for them.
        numbers: all others, the tile of spans among them.
    """
    batch, _heads, suffix, dim = given["q_ptr"].shape
    kv_heads, rows, tile_rows = numbers["kv_heads"], suffix * numbers["GROUPS"], numbers["ROWS"]
    spans = max(1, cdiv(numbers["entries"] * numbers["BLOCK"], SPAN))
    shared = max(1, tile_rows // max(4, next_power_of_2(rows)))
    part_bytes = 4 * kv_heads * spans * rows * (dim + 2)
    most = max(1, share(15) // part_bytes // shared) * shared
    for first in range(0, batch, most):
        part = slice(first, first + most)
        own = given if most >= batch else given | {name: given[name][part] for name in _OF_SEQUENCES}
        _launch(own, numbers, rows, spans, shared)


def _launch(given: dict[str, Any], numbers: dict[str, Any], rows: int, spans: int, shared: int) -> None:
    batch, kv_heads = len(given["q_ptr"]), numbers["kv_heads"]
    dim, device = numbers["D"], given["q_ptr"].device
    stats = torch.empty(batch, kv_heads, spans, 2, rows, dtype=torch.float32, device=device)
    mixes = torch.empty(batch, kv_heads, spans, rows, dim, dtype=torch.float32, device=device)
    parts = {"stats_ptr": stats, "mix_ptr": mixes, "LENGTH": SPAN}
    tiles = cdiv(rows, numbers["ROWS"])
    _span_kernel[(batch * tiles, kv_heads, spans)](
        **{name: value for name, value in given.items() if name not in _JOIN_ONLY},
        **parts,
        **numbers,
        batch_size=batch,
        tiles=tiles,
        SHARED=shared,
    )
    joins = {"ROWS": _JOINED_ROWS, "COLUMNS": _JOINED_COLUMNS, "num_warps": 4, "num_stages": 1}
    _join_kernel[(cdiv(rows, _JOINED_ROWS), kv_heads, batch)](
        **{name: value for name, value in given.items() if name not in _SPAN_ONLY},
        **parts,
        **(numbers | joins),
        spans=spans,
    )
