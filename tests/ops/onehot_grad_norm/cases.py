"""Inputs of onehot_grad_norm."""

from __future__ import annotations

from nabla_fast.ops import onehot_grad_norm

from ..contract import OpUnderTest
from ..shared.onehot import onehot_cases

ONEHOT_GRAD_NORM = OpUnderTest(
    onehot_grad_norm,
    onehot_cases(),
    checked=("two tables", "bf16", "mapped", "biased, scaled and capped"),
    compiled=("two tables",),
    rows_alone=True,
)
