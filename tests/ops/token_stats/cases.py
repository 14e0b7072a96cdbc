"""Inputs of token_stats."""

from __future__ import annotations

from typing import Any

import torch

from nabla_fast.ops import token_stats

from ..contract import OpUnderTest
from ..inputs import BF16, F16, F32, F64, WHOLE, Draw, cases_of, masked_by_head, strided
from ..shared import arguments
from ..shared.head_maps import head_map_cases


def stats_arguments(
    draw: Draw,
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = F32,
    masked: float = 0.0,
    tau: float = 1.0,
    gaps: bool = False,
    scale: float = 1.0,
    hidden: int = 0,
    head: torch.dtype = F32,
) -> dict[str, Any]:
    if hidden:
        states = draw.normal(rows, hidden, dtype=dtype, scale=3 * scale * hidden**-0.5)
        matrix = draw.normal(vocabulary, hidden, dtype=head)
        if masked:
            states, matrix = masked_by_head(draw, states, matrix, masked)
        if gaps:
            states, matrix = strided(states), strided(matrix)
        return {"rows": states, "head": matrix, "tau": tau}
    logits = draw.logits(rows, vocabulary, dtype, masked) * scale
    return {"rows": strided(logits) if gaps else logits, "tau": tau}


_STATS: dict[str, dict[str, Any]] = {
    "one token": {"rows": 3, "vocabulary": 1},
    "two tokens": {"rows": 5, "vocabulary": 2},
    "odd": {"rows": 5, "vocabulary": 257},
    "one row": {"rows": 1, "vocabulary": 4099},
    "masked": {"rows": 4, "vocabulary": 515, "masked": 0.95},
    "cold": {"rows": 6, "vocabulary": 4099, "tau": 0.1},
    "hot": {"rows": 6, "vocabulary": 4099, "tau": 10.0},
    "peaked": {"rows": 6, "vocabulary": 257, "scale": 30.0},
    "flat": {"rows": 6, "vocabulary": 257, "scale": 1e-3},
    "equal": {"rows": 2, "vocabulary": 1021, "scale": 0.0},
    "bf16": {"rows": 5, "vocabulary": 4099, "dtype": BF16},
    "fp16": {"rows": 5, "vocabulary": 4099, "dtype": F16, "masked": 0.5},
    "float64": {"rows": 3, "vocabulary": 257, "dtype": F64},
    "gaps": {"rows": 5, "vocabulary": 4099, "gaps": True},
    "head": {"rows": 5, "vocabulary": 1021, "hidden": 33},
    "bf16 head": {"rows": 3, "vocabulary": 257, "hidden": 32, "head": BF16, "tau": 0.7},
    "bf16 head, many rows": {"rows": 70, "vocabulary": 257, "hidden": 70, "head": BF16, "gaps": True},
    "bf16 hidden states": {"rows": 3, "vocabulary": 257, "hidden": 32, "dtype": BF16, "head": BF16},
    "masked by the head": {"rows": 9, "vocabulary": 515, "hidden": 20, "masked": 0.9},
    "peaked by the head": {"rows": 6, "vocabulary": 257, "hidden": 33, "scale": 30.0},
    "gaps with a head": {"rows": 17, "vocabulary": 1021, "hidden": 19, "gaps": True},
    "whole vocabulary": {"rows": 3, "vocabulary": WHOLE, "masked": 0.01},
}

TOKEN_STATS = OpUnderTest(
    token_stats,
    cases_of(stats_arguments, _STATS)
    + head_map_cases(stats_arguments, {"head": BF16}, rows=5, vocabulary=257, hidden=33, tau=0.7),
    checked=("odd", "fp16", "bf16 head", "biased, scaled and capped"),
    compiled=("odd", "head", "biased, scaled and capped"),
    rows_alone=True,
    on_logits=(token_stats,),
    on_hidden=(token_stats,),
)


def good() -> dict[str, Any]:
    return {"rows": arguments.matrices()["logits"], "tau": 1.0}


def good_of_hidden_states() -> dict[str, Any]:
    given = arguments.matrices()
    return {"rows": given["hidden"], "head": given["head"], "tau": 1.0}
