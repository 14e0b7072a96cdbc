"""Inputs of dto_descent."""

from __future__ import annotations

from typing import Any

import torch

from nabla_fast.ops import AdamState, cosine_schedule, dto_descent

from ..contract import OpUnderTest
from ..shared import arguments
from ..shared.descents import descent_cases

DTO_DESCENT = OpUnderTest(
    dto_descent,
    descent_cases(),
    checked=("odd", "groups", "noise"),
    compiled=("odd", "noise"),
    rows_alone=True,
    on_logits=(
        lambda z: dto_descent(z, torch.randn_like(z), AdamState.zeros(z), cosine_schedule(2, 0.01)),
    ),
)


def good() -> dict[str, Any]:
    logits = arguments.matrices()["logits"]
    return {"z": logits, **arguments.of_a_descent(logits)}
