"""Launches of dto_descent: z and its moments are float32, G is what the dtype says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.dto_descent import dto_descent

ROWS, VOCABULARY, ITERS = 16, 151_936, 2


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    z, first, second = (torch.empty(ROWS, VOCABULARY, device="meta") for _ in range(3))
    grad = torch.empty(ROWS, VOCABULARY, dtype=dtype, device="meta")
    step = torch.empty(ROWS, dtype=torch.int64, device="meta")
    schedule = torch.empty(ROWS, ITERS, dtype=torch.float64, device="meta")
    plain = {"until": None, "group": None, "tau": 1.0, "noise": None}
    everything = {"until": step, "group": step, "tau": 1.0, "noise": (step, step)}
    if dtype != torch.float16:
        yield "plain", lambda: dto_descent(z, grad, first, second, step, schedule, **plain)
    if dtype == torch.float32:
        yield "noise, groups", lambda: dto_descent(z, grad, first, second, step, schedule, **everything)
