"""Time of a decode by models of a released checkpoint's shape, beside plain sampling with as many rollouts.

The weights are random, in the exact shape of Qwen2.5-0.5B; the reward model has the same shape with one
label. A token's cost does not depend on the weights, the number of revisions does: the last norm is scaled
so that 7 or 8 of 10 redrawn tokens are the old one again, as with trained models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from nabla_fast.bench.decode_cases import random_problem
from nabla_fast.bench.decode_runs import Run, best_of_n, decode
from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.batched.sample_loop import SampleLoop
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.models import LanguageModel, RewardModel, VocabularyAlignment
from nabla_fast.results import Stats

DTYPES = (torch.bfloat16, torch.float32)  # what people load, and what the loops are exact in
GENERATIONS = 3
_SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
}
_TINY = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_NORM_SCALE = 8.0  # with embeddings of deviation .02 and 896 columns, logits of deviation 4.8

OnSide = Callable[[str], None]


def measure_shape(
    device: torch.device, dtype: torch.dtype, repeats: int, on_side: OnSide, *, quick: bool = False
) -> dict[str, Any]:
    """Seconds of both loops, of Best-of-N on the same passes, and of transformers' ``generate``.

    Two prompts of 32 tokens are answered with 32 tokens by at most 3 rollouts each; the two ways of
    sampling draw as many. In half precision the loops may part at a near tie: ``same_tokens`` counts the
    prompts whose tokens agree. The fastest of ``repeats`` runs counts for all but the sequential loop,
    which runs once.

    Returns:
        The entry of the benchmark's JSON: ``seconds`` and ``stage_seconds`` by side.
    """
    lm, rm = _models(device, dtype, _TINY if quick else _SHAPE)
    problems = [random_problem(8 if quick else 32, seed) for seed in (7, 8)]
    config = DTOConfig(max_generations=GENERATIONS)
    batched = BatchedLoop(lm, rm, config, batch_size=len(problems))
    sampler = SampleLoop(
        lm, rm, config.rollout_sampling, count=GENERATIONS, batch_size=len(problems) * GENERATIONS
    )
    sides: dict[str, Callable[[], Run]] = {
        "batched": lambda: decode(batched, problems),
        "best_of_n": lambda: best_of_n(sampler, problems),
        "generate": lambda: _generate(lm, problems, GENERATIONS),
        "generate_one": lambda: _generate(lm, problems[:1], 1),
    }
    on_side("sequential")
    runs = {"sequential": decode(SequentialLoop(lm, rm, config), problems)}
    for name, side in sides.items():
        on_side(name)
        runs[name] = side()
    for turn in range(repeats - 1):
        for name, side in sides.items():
            on_side(f"{name}, run {turn + 2} of {repeats}")
            runs[name] = min(runs[name], side(), key=lambda run: run.seconds)
    seconds = {name: run.seconds for name, run in runs.items()}
    tokens, expected = runs["batched"].tokens, runs["sequential"].tokens
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in lm.model.parameters()),
        "prompts": len(problems),
        "tokens": problems[0].max_new_tokens,
        "generations": {name: runs[name].total("generations") for name in ("sequential", "batched")},
        "rollouts": len(problems) * GENERATIONS,
        "same_tokens": sum(tokens[n] == expected[n] for n in expected),
        "seconds": seconds,
        "speedup": seconds["sequential"] / seconds["batched"],
        "seconds_to_best_of_n": seconds["batched"] / seconds["best_of_n"],
        "stage_seconds": {name: runs[name].stages() for name in ("sequential", "batched", "best_of_n")},
    }


def _models(
    device: torch.device, dtype: torch.dtype, shape: dict[str, Any]
) -> tuple[LanguageModel, RewardModel]:
    plain = {"tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}

    def made(kind: type[nn.Module], **more: Any) -> nn.Module:
        with torch.device(device):
            model = kind(Qwen2Config(**shape, **plain, **more))
        return model.to(dtype).eval().requires_grad_(False)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm, rm = made(Qwen2ForCausalLM), made(Qwen2ForSequenceClassification, num_labels=1)
    lm.model.norm.weight.mul_(_NORM_SCALE)
    return LanguageModel(lm), RewardModel(rm, VocabularyAlignment.identity())


@torch.no_grad()
def _generate(lm: LanguageModel, problems: list[Problem], count: int) -> Run:
    """Transformers' sampling of ``count`` responses a prompt as one batch, unscored."""
    config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        max_new_tokens=problems[0].max_new_tokens,
        num_return_sequences=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = torch.tensor([problem.prompt_ids for problem in problems], device=lm.device)
    start = time.perf_counter()
    lm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return Run(time.perf_counter() - start, [Stats()])
