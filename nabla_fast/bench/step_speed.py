"""Time of a rollout's step on fixed buffers beside transformers' ``generate`` with a static cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.batched.executor import TURNS
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.stop import StopStrings
from nabla_fast.models import LanguageModel
from nabla_fast.results import Stats

SEQUENCES, PROMPT = 16, 32
# Two tokens that differ by less than this share of the largest logit are a tie for bfloat16 arithmetic.
_TIE = 2.0**-6

Tokens = list[list[int]]
Side = Callable[[int], tuple[Tokens, float]]


def measure_steps(
    device: torch.device, repeats: int = 3, *, quick: bool = False, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Milliseconds a step of 16 sequences of a random two-layer model, greedy, from runs of two lengths.

    The time of a step is that of the longer runs less that of the shorter ones, so that what a run begins
    with, the prompts' pass and the first graphs, is not in it. Two graphs of the longer runs are, captured
    as block tables grow, shared by as many steps as these runs are longer. There are no times if the
    tokens are not generate's, ties in half precision set aside.

    Args:
        dtype: of the model; None: bfloat16 on a GPU, float32 elsewhere.
    """
    lm = LanguageModel(_model(device, quick, dtype))
    short, long = (4, 12) if quick else (128, 512) if device.type == "cuda" else (32, 160)
    sides: dict[str, Side] = {"generate": lambda tokens: _generate(lm, tokens)}
    for name, turns in (("one_by_one", 1), ("ahead", TURNS)):
        sides[name] = lambda tokens, turns=turns: _roll_out(lm, turns, tokens)
    found = {name: side(long)[0] for name, side in sides.items()}
    ties = {name: _ties(lm, found["generate"], tokens) for name, tokens in found.items()}
    result: dict[str, Any] = {
        "sequences": SEQUENCES,
        "dtype": str(lm.head.dtype).removeprefix("torch."),
        "turns": TURNS,
        "same_tokens": None not in ties.values(),
        "ties": ties,
    }
    if not result["same_tokens"]:
        return result
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side(long)[1] - side(short)[1])
    ms = {name: 1e3 * statistics.median(values) / (long - short) for name, values in seconds.items()}
    return result | {"step_ms": ms, "share": {name: value / ms["generate"] for name, value in ms.items()}}


def _model(device: torch.device, quick: bool, dtype: torch.dtype | None) -> LlamaForCausalLM:
    """Of two layers of a 1B model's width on a GPU, smaller elsewhere."""
    if device.type == "cuda":
        size = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128_256}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    else:
        width = 64 if quick else 512
        size = {"hidden_size": width, "intermediate_size": 3 * width, "vocab_size": 64 * width}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=2, **size, **heads, eos_token_id=None, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _prompts(vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (SEQUENCES, PROMPT), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def _roll_out(lm: LanguageModel, turns: int, tokens: int) -> tuple[Tokens, float]:
    """Tokens, and the seconds of the rollouts."""
    config = DTOConfig(
        max_generations=1,
        draws="philox",
        rollout_sampling=SamplingConfig(temperature=0),
        reward_coeff=0.0,
    )
    problems = [
        Problem(ids, (), (), 0, tokens, frozenset(), StopStrings()) for ids in _prompts(lm.vocabulary)
    ]
    stats = [Stats() for _ in problems]
    loop = BatchedLoop(lm, None, config, batch_size=SEQUENCES, turns=turns)
    decoded = dict(loop.decode(problems, stats))
    seconds = sum(own.seconds["rollout"] for own in stats)
    return [decoded[n].tokens for n in range(SEQUENCES)], seconds


@torch.no_grad()
def _generate(lm: LanguageModel, tokens: int) -> tuple[Tokens, float]:
    """Tokens and seconds of transformers, all sequences at once; compiled where transformers compiles."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        cache_implementation="static",
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = torch.tensor(_prompts(lm.vocabulary), device=lm.device)
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    start = time.perf_counter()
    output = lm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    found = output[:, PROMPT:].tolist()
    return found, time.perf_counter() - start


@torch.no_grad()
def _ties(lm: LanguageModel, expected: Tokens, found: Tokens) -> int | None:
    """Sequences that differ from a tie on; None if one differs otherwise."""
    ties = 0
    for prompt, theirs, ours in zip(_prompts(lm.vocabulary), expected, found, strict=True):
        if ours == theirs:
            continue
        if len(ours) != len(theirs) or lm.head.dtype == torch.float32:
            return None
        first = next(n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        logits = lm.logits(lm.hidden(lm.tensor([*prompt, *ours[:first]]))[0, -1:])[0]
        if abs(logits[ours[first]] - logits[theirs[first]]) > _TIE * logits.abs().amax():
            return None
        ties += 1
    return ties
