"""The decoder against a naive second implementation, token for token, on random small problems."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from naive_loop import Naive, NaiveLoop
from tiny_models import VOCABULARY, shared_lm, shared_reward_model, word_tokenizer

from nabla_fast import DTOConfig, NablaDecoder, Result, SamplingConfig

LMS = ("qwen2", "llama", "qwen2_tied", "gemma3", "qwen3", "gpt2", "mistral")
REWARD_MODELS = ("qwen2", "bert", "llama", None, "gpt2", "gemma3", "qwen3", "mistral")
CASES = range(60)
TOKENIZER = word_tokenizer()


@dataclass(frozen=True)
class Case:
    """A random problem: which models, how to decode, what."""

    lm: str
    rm: str | None
    config: DTOConfig
    prompt: list[int]
    context: tuple[list[int], list[int]]
    options: dict[str, Any]  # seed, max_new_tokens, stop
    eos: tuple[int, ...]


def make_case(n: int) -> Case:
    """Case n: parameters, updates and relaxations in turn, everything else by chance."""
    chance = random.Random(3000 + n)

    def ids(least: int, most: int) -> list[int]:
        return [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(least, most))]

    config = DTOConfig(
        parameter=("logits", "latents")[n % 2],
        update=("first", "all")[n // 2 % 2],
        relaxation=("straight_through", "gumbel", "soft")[n // 4 % 3],
        iters=chance.randint(1, 7),
        lr=chance.choice([0.01, 0.2, 1.0]),
        min_lr_ratio=chance.choice([0.0, 0.1, 1.0]),
        warmup_steps=chance.choice([0, 0, 1]),
        tau=chance.choice([0.5, 1.0, 1.0, 2.0]),
        reward_coeff=chance.choice([0.0, 1.0, 1.0, 5.0]),
        nll_coeff=chance.choice([0.0, 1e-3, 0.1, 1.0]),
        confidence_threshold=chance.choice([None, 0.25, 0.5, 0.97]),
        entropy_threshold=chance.choice([None, None, None, 2.0]),
        grad_threshold=chance.choice([None, None, 0.5, 1.5]),
        max_generations=chance.randint(2, 6),
        rejection=chance.random() < 0.7,
        rollout_sampling=SamplingConfig(
            chance.choice([0.0, 0.7, 1.3]), chance.choice([0, 3, 20]), chance.choice([0.8, 1.0])
        ),
        resample_sampling=SamplingConfig(
            chance.choice([0.0, 0.5, 1.5]), chance.choice([0, 1, 20]), chance.choice([0.6, 1.0])
        ),
    )
    options = {
        "seed": chance.choice([0, 42, 2**40 + n]),
        "max_new_tokens": chance.choice([1, 3, 5, 7, 9]),
        "stop": chance.choice([(), (), ("cab",), ("bb", "aca")]),
    }
    return Case(
        lm=LMS[n % len(LMS)],
        rm=REWARD_MODELS[n % len(REWARD_MODELS)],
        config=config,
        prompt=ids(1, 7),
        context=(ids(1, 5), ids(0, 2)),
        options=options,
        eos=chance.choice([(0,), (0, 5, 9), ()]),
    )


def models(case: Case) -> tuple:
    """The case's models, in float64: chance ties of float32 would make either answer right."""
    lm = shared_lm(case.lm, eos_token_id=case.eos or None)
    return lm, None if case.rm is None else shared_reward_model(case.rm)


@cache
def decoded(n: int) -> Result:
    """The decoder's answer to case n."""
    case = make_case(n)
    decoder = NablaDecoder(*models(case), TOKENIZER, config=case.config, loop="sequential")
    (result,) = decoder.generate([case.prompt], reward_context=[case.context], **case.options)
    return result


@cache
def naive(n: int) -> tuple[NaiveLoop, Naive]:
    """The naive loop's answer, and the loop."""
    case = make_case(n)
    given = *models(case), case.config, case.prompt, *case.context
    loop = NaiveLoop(*given, eos=case.eos, tokenizer=TOKENIZER, **case.options)
    return loop, loop.decode()


@pytest.mark.parametrize("n", CASES)
def test_tokens_are_those_of_the_naive_loop(n):
    case, result, (loop, expected) = make_case(n), decoded(n), naive(n)
    ended = bool(expected.tokens) and expected.tokens[-1] in case.eos

    assert result.token_ids == (expected.tokens[:-1] if ended else expected.tokens)
    assert (result.finish_reason == "eos") == ended
    assert result.stats.generations == expected.generations
    assert result.stats.rejections == expected.rejections
    ours = [(r.position, r.old_token, r.new_token, r.accepted) for r in result.revisions]
    assert ours == expected.proposals
    scored = [(r.reward_after, r.reward_before) for r in result.revisions if r.reward_after is not None]
    assert len(scored) == len(expected.rewards)
    for pair, rewards in zip(scored, expected.rewards, strict=True):
        assert pair == pytest.approx(rewards, abs=1e-9)
    if case.rm is not None:
        assert result.reward == pytest.approx(loop.reward(expected.tokens), abs=1e-9)
    assert result.stats.generated_tokens == expected.drawn
    calls = expected.drawn + 4 * expected.gradients + 2 * len(expected.rewards)
    assert result.stats.llm_calls == calls


def test_the_problems_reach_every_branch():
    seen: Counter[str] = Counter()
    for n in CASES:
        case, result, expected = make_case(n), decoded(n), naive(n)[1]
        config = case.config
        seen[result.finish_reason] += 1
        seen["skips positions"] += expected.skipped > 0
        seen["flips"] += config.relaxation != "soft" and expected.gradients > expected.descents
        seen["draws the token there is"] += expected.descents > len(expected.proposals)
        seen["leaves the loop with budget left"] += 1 < result.stats.generations < config.max_generations
        for revision in result.revisions:
            ends = revision.new_token in case.eos or revision.position + 1 == case.options["max_new_tokens"]
            seen["accepted" if revision.accepted else "rejected"] += 1
            seen["with reward" if case.rm else "without reward"] += 1
            seen["without rejection"] += not config.rejection
            seen[f"{config.relaxation}, {config.update}, {config.parameter}"] += 1
            seen["gradient selection"] += config.grad_threshold is not None
            seen["new token ends the response"] += ends and revision.accepted
    assert len(seen) == 26, seen
    assert min(seen.values()) >= 2, seen
