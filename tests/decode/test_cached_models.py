"""Models that have caches of their own kind through both loops: the same tokens."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import families
import pytest
import torch
from test_batched_loop import problems
from test_decoder import make_case
from tiny_models import VOCABULARY, shared_reward_model
from torch import nn

from nabla_fast import DTOConfig, NablaDecoder, VocabularyAlignment
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.cache_sequences import CachePool
from nabla_fast.models.paged_kv import PoolExhausted
from nabla_fast.results import Stats

# Keys and values alone; states, in one pass; states, token by token; one row at a time; nothing kept.
LMS = ("bloom", "mamba2", "lfm2", "qwen3_next", "mamba", "rwkv", "openai")
REWARD_MODELS = ("qwen3_next", "qwen2", "jamba", None, "bert", "phi")


def wide(model: nn.Module) -> nn.Module:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products have no float64
    return model.requires_grad_(False)


def language_model(name: str, eos: tuple[int, ...] = ()) -> LanguageModel:
    model = families.language_model(name, dtype=torch.float64, vocab_size=VOCABULARY)
    model.config.eos_token_id = list(eos) or None
    model.generation_config.eos_token_id = list(eos) or None
    return LanguageModel(wide(model))


def reward_model(name: str | None) -> RewardModel | None:
    if name is None:
        return None
    model = shared_reward_model(name) if name in ("qwen2", "bert", "phi") else None
    if model is None:
        model = wide(families.reward_model(name, dtype=torch.float64, vocab_size=VOCABULARY))
    return RewardModel(model, VocabularyAlignment.identity())


@pytest.mark.parametrize("lm_name", LMS)
def test_random_problems_in_float64(lm_name: str):
    seen: Counter[str] = Counter()
    pools = CachePool.__init__.__defaults__
    CachePool.__init__.__defaults__ = (None, 4)  # so that short responses have remembered states
    try:
        for n in range(6):
            compare(lm_name, n, seen)
    finally:
        CachePool.__init__.__defaults__ = pools
    assert seen["problems"] >= 8
    assert seen["accepted"] >= 2, seen


def compare(lm_name: str, n: int, seen: Counter) -> None:
    """Random problem n, and others like it, through both loops."""
    case, chance = make_case(n), random.Random(n)
    lm, rm = language_model(lm_name, case.eos), reward_model(REWARD_MODELS[n % len(REWARD_MODELS)])
    given = problems(case, chance, chance.choice([1, 2, 3]))
    expected_stats, stats = ([Stats() for _ in given] for _ in range(2))
    expected = dict(SequentialLoop(lm, rm, case.config).decode(given, expected_stats))
    loop = BatchedLoop(lm, rm, case.config, proposals=chance.choice([None, 1, 4]))
    found = dict(loop.decode(given, stats))
    assert found.keys() == expected.keys()
    for index, ours in found.items():
        theirs = expected[index]
        assert ours.tokens == theirs.tokens
        assert stats[index].generations == expected_stats[index].generations
        assert stats[index].llm_calls == expected_stats[index].llm_calls
        kept = [(r.position, r.old_token, r.new_token, r.accepted) for r in ours.revisions]
        assert kept == [(r.position, r.old_token, r.new_token, r.accepted) for r in theirs.revisions]
        assert ours.reward == pytest.approx(theirs.reward, abs=1e-6)
        seen["problems"] += 1
        seen["accepted"] += sum(r.accepted for r in ours.revisions)


def test_tokens_that_are_behind_a_state_are_not_read_again():
    config = DTOConfig(iters=2, lr=1.0, nll_coeff=0.1, confidence_threshold=None, max_generations=4)
    lm, long = language_model("mamba2").model, {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
    rm = wide(families.reward_model("qwen3_next", dtype=torch.float64, **long))
    prompt, context = [[3 + n % 20 for n in range(160)]], [([3 + n % 20 for n in range(160)], [8])]
    passes = {}
    for loop in ("batched", "sequential"):
        decoder = NablaDecoder(lm, rm, None, config=config, loop=loop)
        (result,) = decoder.generate(prompt, max_new_tokens=6, reward_context=context)
        passes[loop] = result.stats.token_passes
    for name in ("lm", "rm"):
        assert passes["batched"][name] < 0.5 * passes["sequential"][name]


def test_a_limit_of_tokens_says_what_would_do():
    lm = language_model("mamba2").model
    decoder = NablaDecoder(lm, None, None, config=DTOConfig(max_generations=2), max_kv_tokens=32)
    with pytest.raises(Exception, match=r"max_kv_tokens: caches may hold 32 tokens, .* would do") as caught:
        decoder.generate([[5, 9, 3] * 9], max_new_tokens=8)
    assert isinstance(caught.value.__cause__, PoolExhausted)


@pytest.mark.parametrize("lm_name", ["bloom", "mamba2", "rwkv"])
def test_a_decoder_survives_a_pickle(lm_name: str):
    lm, options = language_model(lm_name).model, {"max_new_tokens": 5, "reward_context": [([7], [8])]}
    config = DTOConfig(max_generations=3)
    decoder = NablaDecoder(lm, shared_reward_model("qwen2"), None, config=config, loop="batched")
    again = pickle.loads(pickle.dumps(decoder))
    results = [each.generate([[5, 9, 3]], **options)[0] for each in (decoder, again)]
    assert results[0].token_ids == results[1].token_ids
    assert again.describe() == decoder.describe()


@pytest.mark.parametrize("lm_name", ["qwen3_next", "mamba"])
def test_float32_models_decode(lm_name: str):
    model = wide(families.language_model(lm_name, vocab_size=VOCABULARY))
    decoder = NablaDecoder(model, shared_reward_model("qwen2"), None, config=DTOConfig(max_generations=3))
    assert decoder.loop == "batched"
    results = decoder.generate([[5, 9, 3], [7, 4]], max_new_tokens=6, reward_context=[([7], [8])] * 2)
    assert all(len(result.token_ids) == 6 for result in results)
