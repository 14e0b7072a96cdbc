"""How the batched loop's token passes grow with the length of the answers."""

from __future__ import annotations

from typing import Any

import torch

from nabla_fast.bench.decode import Examination, OnSide
from nabla_fast.bench.decode_cases import length_case

LENGTHS = (32, 64, 128, 256, 512)
QUICK_LENGTHS = (8, 16)


def measure_length(
    length: int,
    device: torch.device,
    on_side: OnSide = lambda name: None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Shares and ratios of token passes with answers of ``length`` tokens; no times.

    Random models of two layers and a vocabulary of 512 without EOS, the default configuration, two
    prompts of 32 tokens together.
    """
    entry = Examination(length_case(length, device, dtype), on_side).entry
    kept = (
        "config",
        "prompts",
        "dtype",
        "same_tokens",
        "generations",
        "samples",
        "positions",
        "trajectories",
        "gradient_passes",
        "speculated",
        "token_passes",
        "passes_to_best_of_n",
        "passes_for",
    )
    return {"tokens": length} | {name: entry[name] for name in kept}
