"""Inputs of embedding_mix and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import embedding_mix
from nabla_fast.ops.embedding_mix import embedding_mix_backward

from ..contract import OpUnderTest
from ..shared import arguments
from ..shared.mixes import mix_cases


def mixed(logits: Tensor, hard: bool) -> list[Tensor]:
    return embedding_mix(logits, [torch.randn(logits.shape[1], 3)], hard=hard)


def good() -> dict[str, Any]:
    return {"logits": arguments.matrices()["logits"], **arguments.of_a_mix()}


EMBEDDING_MIX = OpUnderTest(
    embedding_mix,
    mix_cases(backward=False),
    checked=("two tables, hard", "noise, soft", "dtypes, soft", "transposed, hard"),
    compiled=("two tables, hard", "noise, soft"),
    differentiable=("logits",),
    on_logits=(lambda logits: mixed(logits, True), lambda logits: mixed(logits, False)),
)
EMBEDDING_MIX_BACKWARD = OpUnderTest(
    embedding_mix_backward,
    mix_cases(backward=True),
    checked=("two tables", "noise", "bf16", "transposed", "gaps"),
    compiled=("noise",),
)
