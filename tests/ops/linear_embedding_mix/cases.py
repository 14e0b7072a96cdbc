"""Inputs of linear_embedding_mix and its backward."""

from __future__ import annotations

from typing import Any

import torch

from nabla_fast.ops import linear_embedding_mix
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward

from ..contract import OpUnderTest
from ..inputs import BF16
from ..shared import arguments
from ..shared.head_maps import head_map_cases
from ..shared.mixes import backward_arguments, mix_arguments, mix_cases


def good() -> dict[str, Any]:
    given = arguments.matrices()
    return {"hidden": given["hidden"], "head": given["head"], **arguments.of_a_mix()}


_HALF = {"dtype": BF16, "tables": ((16, BF16),)}

LINEAR_EMBEDDING_MIX = OpUnderTest(
    linear_embedding_mix,
    mix_cases(backward=False, hidden=24)
    + head_map_cases(mix_arguments, _HALF, rows=5, vocabulary=257, hidden=24, noise=True, hard=False),
    checked=("two tables, soft", "noise, hard", "dtypes, hard", "biased, scaled and capped"),
    compiled=("two tables, soft", "noise, hard"),
    differentiable=("hidden",),
    on_hidden=(lambda hidden, head: linear_embedding_mix(hidden, head, [torch.randn(len(head), 3)]),),
)
LINEAR_EMBEDDING_MIX_BACKWARD = OpUnderTest(
    linear_embedding_mix_backward,
    mix_cases(backward=True, hidden=24)
    + head_map_cases(backward_arguments, _HALF, rows=5, vocabulary=257, hidden=24, noise=True, direct=True),
    checked=("two tables", "noise", "bf16", "biased, scaled and capped"),
    compiled=("noise",),
)
