"""Launches of token_stats, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.token_stats import token_stats

ROWS, VOCABULARY, HIDDEN = 128, 151_936, 4096


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    logits = torch.empty(ROWS, VOCABULARY, dtype=dtype, device="meta")
    hidden = torch.empty(ROWS, HIDDEN, dtype=dtype, device="meta")
    head = torch.empty(VOCABULARY, HIDDEN, dtype=dtype, device="meta")
    yield "logits", lambda: token_stats(logits, None, 1.0)
    yield "hidden states", lambda: token_stats(hidden, head, 1.0)
    if dtype == torch.bfloat16:
        yield "float32 hidden states", lambda: token_stats(hidden.float(), head, 1.0)
