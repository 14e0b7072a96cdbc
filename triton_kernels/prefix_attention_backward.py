"""Gradients of attention over a paged prefix, in the suffix's queries, keys and values.

One kernel goes over all keys for the gradient of the queries, the only one that the prefix takes part in,
and one over the rows that see a token for those of its key and value: nothing is added up by several
programs, and the prefix is read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.attention_status import store_status
from .common.attention_tiles import (
    capped_slope,
    first_seen,
    own_rows,
    own_seen,
    paged_rows,
    product,
    rounded,
    rounded_gradient,
    score_unit,
    scores,
    store_rows,
    tile_rows,
)
from .common.launch import launched
from .common.sizes import cdiv
from .prefix_attention import seen_window, tile_config


@triton.jit
def _alone(position, window, SINKS: tl.constexpr):
    """Which rows see themselves alone: their weight is 1 whatever the score, whose gradient is 0 then.

    What two sums of the same numbers differ by would not be.
    """
    alone = position == 0
    if window is not None:
        alone = alone | (window == 1)
    return alone & (not SINKS)


@triton.jit
def _score_grads(s, dp, logsumexp, delta, scale, softcap):
    """Weights p and ∂ℒ/∂s / scale, s the products q·k: of the shape of ``s``, as all arguments.

    ∂ℒ/∂s = scale · p (dp − δ), where dp = ⟨∂ℒ/∂o, v⟩ and δ = ⟨∂ℒ/∂o, o⟩, its mean under p.

    Args:
        s: of :func:`scores`.
        logsumexp: to base 2.
    """
    p = tl.exp2(tl.fma(s, score_unit(scale, softcap), -logsumexp))
    ds = p * (dp - delta)
    if softcap is not None:
        ds = ds * capped_slope(s, softcap)
    return p, ds


@triton.jit
def _from_keys(
    dq,  # [ROWS, DIM]
    q,
    grad,
    keys,  # [COLUMNS, DIM]
    values,
    logsumexp,  # [ROWS]
    delta,  # [ROWS]
    seen,  # [ROWS, COLUMNS], or what it can be broadcast from; None for all
    scale,
    softcap,
    UPCAST: tl.constexpr,
):
    """∂ℒ/∂q / scale with one more tile of keys."""
    s = scores(q, keys, scale, softcap, UPCAST)
    dp = product(grad, tl.trans(values), None, UPCAST)
    _p, ds = _score_grads(s, dp, logsumexp[:, None], delta[:, None], scale, softcap)
    if seen is not None:
        ds = tl.where(seen, ds, 0.0)
    return product(rounded_gradient(ds, q, keys), keys, dq, UPCAST)


@triton.jit
def _over_prefix(
    dq,
    q,
    grad,
    logsumexp,
    delta,
    position,  # [ROWS], of the rows
    start,
    stop,
    length,  # of the prefix; None if all positions before ``stop`` are in it, and seen
    key_ptr,
    value_ptr,
    key_strides,
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
    """∂ℒ/∂q / scale with positions of the prefix from ``start`` to before ``stop``."""
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
        seen = None
        if length is not None:
            seen = (place < length)[None, :]
            if window is not None:
                seen = seen & (position[:, None] - place[None, :] < window)
        dq = _from_keys(dq, q, grad, keys, values, logsumexp, delta, seen, scale, softcap, UPCAST)
    return dq


@launched
@triton.jit
def _query_grad_kernel(
    grad_ptr,  # [B, Hq, S, D]: ∂ℒ/∂output
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,
    key_ptr,  # [blocks, BLOCK, Hkv, D]
    value_ptr,
    table_ptr,  # [B, M]
    length_ptr,  # [B]
    output_ptr,  # [B, Hq, S, D]
    logsumexp_ptr,  # [B, Hq, S] float32, contiguous
    delta_ptr,  # [B, Hq, S] float32: δ of the rows
    dq_ptr,  # [B, Hq, S, D]
    status_ptr,  # [B] int32
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
    blocks,
    entries,  # M
    scale,
    softcap,
    window,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
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
    there = row < suffix * GROUPS
    q = tile_rows(q_ptr, q_strides, batch, kv_head, row, there, GROUPS, D, DIM)
    grad = tile_rows(grad_ptr, grad_strides, batch, kv_head, row, there, GROUPS, D, DIM)
    output = tile_rows(output_ptr, output_strides, batch, kv_head, row, there, GROUPS, D, DIM)
    delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), axis=1)
    at = (batch * (kv_heads * GROUPS) + kv_head * GROUPS + row % GROUPS) * suffix + row // GROUPS
    logsumexp = tl.load(logsumexp_ptr + at, mask=there, other=0.0) * 1.4426950408889634
    tl.store(delta_ptr + at, delta, mask=there)

    dq = tl.zeros((ROWS, DIM), tl.float32)
    # Tiles of keys as in the forward: those that all rows see as a whole need no masks.
    start = first_seen(length + first_token, 0, window, COLUMNS)
    whole = tl.maximum(start, length // COLUMNS * COLUMNS)
    # Of float32 and wide heads the loop takes too many registers to stand there twice.
    if q.dtype != tl.float32 and DIM <= 128:
        if window is not None:
            begun = tl.maximum(length + last_token + 1 - window, 0)
            begun = tl.minimum(tl.maximum(start, tl.cdiv(begun, COLUMNS) * COLUMNS), whole)
            dq = _over_prefix(
                dq,
                q,
                grad,
                logsumexp,
                delta,
                length + row // GROUPS,
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
        dq = _over_prefix(
            dq,
            q,
            grad,
            logsumexp,
            delta,
            length + row // GROUPS,
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
    dq = _over_prefix(
        dq,
        q,
        grad,
        logsumexp,
        delta,
        length + row // GROUPS,
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
    # As in the forward: nothing that was computed of these rows above is kept until here.
    row = (tile + (suffix < 0)) * ROWS + tl.arange(0, ROWS)
    token = row // GROUPS
    for first in tl.range(
        first_seen(first_token, 0, window, COLUMNS), last_token + 1, COLUMNS, num_stages=2
    ):
        other = first + tl.arange(0, COLUMNS)
        keys = own_rows(k_ptr, k_strides, batch, kv_head, other, suffix, D, DIM)
        values = own_rows(v_ptr, v_strides, batch, kv_head, other, suffix, D, DIM)
        seen = own_seen(token, other, suffix, window)
        dq = _from_keys(dq, q, grad, keys, values, logsumexp, delta, seen, scale, softcap, UPCAST)
    dq = dq * tl.where(_alone(length + token, window, SINKS), 0.0, scale)[:, None]
    store_rows(dq_ptr, dq_strides, batch, kv_head, row, row < suffix * GROUPS, dq, GROUPS, D, DIM)


@launched
@triton.jit
def _key_grad_kernel(
    grad_ptr,  # [B, Hq, S, D]: ∂ℒ/∂output
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,
    length_ptr,  # [B]
    logsumexp_ptr,  # [B, Hq, S] float32, contiguous
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
    scale,
    softcap,
    window,
    GROUPS: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Scores are [COLUMNS, ROWS] here: of the products that sum over rows they are the left operands, which
    # the tensor cores take from registers.
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.maximum(tl.load(length_ptr + batch).to(tl.int32), 0)
    own = tile * COLUMNS + tl.arange(0, COLUMNS)
    keys = own_rows(k_ptr, k_strides, batch, kv_head, own, suffix, D, DIM)
    values = own_rows(v_ptr, v_strides, batch, kv_head, own, suffix, D, DIM)
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
        q = tile_rows(q_ptr, q_strides, batch, kv_head, row, there, GROUPS, D, DIM)
        grad = tile_rows(grad_ptr, grad_strides, batch, kv_head, row, there, GROUPS, D, DIM)
        at = (batch * (kv_heads * GROUPS) + kv_head * GROUPS + row % GROUPS) * suffix + token
        logsumexp = tl.load(logsumexp_ptr + at, mask=there, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + at, mask=there, other=0.0)
        s = scores(keys, q, scale, softcap, UPCAST)
        dp = product(values, tl.trans(grad), None, UPCAST)
        p, ds = _score_grads(s, dp, logsumexp[None, :], delta[None, :], scale, softcap)
        distance = token[None, :] - own[:, None]
        seen = (distance >= 0) & there[None, :]
        if window is not None:
            seen = seen & (distance < window)
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen & ~_alone(length + token, window, SINKS)[None, :], ds, 0.0)
        dv = product(rounded(p, grad, values), grad, dv, UPCAST)
        dk = product(rounded_gradient(ds, q, keys), q, dk, UPCAST)
    column = tl.arange(0, DIM)
    mask = (own < suffix)[:, None] & (column < D)[None, :]
    at = batch * dk_strides[0] + kv_head * dk_strides[1] + own.to(tl.int64) * dk_strides[2]
    at = dk_ptr + at[:, None] + column[None, :] * dk_strides[3]
    tl.store(at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
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
        output, logsumexp: [B, Hq, S, D] and [B, Hq, S] of there; any strides.
        q, k, v, …, sinks: as there.
    Returns:
        [B, Hq, S, D] and twice [B, Hkv, S, D], in memory by token; the status [B] int32.
    """
    batch, heads, suffix, dim = q.shape
    kv_heads, groups = k.shape[1], heads // max(1, k.shape[1])
    dq, dk, dv = (
        torch.empty(batch, suffix, x.shape[1], dim, dtype=x.dtype, device=q.device).transpose(1, 2)
        for x in (q, k, v)
    )
    status = torch.empty(batch, dtype=torch.int32, device=q.device)
    if q.numel() == 0:
        return dq, dk, dv, status.zero_()
    rows = suffix * groups
    window = seen_window(window, suffix, key_pool, block_tables)
    options: dict[str, Any] = {
        "suffix": suffix,
        "kv_heads": kv_heads,
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "GROUPS": groups,
        "SINKS": sinks is not None,
    }
    # Gradients of float16 scores are not rounded to it: their products are float32's.
    kinds = {"half": q.dtype == torch.bfloat16, "masked": window is not None or softcap is not None}
    of_queries = options | tile_config("prefix_attention_query_grad", q, rows, **kinds)
    of_keys = options | tile_config("prefix_attention_key_grad", q, rows, **kinds)
    given = {
        "grad_ptr": cotangent,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "length_ptr": prefix_lengths,
        "logsumexp_ptr": logsumexp.contiguous(),
        "delta_ptr": torch.empty(batch, heads, suffix, dtype=torch.float32, device=q.device),
        "grad_strides": cotangent.stride(),
        "q_strides": q.stride(),
        "k_strides": k.stride(),
        "v_strides": v.stride(),
    }
    with torch.cuda.device_of(q):
        _query_grad_kernel[(cdiv(rows, of_queries["ROWS"]), kv_heads, batch)](
            key_ptr=key_pool,
            value_ptr=value_pool,
            table_ptr=block_tables,
            output_ptr=output,
            dq_ptr=dq,
            status_ptr=status,
            key_strides=key_pool.stride(),
            value_strides=value_pool.stride(),
            table_strides=block_tables.stride(),
            output_strides=output.stride(),
            dq_strides=dq.stride(),
            blocks=len(key_pool),
            entries=block_tables.shape[1],
            BLOCK=key_pool.shape[1],
            **given,
            **of_queries,
        )
        _key_grad_kernel[(cdiv(suffix, of_keys["COLUMNS"]), kv_heads, batch)](
            dk_ptr=dk,
            dv_ptr=dv,
            dk_strides=dk.stride(),
            dv_strides=dv.stride(),
            **given,
            **of_keys,
        )
    return dq, dk, dv, status
