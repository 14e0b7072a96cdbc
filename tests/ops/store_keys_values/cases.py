"""Inputs of store_keys_values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import store_keys_values

from ..contract import OpUnderTest
from ..inputs import BF16, F16, F32, F64, Draw, cases_of


def pools(draw: Draw, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pools of keys and values [blocks, block_size, Hkv, D] as several engines lay them out."""
    blocks, block_size, kv_heads, dim = shape
    match layout:
        case "two tensors":
            return draw.normal(*shape, dtype=dtype), draw.normal(*shape, dtype=dtype)
        case "keys, then values":
            cache = draw.normal(2, *shape, dtype=dtype)
            return cache[0], cache[1]
        case "interleaved by blocks":
            cache = draw.normal(blocks, 2, block_size, kv_heads, dim, dtype=dtype)
            return cache[:, 0], cache[:, 1]
        case "interleaved by blocks and by heads":
            cache = draw.normal(blocks, 2, kv_heads, block_size, dim, dtype=dtype)
            return cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2)
        case "side by side in a head":
            cache = draw.normal(blocks, block_size, kv_heads, 2 * dim, dtype=dtype)
            return cache[..., :dim], cache[..., dim:]
    raise ValueError(f"no such layout: {layout}")


LAYOUTS = (
    "two tensors",
    "keys, then values",
    "interleaved by blocks",
    "interleaved by blocks and by heads",
    "side by side in a head",
)


def store_arguments(
    draw: Draw,
    batch: int,
    suffix: int,
    heads: int = 2,
    width: int = 8,
    blocks: int = 7,
    block_size: int = 4,
    missing: float = 0.3,
    layout: str = "two tensors",
    dtype: torch.dtype = F32,
    pool: torch.dtype | None = None,
) -> dict[str, Any]:
    """Arguments whose slots are distinct; about ``missing`` of the tokens have none."""
    key_pool, value_pool = pools(draw, layout, (blocks, block_size, heads, width), pool or dtype)
    slots = draw.uniform(blocks * block_size).argsort()[: batch * suffix].view(batch, suffix)
    return {
        "k": draw.normal(batch, suffix, heads, width, dtype=dtype).transpose(1, 2),
        "v": draw.normal(batch, heads, suffix, width, dtype=dtype),
        "key_pool": key_pool,
        "value_pool": value_pool,
        "slots": slots.masked_fill(draw.uniform(batch, suffix) < missing, -1),
    }


_STORES: dict[str, dict[str, Any]] = {
    "a step": {"batch": 5, "suffix": 1, "missing": 0.0},
    "ragged": {"batch": 3, "suffix": 5},
    "nothing": {"batch": 2, "suffix": 3, "missing": 1.0},
    "one token": {"batch": 1, "suffix": 1, "missing": 0.0},
    "odd sizes": {"batch": 3, "suffix": 4, "heads": 3, "width": 5, "block_size": 3},
    "wide": {"batch": 2, "suffix": 9, "heads": 9, "width": 128, "block_size": 16},
    "bf16": {"batch": 3, "suffix": 5, "dtype": BF16},
    "fp16": {"batch": 3, "suffix": 5, "dtype": F16},
    "bf16 pool": {"batch": 3, "suffix": 5, "pool": BF16},
    "float64": {"batch": 3, "suffix": 5, "dtype": F64},
    **{layout: {"batch": 3, "suffix": 5, "layout": layout} for layout in LAYOUTS[1:]},
}

STORE_KEYS_VALUES = OpUnderTest(
    store_keys_values,
    cases_of(store_arguments, _STORES),
    checked=("ragged", "bf16"),
    compiled=("ragged",),
)
