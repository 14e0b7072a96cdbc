"""Drawing tokens: temperature, top-k, top-p in transformers' order, one CPU generator a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import SamplingConfig


def filtered_probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """softmax(top_p(top_k(z / T))) of one row.

    Top-k keeps every token that ties with the k-th; top-p works on what top-k left and drops the
    least likely tokens whose cumulative mass is ≤ 1 − p, never the last one left.

    Args:
        logits: [V] float.
        sampling: T ≤ 0 counts as 1.
    Returns:
        [V], exactly 0 for dropped tokens.
    """
    scores = logits / sampling.temperature if sampling.temperature > 0 else logits
    if 0 < sampling.top_k < scores.shape[0]:
        kept = (scores >= scores.topk(sampling.top_k).values[-1]).nonzero().flatten()
    else:
        kept = torch.arange(scores.shape[0], device=scores.device)
    # From here on the filters work on the few kept tokens instead of on the vocabulary.
    values = scores[kept]
    if sampling.top_p < 1:
        ascending, order = values.sort()
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        dropped[-1] = False
        survivors = order[~dropped]
        kept, values = kept[survivors], values[survivors]
    return torch.zeros_like(scores).scatter_(0, kept, values.softmax(dim=-1))


def draw(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """One token from the filtered distribution of a row.

    The draw is made on the CPU over the whole vocabulary, so that a generator in the same state
    gives the same token as ``torch.multinomial`` gives to transformers' ``generate``.

    Args:
        logits: [V] float, on the CPU.
        sampling: T ≤ 0 counts as 1.
        generator: a CPU generator; one draw is taken from it.
    """
    probabilities = filtered_probabilities(logits, sampling)
    return int(torch.multinomial(probabilities, num_samples=1, generator=generator))


def next_token(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """A rollout's next token: the argmax if T ≤ 0, else a draw."""
    return int(logits.argmax()) if sampling.temperature <= 0 else draw(logits, sampling, generator)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator in the state that follows from ``seed`` alone."""
    return torch.Generator().manual_seed(seed)
