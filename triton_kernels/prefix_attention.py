"""Attention of a suffix over a paged prefix and over itself.

For few rows, as in a decode, each span of a prefix has a program of its own, and another kernel joins the
spans; for more rows one program goes over all spans of its rows. Bits do not depend on which it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import presets
from .common.attention_tiles import (
    SPAN,
    attended,
    first_seen,
    joined,
    nothing,
    own_rows,
    own_seen,
    prefix_span,
    scores,
    store_rows,
    tile_rows,
)
from .common.launch import launched
from .common.scratch import share
from .common.sizes import cdiv, next_power_of_2

_FEW = 16  # rows of a key-value head for which spans have programs of their own
OUTSIDE = tl.constexpr(4)  # status of a sequence whose table names what is not in the pool, or is too short


@triton.jit
def place_of(program, tiles, kv_heads):
    """A program's tile of rows, sequence and key-value head; neighbours share a sequence's prefix."""
    tile = program % tiles
    return tile, (program // tiles // kv_heads).to(tl.int64), (program // tiles % kv_heads).to(tl.int64)


@launched
@triton.jit(do_not_specialize=["spans", "tiles"])
def _span_kernel(
    q_ptr,  # [B, Hq, S, D]
    key_ptr,  # [blocks, block_size, Hkv, D]
    value_ptr,
    table_ptr,  # [B, M]
    length_ptr,  # [B]
    stats_ptr,  # [B, Hkv, spans, 2, rows] float32
    mix_ptr,  # [B, Hkv, spans, rows, D] float32
    q_strides,
    key_strides,
    value_strides,
    table_strides,
    suffix,  # S
    kv_heads,
    dim,
    block_size,
    blocks,
    entries,  # M
    spans,
    tiles,
    scale,
    softcap,
    window,
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,  # of a span
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    span = tl.program_id(0) % spans
    tile, batch, kv_head = place_of(tl.program_id(0) // spans, tiles, kv_heads)
    length = tl.load(length_ptr + batch).to(tl.int32)
    length = tl.minimum(length, entries * block_size)
    start = span * LENGTH
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = suffix * GROUPS
    there = row < rows
    if start < length:
        q = tile_rows(q_ptr, q_strides, batch, kv_head, row, there, dim, GROUPS, DIM)
        top, total, mix = prefix_span(
            q,
            length + row // GROUPS,
            length + tile * ROWS // GROUPS,
            key_ptr,
            value_ptr,
            key_strides,
            value_strides,
            table_ptr + batch * table_strides[0],
            table_strides[1],
            block_size,
            blocks,
            kv_head,
            start,
            tl.minimum(start + LENGTH, length),
            scale,
            softcap,
            window,
            dim,
            ROWS,
            COLUMNS,
            DIM,
            UPCAST,
        )
        part = (batch * kv_heads + kv_head) * spans + span
        tl.store(stats_ptr + part * (2 * rows) + row, top, mask=there)
        tl.store(stats_ptr + part * (2 * rows) + rows + row, total, mask=there)
        column = tl.arange(0, DIM)
        at = mix_ptr + (part * rows + row)[:, None] * dim + column[None, :]
        tl.store(at, mix, mask=there[:, None] & (column < dim)[None, :])


@launched
@triton.jit(do_not_specialize=["spans", "tiles"])
def _attention_kernel(
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,
    key_ptr,  # [blocks, block_size, Hkv, D]
    value_ptr,
    table_ptr,  # [B, M]
    length_ptr,  # [B]
    sink_ptr,  # [Hq], or None
    stats_ptr,  # [B, Hkv, spans, 2, rows] float32, or None: spans are attended to here
    mix_ptr,  # [B, Hkv, spans, rows, D] float32, or None
    output_ptr,  # [B, Hq, S, D]
    logsumexp_ptr,  # [B, Hq, S] float32
    status_ptr,  # [B] int32
    q_strides,
    k_strides,
    v_strides,
    key_strides,
    value_strides,
    table_strides,
    output_strides,
    suffix,
    kv_heads,
    dim,
    block_size,
    blocks,
    entries,  # M
    spans,
    tiles,
    scale,
    softcap,
    window,
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,  # of a span
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,  # checked at a time
    UPCAST: tl.constexpr,
):
    tile, batch, kv_head = place_of(tl.program_id(0), tiles, kv_heads)
    length = tl.load(length_ptr + batch).to(tl.int32)
    table_ptr += batch * table_strides[0]
    if (tile == 0) & (kv_head == 0):
        _store_status(
            status_ptr + batch, table_ptr, table_strides[1], length, block_size, blocks, entries, ENTRIES
        )
    length = tl.minimum(tl.maximum(length, 0), entries * block_size)
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = suffix * GROUPS
    there = row < rows
    token = row // GROUPS
    first_token = tile * ROWS // GROUPS
    q = tile_rows(q_ptr, q_strides, batch, kv_head, row, there, dim, GROUPS, DIM)
    top, total, mix = nothing(ROWS, DIM)
    for start in range(0, length, LENGTH):
        if stats_ptr is None:
            span_top, span_total, span_mix = prefix_span(
                q,
                length + token,
                length + first_token,
                key_ptr,
                value_ptr,
                key_strides,
                value_strides,
                table_ptr,
                table_strides[1],
                block_size,
                blocks,
                kv_head,
                start,
                tl.minimum(start + LENGTH, length),
                scale,
                softcap,
                window,
                dim,
                ROWS,
                COLUMNS,
                DIM,
                UPCAST,
            )
        else:
            part = (batch * kv_heads + kv_head) * spans + start // LENGTH
            span_top = tl.load(stats_ptr + part * (2 * rows) + row, mask=there, other=-float("inf"))
            span_total = tl.load(stats_ptr + part * (2 * rows) + rows + row, mask=there, other=0.0)
            column = tl.arange(0, DIM)
            at = mix_ptr + (part * rows + row)[:, None] * dim + column[None, :]
            span_mix = tl.load(at, mask=there[:, None] & (column < dim)[None, :], other=0.0)
        top, total, mix = joined(top, total, mix, span_top, span_total, span_mix)

    own_top, own_total, own_mix = nothing(ROWS, DIM)
    last_token = tl.minimum((tile * ROWS + ROWS - 1) // GROUPS, suffix - 1)
    for first in range(first_seen(first_token, 0, window, COLUMNS), last_token + 1, COLUMNS):
        other = first + tl.arange(0, COLUMNS)
        keys = own_rows(k_ptr, k_strides, batch, kv_head, other, suffix, dim, DIM)
        values = own_rows(v_ptr, v_strides, batch, kv_head, other, suffix, dim, DIM)
        s = scores(q, keys, scale, softcap, UPCAST)
        s = tl.where(own_seen(token, other, suffix, window), s, -float("inf"))
        own_top, own_total, own_mix = attended(q, s, values, own_top, own_total, own_mix, UPCAST)
    top, total, mix = joined(top, total, mix, own_top, own_total, own_mix)
    head = kv_head * GROUPS + row % GROUPS
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=there, other=0.0).to(tl.float32)
        _none, zeros, empty = nothing(ROWS, DIM)
        top, total, mix = joined(top, total, mix, sink, zeros + 1.0, empty)
    output = mix / total[:, None]
    store_rows(output_ptr, output_strides, batch, kv_head, row, there, dim, output, GROUPS, DIM)
    at = logsumexp_ptr + (batch * (kv_heads * GROUPS) + head) * suffix + token
    tl.store(at, top + tl.log(total), mask=there)


@triton.jit
def _store_status(
    status_ptr, table_ptr, table_stride, length, block_size, blocks, entries, ENTRIES: tl.constexpr
):
    """Whether a prefix fits its table, and its blocks the pool."""
    bad = (length < 0) | (length > entries * block_size)
    used = tl.minimum(tl.maximum(length + block_size - 1, 0) // block_size, entries)
    outside = tl.zeros((ENTRIES,), tl.int32)
    for first in range(0, used, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        block = tl.load(table_ptr + entry.to(tl.int64) * table_stride, mask=entry < used, other=0)
        outside += ((entry < used) & ((block < 0) | (block >= blocks))).to(tl.int32)
    bad = bad | (tl.sum(outside, axis=0) > 0)
    tl.store(status_ptr, tl.where(bad, OUTSIDE, 0))


def seen_window(window: int | None, suffix: int, key_pool: Tensor, block_tables: Tensor) -> int | None:
    """The window, None if it holds whatever there can be."""
    most = block_tables.shape[1] * key_pool.shape[1] + suffix
    return None if window is None or window >= most else window


def tile_config(kernel: str, q: Tensor, rows: int, softcap: float | None, *, half: bool) -> dict[str, Any]:
    """The preset of a kernel, with a tile no larger than ``rows`` need, and D as a power of two.

    Args:
        half: whether products are of half precision; float32's are not the tensor cores', and their
            operands lie in registers.
    """
    dim = max(16, next_power_of_2(q.shape[-1]))
    kind = "half" if half else "float32"
    if dim > 128:
        kind += " wide"
    elif half and softcap is not None:
        kind += " capped"
    chosen = presets.config(kernel, kind, q.device)
    fewest = max(16, next_power_of_2(rows))
    return chosen | {
        "ROWS": min(chosen["ROWS"], fewest),
        "DIM": dim,
        "UPCAST": q.device.type == "cpu",
        "enable_fp_fusion": False,
    }


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``nabla_fast.ops.prefix_attention``. A row's numbers are the same bits whatever the other rows.

    Args:
        q: [B, Hq, S, D] float32, bfloat16 or float16, as all others; any strides.
        k, v: [B, Hkv, S, D].
        key_pool, value_pool: [blocks, block_size, Hkv, D].
        block_tables: [B, M] integers.
        prefix_lengths: [B] integers, contiguous.
        scale, window: as there.
        softcap: c of c·tanh(score/c), or None.
        sinks: [Hq], scores of a token without a value that every query sees, or None.
        output: [B, Hq, S, D] to be written to, or None.
    Returns:
        The output; the logsumexp [B, Hq, S] float32; the sequences' status [B] int32, which is 4 where a
        block is not in the pool or the prefix is longer than its table.
    """
    batch, heads, suffix, dim = q.shape
    kv_heads, groups = k.shape[1], heads // max(1, k.shape[1])
    if output is None:
        output = torch.empty(batch, suffix, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    logsumexp = torch.empty(batch, heads, suffix, dtype=torch.float32, device=q.device)
    status = torch.empty(batch, dtype=torch.int32, device=q.device)
    if logsumexp.numel() == 0:
        return output, logsumexp, status.zero_()
    rows, entries = suffix * groups, block_tables.shape[1]
    blocks, block_size = key_pool.shape[:2]
    sizes = tile_config("prefix_attention", q, rows, softcap, half=q.dtype != torch.float32)
    window = seen_window(window, suffix, key_pool, block_tables)
    tiles, spans = cdiv(rows, sizes["ROWS"]), cdiv(entries * block_size, SPAN)
    numbers: dict[str, Any] = {
        "suffix": suffix,
        "kv_heads": kv_heads,
        "dim": dim,
        "block_size": block_size,
        "blocks": blocks,
        "entries": entries,
        "spans": spans,
        "tiles": tiles,
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "GROUPS": groups,
        "LENGTH": SPAN,
        **sizes,
    }
    read = {
        "q_ptr": q,
        "key_ptr": key_pool,
        "value_ptr": value_pool,
        "table_ptr": block_tables,
        "length_ptr": prefix_lengths,
        "q_strides": q.stride(),
        "key_strides": key_pool.stride(),
        "value_strides": value_pool.stride(),
        "table_strides": block_tables.stride(),
    }
    programs = batch * kv_heads * tiles
    part_bytes = 4 * batch * kv_heads * spans * rows * (dim + 2)
    stats = mixes = None
    with torch.cuda.device_of(q):
        if rows <= _FEW and spans > 1 and part_bytes <= share(15):
            stats = torch.empty(batch, kv_heads, spans, 2, rows, dtype=torch.float32, device=q.device)
            mixes = torch.empty(batch, kv_heads, spans, rows, dim, dtype=torch.float32, device=q.device)
            _span_kernel[(programs * spans,)](**read, stats_ptr=stats, mix_ptr=mixes, **numbers)
        _attention_kernel[(programs,)](
            **read,
            k_ptr=k,
            v_ptr=v,
            sink_ptr=sinks,
            stats_ptr=stats,
            mix_ptr=mixes,
            output_ptr=output,
            logsumexp_ptr=logsumexp,
            status_ptr=status,
            k_strides=k.stride(),
            v_strides=v.stride(),
            output_strides=output.stride(),
            ENTRIES=128,
            **numbers,
        )
    return output, logsumexp, status
