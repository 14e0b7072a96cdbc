"""Samples of many prompts as one batch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import causal_lm

from nabla_fast import DecodingFailed, RowError, SamplingConfig
from nabla_fast.best_of_n import sample_batch
from nabla_fast.models import LanguageModel
from nabla_fast.results import Stats

PROMPTS = [[5, 9, 3], [7], [20, 4, 4, 11]]


def sample(lm: LanguageModel, prompts: list[list[int]], stats: Stats) -> list[list[list[int]]]:
    return sample_batch(lm, prompts, 2, SamplingConfig(temperature=0.0), 0, 1, stats)


@pytest.mark.parametrize("bad", [{0}, {2}, {0, 1}], ids=str)
def test_the_prompt_whose_logits_are_not_finite_is_named(bad: set[int]):
    model = causal_lm("qwen2")
    lm = LanguageModel(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[23] = float("nan")
    prompts = [[*prompt, 23] if n in bad else prompt for n, prompt in enumerate(PROMPTS)]
    with pytest.raises(DecodingFailed, match=r"rollout has a NaN logit$") as caught:
        sample(lm, prompts, Stats())
    assert set(caught.value.prompts) == bad
    assert isinstance(caught.value.__cause__, RowError)


def test_padding_is_counted_beside_the_tokens():
    stats = Stats()
    sample(LanguageModel(causal_lm("qwen2")), PROMPTS, stats)
    assert stats.token_passes["lm"] == 3 + 1 + 4
    assert stats.padding_passes["lm"] == 1 + 3
