"""Models, prompts and a decoder of them for the tests of ``generate``."""

from __future__ import annotations

import random
from functools import cache

import torch
from tiny_models import EOS, shared_lm, shared_reward_model, word_tokenizer
from torch import Tensor

from nabla_fast import DTOConfig, NablaDecoder, SamplingConfig

MOST = 8  # new tokens
SAMPLINGS = {"greedy": SamplingConfig(0.0), "sampled": SamplingConfig(0.9, 10, 0.95)}


def prompts(count: int = 20) -> list[list[int]]:
    """Token ids of prompts of several lengths."""
    chance = random.Random(7)
    # Single letters: the tokenizer reads text character by character, and so gives these ids back.
    return [[chance.choice((3, 4, 5)) for _ in range(2 + n % 5)] for n in range(count)]


@cache
def tokenizer():
    """With EOS for padding, as most language models have it."""
    made = word_tokenizer()
    made.pad_token = made.eos_token
    made.padding_side = "left"
    return made


@cache
def decoder(sampling: str = "sampled", loop: str = "batched") -> NablaDecoder:
    """In float64: chance ties of float32 would make either token right."""
    config = DTOConfig(
        iters=6, lr=1.0, max_generations=4, confidence_threshold=None, rollout_sampling=SAMPLINGS[sampling]
    )
    return NablaDecoder(
        shared_lm("qwen2"), shared_reward_model("qwen2"), tokenizer(), config=config, loop=loop
    )


def padded(rows: list[list[int]], pad: int = EOS) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [N, T] of prompts padded on the left."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def responses(sequences: Tensor, length: int) -> list[list[int]]:
    """Token ids of the responses after ``length`` tokens, without EOS and padding."""
    found = []
    for row in sequences[:, length:].tolist():
        found.append(row[: row.index(EOS)] if EOS in row else row)
    return found


def expected(made: NablaDecoder, rows: list[list[int]], **options) -> list[list[int]]:
    """The decoder's own answers."""
    results = made.generate(rows, **{"max_new_tokens": MOST, "seed": 5, **options})
    return [result.token_ids for result in results]
