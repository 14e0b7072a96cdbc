"""Inputs of lm_logits."""

from __future__ import annotations

from nabla_fast.ops import lm_logits

from ..contract import OpUnderTest
from ..inputs import BF16, cases_of
from ..shared.head_maps import head_map_cases
from ..shared.products import LOGITS, product_arguments

LM_LOGITS = OpUnderTest(
    lm_logits,
    cases_of(product_arguments, LOGITS)
    + head_map_cases(product_arguments, {"head": BF16}, rows=5, vocabulary=257),
    checked=("odd", "bf16", "biased, scaled and capped"),
    compiled=("odd", "biased, scaled and capped"),
    differentiable=("hidden", "head"),
    rows_alone=True,
)
