"""Inputs of draw_tokens."""

from __future__ import annotations

from typing import Any

import torch

from nabla_fast.ops import draw_tokens

from ..contract import OpUnderTest
from ..inputs import F32, F64, Draw, cases_of


def draw_arguments(
    draw: Draw, rows: int, vocabulary: int, dtype: torch.dtype = F32, **options: Any
) -> dict[str, Any]:
    return {
        "logits": draw.logits(rows, vocabulary, dtype),
        "exponentials": -draw.uniform(rows, vocabulary).to(dtype).clamp(1e-6).log() + 1e-6,
        **options,
    }


_DRAWS: dict[str, dict[str, Any]] = {
    "all": {"rows": 5, "vocabulary": 257},
    "filtered": {"rows": 5, "vocabulary": 4099, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "top-p": {"rows": 3, "vocabulary": 257, "top_p": 0.5},
    "one token": {"rows": 2, "vocabulary": 1, "top_k": 3},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64, "top_k": 7},
}

DRAW_TOKENS = OpUnderTest(
    draw_tokens,
    cases_of(draw_arguments, _DRAWS),
    checked=("filtered",),
    compiled=("filtered",),
    rows_alone=True,
)
