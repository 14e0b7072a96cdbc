"""Adam steps on hidden states: 20 of them, none stopped by a flip; a bfloat16 head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from nabla_fast.triton_kernels.dto_descent_latents import dto_descent_latents
from tools.compile_check.model.cases import HIDDEN, ITERS, VOCABULARY, Case

_ROWS = (64, 8, 2, 1)


def _descend(rows: int) -> object:
    h, first, second = (torch.empty(rows, HIDDEN, device="meta") for _ in range(3))
    head = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="meta")
    grad = torch.empty(rows, VOCABULARY, device="meta")
    step = torch.empty(rows, dtype=torch.int64, device="meta")
    schedule = torch.empty(ITERS, dtype=torch.float64, device="meta")
    options = {"until": None, "group": None, "tau": 1.0, "noise": None}
    return dto_descent_latents(h, head, grad, first, second, step, schedule, **options)


def cases() -> Iterator[Case]:
    for rows in _ROWS:
        yield Case(
            "dto_descent_latents",
            f"{ITERS} steps, bfloat16 head",
            rows,
            partial(_descend, rows),
            4.0 * rows * VOCABULARY * HIDDEN * ITERS,
            2.0 * ITERS * VOCABULARY * HIDDEN,
            goal=0.60 if rows <= 2 else None,
        )
