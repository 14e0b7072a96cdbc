"""Inputs of lm_logits."""

from __future__ import annotations

from nabla_fast.ops import lm_logits

from ..contract import OpUnderTest
from ..inputs import cases_of
from ..shared.products import LOGITS, product_arguments

LM_LOGITS = OpUnderTest(
    lm_logits,
    cases_of(product_arguments, LOGITS),
    checked=("odd", "bf16"),
    compiled=("odd",),
    differentiable=("hidden", "head"),
    rows_alone=True,
)
