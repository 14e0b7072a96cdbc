"""Time per token of the batched loop's rollouts beside that of transformers' own ``generate``."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig

from nabla_fast.bench.decode_cases import bundled_models, bundled_problems
from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.problem import Problem
from nabla_fast.models import LanguageModel
from nabla_fast.results import Stats

PROMPTS = 8
TARGET = 0.6  # of generate's time per token


def measure_rollouts(device: torch.device, repeats: int = 3, *, tokens: int = 40) -> dict[str, Any]:
    """Milliseconds a token of 8 prompts, answered with exactly ``tokens`` tokens each.

    ``generate`` takes one prompt at a time; the rollouts one and all 8 at a time. With the same seed all
    three draw the same tokens, and there are no times if they do not.
    """
    lm, _ = bundled_models(device)
    problems = [
        replace(problem, eos_ids=frozenset(), max_new_tokens=tokens)
        for problem in bundled_problems(lm, PROMPTS)
    ]
    config = DTOConfig(max_generations=1, draws="torch")  # generate's draws, on a GPU too
    loops = {f"{n}": BatchedLoop(lm, None, config, batch_size=n) for n in (1, PROMPTS)}
    found = {name: _roll_out(loop, problems) for name, loop in loops.items()}
    expected = _generate(lm, problems, config.rollout_sampling)
    same = all(tokens == expected[0] for tokens, _ in found.values())
    result: dict[str, Any] = {"prompts": PROMPTS, "tokens": tokens, "same_tokens": same, "target": TARGET}
    if not same:
        return result
    seconds: dict[str, list[float]] = {"generate": [], **{name: [] for name in loops}}
    for _ in range(repeats):
        seconds["generate"].append(_generate(lm, problems, config.rollout_sampling)[1])
        for name, loop in loops.items():
            seconds[name].append(_roll_out(loop, problems)[1])
    count = PROMPTS * tokens
    ms = {name: 1e3 * statistics.median(values) / count for name, values in seconds.items()}
    return result | {
        "generate_ms": ms.pop("generate"),
        "rollout_ms": ms,
        "share": {
            n: value * count / 1e3 / statistics.median(seconds["generate"]) for n, value in ms.items()
        },
    }


def _roll_out(loop: BatchedLoop, problems: list[Problem]) -> tuple[list[list[int]], float]:
    """Tokens, and the seconds of the rollout stage."""
    stats = [Stats() for _ in problems]
    decoded = dict(loop.decode(problems, stats))
    return [decoded[n].tokens for n in range(len(problems))], sum(s.seconds["rollout"] for s in stats)


@torch.no_grad()
def _generate(
    lm: LanguageModel, problems: list[Problem], sampling: SamplingConfig
) -> tuple[list[list[int]], float]:
    """Tokens and seconds of transformers, one prompt at a time."""
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=problems[0].max_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    model, kept = lm.model, lm.model.generation_config
    responses = []
    seconds = 0.0
    with torch.random.fork_rng(devices=[]):
        try:
            # Fields missing from generate()'s argument are taken from the model's own: an EOS, say.
            model.generation_config = config
            for problem in problems:
                torch.manual_seed(problem.seed)
                ids = lm.tensor(problem.prompt_ids)
                start = time.perf_counter()
                output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
                seconds += time.perf_counter() - start
                responses.append(output[0, ids.shape[1] :].tolist())
        finally:
            model.generation_config = kept
    return responses, seconds
