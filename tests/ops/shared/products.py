"""Inputs of lm_logits and nll_grad, which multiply hidden states by a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ..inputs import BF16, F16, F32, F64, WHOLE, Draw, strided


def product_arguments(
    draw: Draw,
    rows: int,
    vocabulary: int,
    hidden: int = 33,
    dtype: torch.dtype = F32,
    head: torch.dtype = F32,
    gaps: bool = False,
) -> dict[str, Any]:
    states, matrix = draw.normal(rows, hidden, dtype=dtype), draw.normal(vocabulary, hidden, dtype=head)
    return {"hidden": strided(states) if gaps else states, "head": strided(matrix) if gaps else matrix}


LOGITS: dict[str, dict[str, Any]] = {
    "odd": {"rows": 5, "vocabulary": 257},
    "one token": {"rows": 3, "vocabulary": 1, "hidden": 1},
    "one row": {"rows": 1, "vocabulary": 4099, "hidden": 64},
    "many rows": {"rows": 67, "vocabulary": 515, "hidden": 16},
    "narrow": {"rows": 6, "vocabulary": 1021, "hidden": 7},
    "gaps": {"rows": 7, "vocabulary": 515, "gaps": True},
    "bf16 head": {"rows": 5, "vocabulary": 1021, "hidden": 40, "head": BF16},
    "bf16 head, many rows": {"rows": 37, "vocabulary": 515, "hidden": 70, "head": BF16, "gaps": True},
    "bf16": {"rows": 6, "vocabulary": 257, "dtype": BF16, "head": BF16},
    "fp16": {"rows": 6, "vocabulary": 257, "dtype": F16, "head": F16},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64, "head": F64},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "hidden": 8},
}

DTYPES = pytest.mark.parametrize("dtype", [F32, BF16])
WIDTHS = pytest.mark.parametrize("width", [1, 15, 16, 31, 64, 100])
ROWS = (1, 2, 3, 4, 7, 21)


def unaligned(tensor: Tensor) -> Tensor:
    """The same values one element after a place where vectors are aligned."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
