"""Gradients of attention over a paged prefix, in the suffix's queries, keys and values.

The output and the rows' logsumexp are computed again first. Then one kernel goes over all keys for the
gradient of the queries, the only one that the prefix takes part in, and one over the rows that see a token
for those of its key and value: nothing is added up by several programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.attention_tiles import (
    capped_slope,
    first_seen,
    own_rows,
    own_seen,
    paged_rows,
    product,
    rounded,
    rounded_gradient,
    scores,
    store_rows,
    tile_rows,
    weights,
)
from .common.launch import launched
from .common.sizes import cdiv
from .prefix_attention import place_of, prefix_attention, seen_window, tile_config


@triton.jit
def _score_grads(q, grad, keys, values, logsumexp, delta, seen, scale, softcap, UPCAST: tl.constexpr):
    """Weights p and the gradients of q·k: [ROWS, COLUMNS] each.

    ∂ℒ/∂s = p (⟨∂ℒ/∂o, v⟩ − δ), δ = ⟨∂ℒ/∂o, o⟩, which is its mean under p.
    """
    s = scores(q, keys, scale, softcap, UPCAST)
    p = tl.where(seen, weights(s, logsumexp[:, None]), 0.0)
    ds = p * (product(grad, tl.trans(values), UPCAST) - delta[:, None]) * scale
    # A weight of 1 is the only one: its gradient is 0, and not what two sums of the same numbers differ by.
    ds = tl.where(p == 1.0, 0.0, ds)
    if softcap is not None:
        ds = ds * capped_slope(s, softcap)
    return p, tl.where(seen, ds, 0.0)


@launched
@triton.jit(do_not_specialize=["tiles"])
def _query_grad_kernel(
    grad_ptr,  # [B, Hq, S, D]: ∂ℒ/∂output
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,
    key_ptr,  # [blocks, block_size, Hkv, D]
    value_ptr,
    table_ptr,  # [B, M]
    length_ptr,  # [B]
    output_ptr,  # [B, Hq, S, D] float32
    logsumexp_ptr,  # [B, Hq, S] float32
    delta_ptr,  # [B, Hq, S] float32: δ of the rows
    dq_ptr,  # [B, Hq, S, D]
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    key_strides,
    value_strides,
    table_strides,
    output_strides,
    dq_strides,
    suffix,
    kv_heads,
    dim,
    block_size,
    blocks,
    entries,  # M
    tiles,
    scale,
    softcap,
    window,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, batch, kv_head = place_of(tl.program_id(0), tiles, kv_heads)
    length = tl.load(length_ptr + batch).to(tl.int32)
    length = tl.minimum(tl.maximum(length, 0), entries * block_size)
    table_ptr += batch * table_strides[0]
    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < suffix * GROUPS
    token = row // GROUPS
    first_token = tile * ROWS // GROUPS
    q = tile_rows(q_ptr, q_strides, batch, kv_head, row, there, dim, GROUPS, DIM)
    grad = tile_rows(grad_ptr, grad_strides, batch, kv_head, row, there, dim, GROUPS, DIM)
    output = tile_rows(output_ptr, output_strides, batch, kv_head, row, there, dim, GROUPS, DIM)
    delta = tl.sum(grad.to(tl.float32) * output, axis=1)
    at = (batch * (kv_heads * GROUPS) + kv_head * GROUPS + row % GROUPS) * suffix + token
    logsumexp = tl.load(logsumexp_ptr + at, mask=there, other=0.0)
    tl.store(delta_ptr + at, delta, mask=there)

    dq = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(first_seen(length + first_token, 0, window, COLUMNS), length, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        known = place < length
        keys = paged_rows(
            key_ptr,
            key_strides,
            table_ptr,
            table_strides[1],
            place,
            known,
            block_size,
            blocks,
            kv_head,
            dim,
            DIM,
        )
        values = paged_rows(
            value_ptr,
            value_strides,
            table_ptr,
            table_strides[1],
            place,
            known,
            block_size,
            blocks,
            kv_head,
            dim,
            DIM,
        )
        seen = known[None, :] & there[:, None]
        if window is not None:
            seen = seen & ((length + token)[:, None] - place[None, :] < window)
        _p, ds = _score_grads(q, grad, keys, values, logsumexp, delta, seen, scale, softcap, UPCAST)
        dq += product(rounded_gradient(ds, q, keys), keys, UPCAST)
    last_token = tl.minimum((tile * ROWS + ROWS - 1) // GROUPS, suffix - 1)
    for first in range(first_seen(first_token, 0, window, COLUMNS), last_token + 1, COLUMNS):
        other = first + tl.arange(0, COLUMNS)
        keys = own_rows(k_ptr, k_strides, batch, kv_head, other, suffix, dim, DIM)
        values = own_rows(v_ptr, v_strides, batch, kv_head, other, suffix, dim, DIM)
        seen = own_seen(token, other, suffix, window) & there[:, None]
        _p, ds = _score_grads(q, grad, keys, values, logsumexp, delta, seen, scale, softcap, UPCAST)
        dq += product(rounded_gradient(ds, q, keys), keys, UPCAST)
    store_rows(dq_ptr, dq_strides, batch, kv_head, row, there, dim, dq, GROUPS, DIM)


@launched
@triton.jit(do_not_specialize=["tiles"])
def _key_grad_kernel(
    grad_ptr,  # [B, Hq, S, D]: ∂ℒ/∂output
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,
    logsumexp_ptr,  # [B, Hq, S] float32
    delta_ptr,  # [B, Hq, S] float32
    dk_ptr,  # [B, Hkv, S, D]
    dv_ptr,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    suffix,
    kv_heads,
    dim,
    tiles,
    scale,
    softcap,
    window,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, batch, kv_head = place_of(tl.program_id(0), tiles, kv_heads)
    own = tile * COLUMNS + tl.arange(0, COLUMNS)
    keys = own_rows(k_ptr, k_strides, batch, kv_head, own, suffix, dim, DIM)
    values = own_rows(v_ptr, v_strides, batch, kv_head, own, suffix, dim, DIM)
    dk = tl.zeros((COLUMNS, DIM), tl.float32)
    dv = tl.zeros((COLUMNS, DIM), tl.float32)
    rows = suffix * GROUPS
    stop = rows
    if window is not None:
        stop = tl.minimum(rows, (tile * COLUMNS + COLUMNS - 1 + window) * GROUPS)
    for first in range(tile * COLUMNS * GROUPS, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < rows
        token = row // GROUPS
        q = tile_rows(q_ptr, q_strides, batch, kv_head, row, there, dim, GROUPS, DIM)
        grad = tile_rows(grad_ptr, grad_strides, batch, kv_head, row, there, dim, GROUPS, DIM)
        at = (batch * (kv_heads * GROUPS) + kv_head * GROUPS + row % GROUPS) * suffix + token
        logsumexp = tl.load(logsumexp_ptr + at, mask=there, other=0.0)
        delta = tl.load(delta_ptr + at, mask=there, other=0.0)
        seen = own_seen(token, own, suffix, window) & there[:, None]
        p, ds = _score_grads(q, grad, keys, values, logsumexp, delta, seen, scale, softcap, UPCAST)
        dv += product(tl.trans(rounded(p, grad, values)), grad, UPCAST)
        dk += product(tl.trans(rounded_gradient(ds, q, keys)), q, UPCAST)
    column = tl.arange(0, DIM)
    mask = (own < suffix)[:, None] & (column < dim)[None, :]
    at = batch * dk_strides[0] + kv_head * dk_strides[1] + own.to(tl.int64) * dk_strides[2]
    at = dk_ptr + at[:, None] + column[None, :] * dk_strides[3]
    tl.store(at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    at = batch * dv_strides[0] + kv_head * dv_strides[1] + own.to(tl.int64) * dv_strides[2]
    at = dv_ptr + at[:, None] + column[None, :] * dv_strides[3]
    tl.store(at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def prefix_attention_backward(
    cotangent: Tensor,
    output: Tensor,
    logsumexp: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂ℒ/∂q, ∂ℒ/∂k and ∂ℒ/∂v of :func:`~.prefix_attention.prefix_attention`, and its status.

    A row's numbers are the same bits whatever the other sequences.

    Args:
        cotangent: ∂ℒ/∂output [B, Hq, S, D].
        output, logsumexp: [B, Hq, S, D] and [B, Hq, S] of the forward; computed again, and not read.
        q, k, v, …, sinks: as there.
    Returns:
        [B, Hq, S, D] and twice [B, Hkv, S, D], in memory by token; the status [B] int32.
    """
    batch, heads, suffix, dim = q.shape
    kv_heads, groups = k.shape[1], heads // max(1, k.shape[1])

    def by_token(like: Tensor, dtype: torch.dtype) -> Tensor:
        count = like.shape[1]
        memory = torch.empty(batch, suffix, count, dim, dtype=dtype, device=q.device)
        return memory.transpose(1, 2)

    dq, dk, dv = (by_token(x, x.dtype) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv, torch.zeros(batch, dtype=torch.int32, device=q.device)
    output = by_token(q, torch.float32)
    delta = torch.empty(batch, heads, suffix, dtype=torch.float32, device=q.device)
    window = seen_window(window, suffix, key_pool, block_tables)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    _output, logsumexp, status = prefix_attention(
        q,
        k,
        v,
        key_pool,
        value_pool,
        block_tables,
        prefix_lengths,
        sinks=sinks,
        output=output,
        **options,
    )
    rows = suffix * groups
    options |= {"suffix": suffix, "kv_heads": kv_heads, "dim": dim, "GROUPS": groups}
    # Gradients of float16 scores are not rounded to it: their products are float32's.
    half = q.dtype == torch.bfloat16
    of_queries = options | tile_config("prefix_attention_query_grad", q, rows, softcap, half=half)
    of_keys = options | tile_config("prefix_attention_key_grad", q, rows, softcap, half=half)
    given = {"grad_ptr": cotangent, "q_ptr": q, "k_ptr": k, "v_ptr": v, "logsumexp_ptr": logsumexp}
    given |= {"grad_strides": cotangent.stride(), "q_strides": q.stride(), "k_strides": k.stride()}
    given |= {"v_strides": v.stride(), "delta_ptr": delta}
    tiles, key_tiles = cdiv(rows, of_queries["ROWS"]), cdiv(suffix, of_keys["COLUMNS"])
    with torch.cuda.device_of(q):
        _query_grad_kernel[(batch * kv_heads * tiles,)](
            key_ptr=key_pool,
            value_ptr=value_pool,
            table_ptr=block_tables,
            length_ptr=prefix_lengths,
            output_ptr=output,
            dq_ptr=dq,
            key_strides=key_pool.stride(),
            value_strides=value_pool.stride(),
            table_strides=block_tables.stride(),
            output_strides=output.stride(),
            dq_strides=dq.stride(),
            block_size=key_pool.shape[1],
            blocks=key_pool.shape[0],
            entries=block_tables.shape[1],
            tiles=tiles,
            **given,
            **of_queries,
        )
        _key_grad_kernel[(batch * kv_heads * key_tiles,)](
            dk_ptr=dk,
            dv_ptr=dv,
            dk_strides=dk.stride(),
            dv_strides=dv.stride(),
            tiles=key_tiles,
            **given,
            **of_keys,
        )
    return dq, dk, dv, status
