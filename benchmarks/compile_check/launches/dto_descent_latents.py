"""Launches of dto_descent_latents: h and its moments are float32, head and G are what the dtype says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.dto_descent_latents import dto_descent_latents

ROWS, VOCABULARY, HIDDEN, ITERS = 16, 151_936, 4096, 2


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    if dtype == torch.float16:
        return
    h, first, second = (torch.empty(ROWS, HIDDEN, device="meta") for _ in range(3))
    head = torch.empty(VOCABULARY, HIDDEN, dtype=dtype, device="meta")
    grad = torch.empty(ROWS, VOCABULARY, device="meta")
    step = torch.empty(ROWS, dtype=torch.int64, device="meta")
    schedule = torch.empty(ITERS, dtype=torch.float64, device="meta")
    arguments = (h, head, grad, first, second, step, schedule)
    plain = {"until": None, "group": None, "tau": 1.0, "noise": None}
    everything = {"until": step, "group": step, "tau": 1.0, "noise": (step, step)}
    yield "plain", lambda: dto_descent_latents(*arguments, **plain)
    if dtype == torch.bfloat16:
        yield "noise, groups", lambda: dto_descent_latents(*arguments, **everything)
