"""Inputs of onehot_grad."""

from __future__ import annotations

from nabla_fast.ops import onehot_grad

from ..contract import OpUnderTest
from ..shared.onehot import onehot_cases

ONEHOT_GRAD = OpUnderTest(
    onehot_grad,
    onehot_cases(),
    checked=("two tables", "bf16", "mapped", "biased, scaled and capped"),
    compiled=("two tables", "mapped"),
    rows_alone=True,
)
