"""Launches of gumbel_noise, which has one dtype whatever the logits have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.common.gumbel import gumbel_noise


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    if dtype == torch.float32:
        seed = torch.empty(16, dtype=torch.int64, device="meta")
        yield "float32", lambda: gumbel_noise(seed, seed, 151_936, dtype)
