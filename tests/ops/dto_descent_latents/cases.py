"""Inputs of dto_descent_latents."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import AdamState, Descent, cosine_schedule, dto_descent_latents

from ..contract import OpUnderTest
from ..inputs import BF16, Case
from ..shared import arguments
from ..shared.descents import descent_arguments, descent_cases
from ..shared.head_maps import head_map_cases

# The same for logits and for latents, which take an interpreter long.
_AS_FOR_LOGITS = ("cold", "hot", "under way", "a hundred steps", "far from zero", "bf16 gradient")


def moved(hidden: Tensor, head: Tensor) -> Descent:
    grad, schedule = torch.randn(len(hidden), len(head)), cosine_schedule(2, 0.01)
    return dto_descent_latents(hidden, head, grad, AdamState.zeros(hidden), schedule)


DTO_DESCENT_LATENTS = OpUnderTest(
    dto_descent_latents,
    [
        *(
            replace(case, large=case.large or case.name in _AS_FOR_LOGITS)
            for case in descent_cases(hidden=24)
            if case.name != "masked"
        ),
        Case(
            "bf16 head",
            partial(descent_arguments, rows=4, vocabulary=257, hidden=24, head=BF16),
            small=partial(descent_arguments, rows=3, vocabulary=257, hidden=24, head=BF16, iters=5),
        ),
        *head_map_cases(
            descent_arguments, {"head": BF16}, rows=4, vocabulary=257, hidden=24, noise=True, tau=0.7
        ),
    ],
    checked=("odd", "groups", "noise", "biased, scaled and capped"),
    compiled=("groups",),
    rows_alone=True,
    on_hidden=(moved,),
)


def good() -> dict[str, Any]:
    given = arguments.matrices()
    return {"h": given["hidden"], "head": given["head"], **arguments.of_a_descent(given["hidden"])}
