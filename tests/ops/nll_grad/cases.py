"""Inputs of nll_grad."""

from __future__ import annotations

from typing import Any

from nabla_fast.ops import nll_grad

from ..contract import OpUnderTest
from ..inputs import BF16, Draw, cases_of
from ..shared.head_maps import head_map_cases
from ..shared.products import LOGITS, product_arguments


def nll_arguments(
    draw: Draw, rows: int, vocabulary: int, scale: float = 1.0, **options: Any
) -> dict[str, Any]:
    arguments = product_arguments(draw, rows, vocabulary, **options)
    arguments["hidden"] = arguments["hidden"] * scale
    return {**arguments, "tokens": draw.integers(0, vocabulary, rows)}


NLL_GRAD = OpUnderTest(
    nll_grad,
    cases_of(
        nll_arguments,
        LOGITS
        | {
            "peaked": {"rows": 9, "vocabulary": 257, "scale": 8.0},
            "flat": {"rows": 9, "vocabulary": 257, "scale": 1e-3},
            "several segments": {"rows": 65, "vocabulary": 8192 * 2 + 77, "hidden": 20},
        },
    )
    + head_map_cases(nll_arguments, {"head": BF16}, rows=5, vocabulary=257),
    checked=("odd", "bf16", "biased, scaled and capped"),
    compiled=("odd",),
    rows_alone=True,
)
