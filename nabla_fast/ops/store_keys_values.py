"""Keys and values put into the slots of a paged pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.checks import expect
from nabla_fast.ops.limits import triton_backend
from nabla_fast.ops.limits.refusals import contiguous_refusal
from nabla_fast.ops.registry import floats, integers, op
from nabla_fast.ops.rows import NO_SLOT, OK, report

_OWN = floats("B", "Hkv", "S", "D")
_POOL = floats("blocks", "block_size", "Hkv", "D")


@op(
    arguments={
        "k": _OWN,
        "v": _OWN,
        "key_pool": _POOL,
        "value_pool": _POOL,
        "slots": integers("B", "S"),
    },
    mutates=("key_pool", "value_pool"),
    reads=("slots",),
)
def store_keys_values(k: Tensor, v: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor) -> Tensor:
    """Put the keys and values of new tokens where :func:`nabla_fast.ops.prefix_attention` finds them.

    Token s of sequence b goes to slot n = slots[b, s], which is place n mod block_size of block
    n div block_size, or nowhere where that is −1: padding, or a sequence that has ended. No other place of
    the pools changes. Pools have any strides, so that those of other engines are written in place: of a
    cache ``[blocks, 2, block_size, Hkv, D]`` they are ``cache[:, 0]`` and ``cache[:, 1]``, of one by heads,
    ``[blocks, Hkv, block_size, D]``, they are ``cache.transpose(1, 2)``. Nothing waits for the device, no
    shape depends on the data, and a CUDA graph can capture it.

    Args:
        k, v: [B, Hkv, S, D], floating point.
        key_pool, value_pool: [blocks, block_size, Hkv, D] of one layer, changed in place; floating point,
            k and v are rounded to their dtypes.
        slots: [B, S] int64, below blocks · block_size; no slot but −1 twice.
    Returns:
        [B, S] bool: which tokens have a slot.
    Raises:
        InputError: a shape, dtype or device does not fit, a pool overlaps itself or another argument, or,
            on the CPU, a slot is outside the pool.
        RowError: the last on a device, by the next :func:`nabla_fast.ops.synchronize`, of row b·S + s; the
            token has not been put anywhere.

    Source: block tables from Kwon et al., "PagedAttention", SOSP 2023.

    Example:
        >>> pool = torch.zeros(2, 2, 4, 1, 3)  # keys and values of 2 blocks of 4 tokens
        >>> k, v = torch.ones(1, 1, 2, 3), torch.full((1, 1, 2, 3), 2.0)
        >>> store_keys_values(k, v, pool[:, 0], pool[:, 1], torch.tensor([[5, -1]]))
        tensor([[ True, False]])
        >>> pool[1, :, :, 0, 0]  # slot 5 is the second of block 1
        tensor([[0., 1., 0., 0.],
                [0., 2., 0., 0.]])
    """
    blocks, block_size = key_pool.shape[:2]
    has_slot = (slots >= 0) & (slots < blocks * block_size)
    if not slots.is_cpu:  # there it was looked at before
        report("store_keys_values", torch.where(has_slot | (slots == -1), OK, NO_SLOT).int().flatten())
    if slots.numel() == 0 or blocks * block_size == 0:
        return has_slot
    # Selection by a mask would wait for the device: how many tokens it leaves is data. What has no slot is
    # put where the first token that has one goes too, with that token's numbers; where there is none, what
    # the pool has there is put back.
    kept = has_slot.flatten()
    first = kept.int().argmax(keepdim=True)
    slot = slots.flatten().clamp(min=0)
    slot = torch.where(kept, slot, slot[first])
    block, place = slot // block_size, slot % block_size
    for pool, own in ((key_pool, k), (value_pool, v)):
        tokens = own.transpose(1, 2).flatten(0, 1).to(pool.dtype)
        tokens = torch.where(kept[:, None, None], tokens, tokens[first])
        pool[block, place] = torch.where(kept.any(), tokens, pool[block, place])
    return has_slot


@store_keys_values.check
def check_store_keys_values(
    k: Tensor, v: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
) -> None:
    if slots.is_cpu:
        most = key_pool.shape[0] * key_pool.shape[1]
        wrong = (slots < -1) | (slots >= most)
        places = f", or from 0 to {most - 1}, the last of the pool" if most else ": the pool has no blocks"
        expect(not bool(wrong.any()), f"store_keys_values: slots must be −1{places}")


@store_keys_values.fake
def fake_store_keys_values(
    k: Tensor, v: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
) -> Tensor:
    return slots.new_empty(slots.shape, dtype=torch.bool)


def _triton_refusal(*given: Tensor) -> str | None:
    names = ("k", "v", "key_pool", "value_pool", "slots")
    return triton_backend.refusal(**dict(zip(names, given, strict=True))) or contiguous_refusal(
        "slots", given[-1], "Triton"
    )


@store_keys_values.backend("triton", refuses=_triton_refusal)
def store_keys_values_triton(*given: Any) -> Tensor:
    from nabla_fast.triton_kernels import store_keys_values as kernels

    has_slot, status = kernels.store_keys_values(*given)
    report("store_keys_values", status)
    return has_slot
