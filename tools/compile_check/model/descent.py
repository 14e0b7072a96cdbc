"""Adam steps on rows of logits: 20 of them, none stopped by a flip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch

from nabla_fast.triton_kernels import dto_descent as kernels
from tools.compile_check.model import hardware
from tools.compile_check.model.cases import ITERS, ROWS, VOCABULARY, Case


def _descend(rows: int) -> object:
    z, grad, first, second = (torch.empty(rows, VOCABULARY, device="meta") for _ in range(4))
    step = torch.empty(rows, dtype=torch.int64, device="meta")
    schedule = torch.empty(ITERS, dtype=torch.float64, device="meta")
    options = {"until": None, "group": None, "tau": 1.0, "noise": None}
    # As on the GPU: groups of rows that its cache holds.
    most = max(1, hardware.L2_BYTES // (16 * VOCABULARY))
    with mock.patch.object(kernels, "rows_at_once", lambda z, arrays: min(len(z), most)):
        return kernels.dto_descent(z, grad, first, second, step, schedule, **options)


def cases() -> Iterator[Case]:
    for rows in ROWS:
        yield Case(
            "dto_descent",
            f"{ITERS} steps, float32 G",
            rows,
            partial(_descend, rows),
            0.0,
            12.0 * rows * VOCABULARY,
            goal_seconds=80e-6 if rows == 1 else None,
        )
