"""Attention over a paged prefix in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast._native.loading import check, extension


def prefix_attention(
    q: Tensor,  # [B, Hq, S, D] float32 on the CPU, unit stride along D, any along the others
    k: Tensor,  # [B, Hkv, S, D] likewise
    v: Tensor,  # [B, Hkv, S, D] likewise
    key_pool: Tensor,  # [blocks, block_size, Hkv, D] likewise
    value_pool: Tensor,  # [blocks, block_size, Hkv, D] likewise
    block_tables: Tensor,  # [B, M] int64, unit stride along M
    prefix_lengths: Tensor,  # [B] int64, contiguous
    scale: float,
    window: int | None,
) -> Tensor:
    """The forward of ``nabla_fast.ops.prefix_attention``: [B, Hq, S, D], in memory [B, S, Hq, D].

    Raises ValueError for D above 512, a prefix longer than its table or a block not in the pool;
    RuntimeError where the extension is missing.
    """
    native = extension()
    batch, heads, suffix, dim = q.shape
    output = torch.empty(batch, suffix, heads, dim, dtype=torch.float32, device="cpu").transpose(1, 2)
    code = native.prefix_attention(
        *_attention(q, k, v, key_pool, value_pool, block_tables, prefix_lengths, scale, window),
        output.data_ptr(),
        output.stride(),
        torch.get_num_threads(),
    )
    if code:
        check(code)
    return output


def prefix_attention_backward(
    cotangent: Tensor,  # [B, Hq, S, D] float32 on the CPU, unit stride along D, any along the others
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, Hq, S, D], dk and dv [B, Hkv, S, D], in memory [B, S, heads, D].

    Other arguments and errors as of the forward.
    """
    native = extension()
    batch, _, suffix, dim = q.shape
    heads = q.shape[1], k.shape[1], k.shape[1]
    dq, dk, dv = (
        torch.empty(batch, suffix, count, dim, dtype=torch.float32, device="cpu").transpose(1, 2)
        for count in heads
    )
    code = native.prefix_attention_backward(
        *_attention(q, k, v, key_pool, value_pool, block_tables, prefix_lengths, scale, window),
        cotangent.data_ptr(),
        cotangent.stride(),
        dq.data_ptr(),
        dq.stride(),
        dk.data_ptr(),
        dk.stride(),
        dv.data_ptr(),
        dv.stride(),
        torch.get_num_threads(),
    )
    if code:
        check(code)
    return dq, dk, dv


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Any, ...]:
    """The inputs as the extension's attentions take them."""
    return (
        q.data_ptr(),
        q.shape,
        q.stride(),
        k.data_ptr(),
        k.stride(),
        v.data_ptr(),
        v.stride(),
        key_pool.data_ptr(),
        key_pool.shape,
        key_pool.stride(),
        value_pool.data_ptr(),
        value_pool.stride(),
        block_tables.data_ptr(),
        block_tables.shape[1],
        block_tables.stride(0),
        prefix_lengths.data_ptr(),
        scale,
        window or 0,
    )
