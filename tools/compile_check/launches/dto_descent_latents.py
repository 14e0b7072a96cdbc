"""Launches of dto_descent_latents: h and its moments are float32, head and G are what the dtype says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nabla_fast.triton_kernels.dto_descent_latents import dto_descent_latents

ROWS, FEW, VOCABULARY, HIDDEN, ITERS = 16, 2, 151_936, 4096, 2


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    if dtype == torch.float16:
        return
    head = torch.empty(VOCABULARY, HIDDEN, dtype=dtype, device="meta")
    schedule = torch.empty(ITERS, dtype=torch.float64, device="meta")
    for rows, how in ((ROWS, "two passes"), (FEW, "one pass")):
        h, first, second = (torch.empty(rows, HIDDEN, device="meta") for _ in range(3))
        grad = torch.empty(rows, VOCABULARY, device="meta")
        step = torch.empty(rows, dtype=torch.int64, device="meta")
        arguments = (h, head, grad, first, second, step, schedule)
        plain = {"until": None, "group": None, "tau": 1.0, "noise": None}
        everything = {"until": step, "group": step, "tau": 1.0, "noise": (step, step)}
        yield how, partial(dto_descent_latents, *arguments, **plain)
        if dtype == torch.bfloat16:
            yield f"{how}, noise, groups", partial(dto_descent_latents, *arguments, **everything)
