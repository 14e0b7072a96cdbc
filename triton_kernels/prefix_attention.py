"""Attention of a suffix over a paged prefix and over itself: one program goes over all keys of its rows.

Where there are few rows, as in a decode, that would leave most of a GPU idle: these are for
``prefix_attention_decode``. Which of the two it is depends on the number of a sequence's rows alone, so
that bits do not depend on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import prefix_attention_decode
from .common import presets
from .common.attention_status import store_status
from .common.attention_tiles import (
    first_seen,
    nothing,
    over_prefix,
    over_suffix,
    store_attention,
    tile_rows,
)
from .common.launch import launched
from .common.products import upcast
from .common.sizes import cdiv, next_power_of_2


@launched
@triton.jit
def _attention_kernel(
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,
    key_ptr,  # [blocks, BLOCK, Hkv, D]
    value_ptr,
    table_ptr,  # [B, M]
    length_ptr,  # [B]
    sink_ptr,  # [Hq], or None
    output_ptr,  # [B, Hq, S, D]
    logsumexp_ptr,  # [B, Hq, S] float32, contiguous
    status_ptr,  # [B] int32
    q_strides,
    k_strides,
    v_strides,
    key_strides,
    value_strides,
    table_strides,
    output_strides,
    suffix,  # S
    kv_heads,
    blocks,
    entries,  # M
    scale,  # at least 0
    softcap,
    window,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(length_ptr + batch).to(tl.int32)
    table_ptr += batch * table_strides[0]
    if (tile == 0) & (kv_head == 0):
        store_status(status_ptr + batch, table_ptr, table_strides[1], length, blocks, entries, BLOCK)
    length = tl.minimum(tl.maximum(length, 0), entries * BLOCK)
    first_token = tile * ROWS // GROUPS
    last_token = tl.minimum((tile * ROWS + ROWS - 1) // GROUPS, suffix - 1)
    row = tile * ROWS + tl.arange(0, ROWS)
    position = length + row // GROUPS
    there = row < suffix * GROUPS
    q = tile_rows(q_ptr, q_strides, batch, kv_head, row, there, GROUPS, D, DIM)
    state = nothing(ROWS, DIM)
    # Tiles that all rows see as a whole need no masks: they end before the prefix does, and begin where the
    # last row's window has begun.
    start = first_seen(length + first_token, 0, window, COLUMNS)
    whole = tl.maximum(start, length // COLUMNS * COLUMNS)
    # Of float32 and wide heads the loop takes too many registers to stand there twice.
    if q.dtype != tl.float32 and DIM <= 128:
        if window is not None:
            begun = tl.maximum(length + last_token + 1 - window, 0)
            begun = tl.minimum(tl.maximum(start, tl.cdiv(begun, COLUMNS) * COLUMNS), whole)
            state = over_prefix(
                q,
                state,
                position,
                start,
                begun,
                length,
                key_ptr,
                value_ptr,
                key_strides,
                value_strides,
                table_ptr,
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
            start = begun
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
            table_ptr,
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
        start = whole
    state = over_prefix(
        q,
        state,
        position,
        start,
        length,
        length,
        key_ptr,
        value_ptr,
        key_strides,
        value_strides,
        table_ptr,
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
    # A suffix is never negative; but what is computed of these rows is then not what was computed of the
    # same ones above, and kept in registers all the time between.
    row = (tile + (suffix < 0)) * ROWS + tl.arange(0, ROWS)
    top, total, mix = over_suffix(
        q,
        state,
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


def seen_window(window: int | None, suffix: int, key_pool: Tensor, block_tables: Tensor) -> int | None:
    """The window, None if it holds whatever there can be."""
    most = block_tables.shape[1] * key_pool.shape[1] + suffix
    return None if window is None or window >= most else window


def tile_config(kernel: str, q: Tensor, rows: int | None, *, half: bool, masked: bool) -> dict[str, Any]:
    """The preset of a kernel, D, and D as a power of two.

    Args:
        rows: that a tile has at most; None where it may have rows of several sequences.
        half: whether products are of half precision; float32's are not the tensor cores', and their
            operands lie in registers.
        masked: whether there is a window or a soft cap, which take registers.
    """
    dim = max(16, next_power_of_2(q.shape[-1]))
    kind = "half" if half else "float32"
    if dim > 128:
        kind += " wide"
    elif half and masked:
        kind += " masked"
    chosen = presets.config(kernel, kind, q.device)
    return chosen | {
        "ROWS": min(chosen["ROWS"], max(16, next_power_of_2(rows))) if rows else chosen["ROWS"],
        "D": q.shape[-1],
        "DIM": dim,
        "UPCAST": upcast(q),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``nabla_fast.ops.prefix_attention``. A row has the same bits whatever the other sequences.

    Args:
        q: [B, Hq, S, D] float32, bfloat16 or float16, as all others; any strides.
        k, v: [B, Hkv, S, D].
        key_pool, value_pool: [blocks, block_size, Hkv, D].
        block_tables: [B, M] integers.
        prefix_lengths: [B] integers, contiguous.
        scale, window: as there.
        softcap: c of c·tanh(score/c), or None.
        sinks: [Hq], scores of a token without a value that every query sees, or None.
    Returns:
        The output, in memory by token; the logsumexp [B, Hq, S] float32; the sequences' status [B] int32,
        which is 4 where a block is not in the pool or the prefix is longer than its table.
    """
    batch, heads, suffix, dim = q.shape
    kv_heads, groups = k.shape[1], heads // max(1, k.shape[1])
    output = torch.empty(batch, suffix, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    logsumexp = torch.empty(batch, heads, suffix, dtype=torch.float32, device=q.device)
    status = torch.empty(batch, dtype=torch.int32, device=q.device)
    if logsumexp.numel() == 0:
        return output, logsumexp, status.zero_()
    if scale < 0:  # The largest product is then the largest score, in kernels.
        q, scale = -q, -scale
    rows = suffix * groups
    # None on gfx942 under Triton 3.6, whose compiler does not come to an end with that kernel.
    few = rows <= presets.config("prefix_attention_decode", "rows", q.device)["MOST"]
    kernel = "prefix_attention_decode" if few else "prefix_attention"
    window = seen_window(window, suffix, key_pool, block_tables)
    masked = window is not None or softcap is not None
    half = q.dtype != torch.float32
    numbers: dict[str, Any] = {
        "suffix": suffix,
        "kv_heads": kv_heads,
        "blocks": len(key_pool),
        "entries": block_tables.shape[1],
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "GROUPS": groups,
        "BLOCK": key_pool.shape[1],
        **tile_config(kernel, q, None if few else rows, half=half, masked=masked),
    }
    given = {
        "q_ptr": q,
        "key_ptr": key_pool,
        "value_ptr": value_pool,
        "table_ptr": block_tables,
        "length_ptr": prefix_lengths,
        "k_ptr": k,
        "v_ptr": v,
        "sink_ptr": sinks,
        "output_ptr": output,
        "logsumexp_ptr": logsumexp,
        "status_ptr": status,
        "q_strides": q.stride(),
        "k_strides": k.stride(),
        "v_strides": v.stride(),
        "key_strides": key_pool.stride(),
        "value_strides": value_pool.stride(),
        "table_strides": block_tables.stride(),
        "output_strides": output.stride(),
    }
    with torch.cuda.device_of(q):
        if few:
            prefix_attention_decode.launch(given, numbers)
        else:
            _attention_kernel[(cdiv(rows, numbers["ROWS"]), kv_heads, batch)](**given, **numbers)
    return output, logsumexp, status
