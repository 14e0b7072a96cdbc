"""The decode benchmark: both loops and Best-of-N on the same prompts, the tokens compared first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from nabla_fast import countdown
from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer
from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched import BatchedLoop
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.sequential import Decoded, SequentialLoop
from nabla_fast.models import LanguageModel, RewardModel, VocabularyAlignment
from nabla_fast.prompts import render_chat, response_tail
from nabla_fast.results import Stats
from nabla_fast.rollout.batched import sample_batch
from nabla_fast.stop import StopStrings

_REPEATS = 3


@dataclass(frozen=True)
class Case:
    """Prompts decoded with one pair of models.

    Attributes:
        batch_size: prompts that the batched loop takes at once.
    """

    name: str
    lm: LanguageModel
    rm: RewardModel
    config: DTOConfig
    problems: list[Problem]
    batch_size: int


def cases(device: torch.device) -> Iterator[Case]:
    """The bundled models with prompts one at a time and together, and random ones of real vocabularies."""
    lm, rm, problems = _bundled(16, device)
    yield Case("bundled, one prompt at a time", lm, rm, DTOConfig(), problems, 1)
    yield Case("bundled, 16 prompts together", lm, rm, DTOConfig(), problems, 16)
    for vocabulary, length in ((32_768, 64), (151_936, 128)):
        lm, rm = _random(vocabulary, device)
        prompts = [
            Problem(tuple(range(5, 37)), tuple(range(5, 37)), (3, 4), 7, length, frozenset(), StopStrings())
        ]
        yield Case(f"random, V={vocabulary}, L={length}", lm, rm, DTOConfig(), prompts, 1)


def measure(case: Case, repeats: int = _REPEATS) -> dict[str, Any]:
    """One entry of the benchmark's JSON; a case whose loops differ has no times."""
    sequential = SequentialLoop(case.lm, case.rm, case.config)
    fast = BatchedLoop(case.lm, case.rm, case.config, batch_size=case.batch_size)
    expected, slow_stats = _decode(sequential, case.problems)
    found, fast_stats = _decode(fast, case.problems)
    same = all(found[n].tokens == expected[n].tokens for n in expected)
    generations = sum(s.generations for s in slow_stats) / len(slow_stats)
    count = max(1, round(generations))
    best_stats = _best_of_n(case, count)
    entry: dict[str, Any] = {
        "name": case.name,
        "prompts": len(case.problems),
        "same_tokens": same,
        "generations": generations,
        "samples": count,
        "speculated": sum(s.speculated for s in fast_stats) / len(fast_stats),
        "token_passes": {
            "sequential": _passes(slow_stats),
            "fast": _passes(fast_stats),
            "best_of_n": _passes(best_stats),
        },
        "rounds": {"sequential": _rounds(slow_stats), "fast": _rounds(fast_stats)},
    }
    if not same:
        return entry
    runs: dict[str, Callable[[], object]] = {
        "sequential": lambda: _decode(sequential, case.problems),
        "fast": lambda: _decode(fast, case.problems),
        "best_of_n": lambda: _best_of_n(case, count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    entry["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    entry["speedup"] = entry["seconds"]["sequential"] / entry["seconds"]["fast"]
    return entry


def _decode(
    loop: SequentialLoop | BatchedLoop, problems: list[Problem]
) -> tuple[dict[int, Decoded], list[Stats]]:
    stats = [Stats() for _ in problems]
    return dict(loop.decode(problems, stats)), stats


def _best_of_n(case: Case, count: int) -> list[Stats]:
    """Roll out ``count`` samples a prompt as one batch and score them, batch by batch of prompts."""
    everything = []
    for start in range(0, len(case.problems), case.batch_size):
        part = case.problems[start : start + case.batch_size]
        stats = Stats()
        longest = max(problem.max_new_tokens for problem in part)
        prompts = [problem.prompt_ids for problem in part]
        sampling = case.config.rollout_sampling
        responses = sample_batch(case.lm, prompts, count, sampling, part[0].seed, longest, stats)
        sequences = [
            [*problem.reward_prefix, *response, *problem.reward_suffix]
            for problem, group in zip(part, responses, strict=True)
            for response in group
        ]
        case.rm.score(sequences)
        stats.token_passes["rm"] += sum(map(len, sequences))
        everything.append(stats)
    return everything


def _passes(stats: list[Stats]) -> int:
    return sum(sum(s.token_passes.values()) for s in stats)


def _rounds(stats: list[Stats]) -> int:
    return sum(s.rounds for s in stats)


def _bundled(count: int, device: torch.device) -> tuple[LanguageModel, RewardModel, list[Problem]]:
    lm = LanguageModel(load_language_model(bundled("lm"), str(device)))
    rm = RewardModel(load_reward_model(bundled("rm"), str(device)), VocabularyAlignment.identity())
    for model in (lm.model, rm.model):
        model.requires_grad_(False)
    tokenizer = load_tokenizer(bundled("tokenizer"))
    tail = response_tail(tokenizer)
    problems = []
    for n, problem in enumerate(countdown.held_out(count)):
        prompt = render_chat(tokenizer, [{"role": "user", "content": countdown.render(problem)}])
        problems.append(Problem(prompt, prompt, tail, n, 40, lm.eos_ids, StopStrings()))
    return lm, rm, problems


def _random(vocabulary: int, device: torch.device) -> tuple[LanguageModel, RewardModel]:
    """Two layers, so that the vocabulary is what costs."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    lm = Qwen2ForCausalLM(Qwen2Config(**shape)).to(device).eval().requires_grad_(False)
    rm = Qwen2ForSequenceClassification(Qwen2Config(**shape, num_labels=1))
    return LanguageModel(lm), RewardModel(
        rm.to(device).eval().requires_grad_(False), VocabularyAlignment.identity()
    )
