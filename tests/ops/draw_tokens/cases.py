"""Inputs of draw_tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import DrawKey, draw_tokens

from ..contract import OpUnderTest
from ..inputs import BF16, F32, F64, WHOLE, Draw, cases_of


def draw_key(draw: Draw, rows: int) -> DrawKey:
    """Over the whole range of int64, of which the lower bits count."""
    return DrawKey(*(draw.integers(-(2**63), 2**63 - 1, rows) for _ in DrawKey._fields))


def draw_arguments(
    draw: Draw, rows: int, vocabulary: int, dtype: torch.dtype = F32, **options: Any
) -> dict[str, Any]:
    return {"logits": draw.logits(rows, vocabulary, dtype), "key": draw_key(draw, rows), **options}


def kinds_of_rows(draw: Draw, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Peaked, flat, tied, masked, all equal."""
    logits = draw.normal(7, vocabulary, dtype=torch.float64, scale=3.0)
    logits[1] *= 10
    logits[2] *= 0.1
    logits[3] = logits[3].round()
    logits[4, vocabulary // 2 :] = -torch.inf
    logits[5] = 0.5
    logits[6] = (logits[6] / 3).round() * 3
    return logits.to(dtype)


_DRAWS: dict[str, dict[str, Any]] = {
    "all": {"rows": 5, "vocabulary": 257},
    "filtered": {"rows": 5, "vocabulary": 4099, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "redraw": {"rows": 3, "vocabulary": 131, "temperature": 1.7, "top_k": 20, "redraw": True},
    "top-p": {"rows": 3, "vocabulary": 257, "top_p": 0.5},
    "one token": {"rows": 2, "vocabulary": 1, "top_k": 3},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64, "top_k": 7},
    "bfloat16": {"rows": 3, "vocabulary": 257, "dtype": BF16, "top_k": 7, "top_p": 0.9},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "top_k": 20, "top_p": 0.8},
    "whole vocabulary, all of it": {"rows": 2, "vocabulary": WHOLE},
}

DRAW_TOKENS = OpUnderTest(
    draw_tokens,
    cases_of(draw_arguments, _DRAWS),
    checked=("filtered",),
    compiled=("filtered",),
    rows_alone=True,
)
