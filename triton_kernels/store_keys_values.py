"""Keys and values of new tokens put into the slots of a paged pool: one launch, a copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import launched
from .common.sizes import cdiv, next_power_of_2

_ELEMENTS = 2048  # of keys, and of values, that a program copies
_WIDEST = 1024  # of these of one token
_OUTSIDE = tl.constexpr(5)  # the slot is not in the pool


@launched
@triton.jit(do_not_specialize=["tokens"])
def _store_kernel(
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,
    key_ptr,  # [blocks, BLOCK, Hkv, D]
    value_ptr,
    slot_ptr,  # [B, S]
    stored_ptr,  # [B, S] bool, as bytes
    status_ptr,  # [B·S] int32
    k_strides,
    v_strides,
    key_strides,
    value_strides,
    tokens,  # B·S
    suffix,  # S
    slots,  # of the pool
    SIZE: tl.constexpr,  # Hkv·D
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = token < tokens
    slot = tl.load(slot_ptr + token, mask=there, other=-1)
    outside = (slot < -1) | (slot >= slots)
    if tl.program_id(1) == 0:
        tl.store(stored_ptr + token, ((slot >= 0) & ~outside).to(tl.int8), mask=there)
        tl.store(status_ptr + token, tl.where(outside, _OUTSIDE, 0), mask=there)
    element = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head, column = (element // D).to(tl.int64), element % D
    batch, own = token // suffix, token % suffix
    block, place = slot // BLOCK, slot % BLOCK
    mask = (there & (slot >= 0) & ~outside)[:, None] & (element < SIZE)[None, :]
    at = k_ptr + (batch * k_strides[0] + own * k_strides[2])[:, None]
    k = tl.load(at + (head * k_strides[1] + column * k_strides[3])[None, :], mask=mask)
    at = v_ptr + (batch * v_strides[0] + own * v_strides[2])[:, None]
    v = tl.load(at + (head * v_strides[1] + column * v_strides[3])[None, :], mask=mask)
    at = key_ptr + (block * key_strides[0] + place * key_strides[1])[:, None]
    at += (head * key_strides[2] + column * key_strides[3])[None, :]
    tl.store(at, k.to(key_ptr.dtype.element_ty), mask=mask)
    at = value_ptr + (block * value_strides[0] + place * value_strides[1])[:, None]
    at += (head * value_strides[2] + column * value_strides[3])[None, :]
    tl.store(at, v.to(value_ptr.dtype.element_ty), mask=mask)


def store_keys_values(
    k: Tensor, v: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``nabla_fast.ops.store_keys_values``.

    Args:
        k, v: [B, Hkv, S, D] float32, bfloat16 or float16, as all others; any strides.
        key_pool, value_pool: [blocks, block_size, Hkv, D].
        slots: [B, S] int64, contiguous.
    Returns:
        Which tokens have a slot [B, S] bool, and a status [B·S] int32 of the tokens, which is 5 where the
        slot is not in the pool: nothing is written for these.
    """
    batch, kv_heads, suffix, dim = k.shape
    blocks, block_size = key_pool.shape[:2]
    stored = torch.empty(batch, suffix, dtype=torch.bool, device=k.device)
    status = torch.empty(batch * suffix, dtype=torch.int32, device=k.device)
    tokens, size = batch * suffix, kv_heads * dim
    if tokens == 0:
        return stored, status
    columns = min(_WIDEST, next_power_of_2(max(1, size)))
    rows = min(_ELEMENTS // columns, next_power_of_2(tokens))
    with torch.cuda.device_of(k):
        _store_kernel[(cdiv(tokens, rows), max(1, cdiv(size, columns)))](
            k_ptr=k,
            v_ptr=v,
            key_ptr=key_pool,
            value_ptr=value_pool,
            slot_ptr=slots,
            stored_ptr=stored.view(torch.int8),
            status_ptr=status,
            k_strides=k.stride(),
            v_strides=v.stride(),
            key_strides=key_pool.stride(),
            value_strides=value_pool.stride(),
            tokens=tokens,
            suffix=suffix,
            slots=blocks * block_size,
            SIZE=size,
            D=dim,
            BLOCK=block_size,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )
    return stored, status
