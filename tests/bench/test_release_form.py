"""The form of the release's inner loop: slow, and the same tokens."""

from __future__ import annotations

import random

import pytest
from tiny_models import VOCABULARY, shared_lm, shared_reward_model

from nabla_fast import InputError, VocabularyAlignment
from nabla_fast.bench.release_form import ReleaseFormLoop
from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.decode.stop import StopStrings
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.results import Stats

LMS = ("qwen2", "llama", "gpt2", "qwen2_tied")


@pytest.mark.parametrize("n", range(8))
def test_tokens_are_the_sequential_loops(n: int):
    chance = random.Random(n)
    lm = LanguageModel(shared_lm(LMS[n % len(LMS)], eos_token_id=None))
    rm = None
    if n % 4:
        rm = RewardModel(shared_reward_model("qwen2"), VocabularyAlignment.identity())
    config = DTOConfig(
        lr=chance.choice([0.01, 0.3, 1.0]),
        iters=chance.choice([1, 5, 20]),
        tau=chance.choice([0.7, 1.0]),
        warmup_steps=chance.choice([0, 1]),
        nll_coeff=chance.choice([0.0, 1e-3, 0.3]),
        draws=chance.choice(["torch", "philox"]),
        confidence_threshold=None,
        grad_threshold=chance.choice([None, 0.1]),
        max_generations=5,
        resample_sampling=SamplingConfig(1.0, chance.choice([0, 5]), 1.0),
    )
    prompt = tuple(chance.randrange(3, VOCABULARY) for _ in range(5))
    problems = [Problem(prompt, prompt, (1,), seed, 12, frozenset(), StopStrings()) for seed in range(2)]
    expected_stats, stats = ([Stats() for _ in problems] for _ in range(2))
    expected = dict(SequentialLoop(lm, rm, config).decode(problems, expected_stats))
    loop = ReleaseFormLoop(lm, rm, config)
    found = dict(loop.decode(problems, stats))
    assert {i: d.tokens for i, d in found.items()} == {i: d.tokens for i, d in expected.items()}
    for ours, theirs in zip(stats, expected_stats, strict=True):
        assert ours.generations == theirs.generations
        assert ours.gradient_passes == theirs.gradient_passes
        assert ours.token_passes == theirs.token_passes
    assert loop.steps % config.iters == 0
    assert loop.steps > 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"parameter": "latents"}, "parameter='logits' alone, got 'latents'"),
        ({"update": "all"}, "update='first' alone, got 'all'"),
        ({"relaxation": "soft"}, "relaxation='straight_through' alone, got 'soft'"),
        ({"relaxation": "gumbel"}, "relaxation='straight_through' alone, got 'gumbel'"),
    ],
)
def test_other_settings_are_refused(options: dict, line: str):
    lm = LanguageModel(shared_lm("qwen2", eos_token_id=None))
    with pytest.raises(InputError, match=line):
        ReleaseFormLoop(lm, None, DTOConfig(**options))
