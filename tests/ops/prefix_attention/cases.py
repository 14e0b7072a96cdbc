"""Inputs of prefix_attention and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nabla_fast.ops import prefix_attention
from nabla_fast.ops.prefix_attention import prefix_attention_backward

from ..contract import OpUnderTest
from ..harness import to_float64
from ..inputs import BF16, F16, F32, F64, Draw, cases_of


def attention_arguments(
    draw: Draw,
    prefixes: Sequence[int],
    suffix: int,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 8,
    block_size: int = 4,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = F32,
    pool: torch.dtype | None = None,
) -> dict[str, Any]:
    """Arguments of prefix_attention: prefixes of these lengths in shuffled blocks among others."""
    batch, most = len(prefixes), max(1, *(-(-length // block_size) for length in prefixes))
    blocks = batch * most + 3
    shape = (blocks, block_size, kv_heads, width)
    order = draw.uniform(blocks).argsort()[: batch * most]
    return {
        "q": draw.normal(batch, heads, suffix, width, dtype=dtype),
        "k": draw.normal(batch, kv_heads, suffix, width, dtype=dtype),
        "v": draw.normal(batch, kv_heads, suffix, width, dtype=dtype),
        "key_pool": draw.normal(*shape, dtype=pool or dtype),
        "value_pool": draw.normal(*shape, dtype=pool or dtype),
        "block_tables": order.view(batch, most),
        "prefix_lengths": torch.tensor(prefixes),
        "scale": width**-0.5,
        "window": window,
        "softcap": softcap,
        "sinks": draw.normal(heads, dtype=dtype) if sinks else None,
    }


def with_results(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with what the forward returns, rounded from float64: inputs of the backward."""
    forward = {p.name: arguments[p.name] for p in prefix_attention.parameters}
    output, logsumexp = prefix_attention.body(**to_float64(forward))
    q, k = arguments["q"], arguments["k"]
    logsumexp = logsumexp.to(F64 if k.dtype == F64 else F32)
    return arguments | {"output": output.to(q.dtype), "logsumexp": logsumexp}


def backward_arguments(draw: Draw, **sizes: Any) -> dict[str, Any]:
    """Those of the backward."""
    arguments = with_results(attention_arguments(draw, **sizes))
    q = arguments["q"]
    return {"cotangent": draw.normal(*q.shape, dtype=q.dtype)} | arguments


_ATTENTIONS: dict[str, dict[str, Any]] = {
    "ragged": {"prefixes": (0, 5, 9), "suffix": 3},
    "one token": {"prefixes": (7,), "suffix": 1},
    "no prefix": {"prefixes": (0, 0), "suffix": 5},
    "full blocks": {"prefixes": (8, 4), "suffix": 2},
    "one head": {"prefixes": (3, 1), "suffix": 4, "heads": 1, "kv_heads": 1},
    "no groups": {"prefixes": (3, 6), "suffix": 4, "heads": 3, "kv_heads": 3},
    "odd width": {"prefixes": (3, 6), "suffix": 4, "width": 5, "block_size": 3},
    "window": {"prefixes": (2, 11), "suffix": 5, "window": 4},
    "window of one": {"prefixes": (2, 11), "suffix": 3, "window": 1},
    "soft cap": {"prefixes": (0, 5, 9), "suffix": 3, "softcap": 1.5},
    "sinks": {"prefixes": (0, 5, 9), "suffix": 3, "sinks": True},
    "all of them": {"prefixes": (2, 11), "suffix": 5, "window": 4, "softcap": 0.7, "sinks": True},
    "bf16": {"prefixes": (0, 5, 9), "suffix": 3, "dtype": BF16},
    "bf16 of them": {
        "prefixes": (2, 11),
        "suffix": 5,
        "window": 4,
        "softcap": 0.7,
        "sinks": True,
        "dtype": BF16,
    },
    "fp16": {"prefixes": (5, 9), "suffix": 3, "dtype": F16},
    "bf16 pool": {"prefixes": (5, 9), "suffix": 3, "pool": BF16},
    "float64": {"prefixes": (5, 9), "suffix": 3, "dtype": F64},
    "float64, all of them": {
        "prefixes": (5, 9),
        "suffix": 3,
        "window": 6,
        "softcap": 1.5,
        "sinks": True,
        "dtype": F64,
    },
}

PREFIX_ATTENTION = OpUnderTest(
    prefix_attention,
    cases_of(attention_arguments, _ATTENTIONS),
    checked=("ragged", "window", "all of them", "bf16"),
    compiled=("ragged",),
    differentiable=("q", "k", "v"),
)
PREFIX_ATTENTION_BACKWARD = OpUnderTest(
    prefix_attention_backward,
    cases_of(backward_arguments, _ATTENTIONS),
    checked=("ragged", "window", "all of them", "bf16"),
    compiled=("window",),
)
