"""Batched decoding of the small language model, and what is measured on its samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.training.data import END_ID, MAX_NEW_TOKENS, decode_answer, encode_prompt
from nabla_fast.demo.countdown import Problem

TEMPERATURE, TOP_K, TOP_P = 0.7, 20, 0.8  # the sampling of `nabla-fast demo`
_ROWS_AT_ONCE = 1024


def filtered_probabilities(logits: Tensor) -> Tensor:
    """Temperature, then top-k, then top-p, in transformers' order. [N, V] to [N, V] float32."""
    top, index = (logits.float() / TEMPERATURE).topk(TOP_K, dim=-1)
    p = top.softmax(dim=-1)
    # A token stays when the mass before it is below top_p, so the one that crosses it stays too.
    p = p.masked_fill(p.cumsum(dim=-1) - p >= TOP_P, 0.0)
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(1, index, p)


@torch.inference_mode()
def _decode_rows(model: PreTrainedModel, prompts: Tensor, generator: torch.Generator | None):
    """Prompts [N, P] of one length to responses [N, <= MAX_NEW_TOKENS]; greedy if no generator."""
    ids, cache, responses = prompts, None, []
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(MAX_NEW_TOKENS):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = output.logits[:, -1], output.past_key_values
        if generator is None:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(filtered_probabilities(logits), 1, generator=generator)
        responses.append(token)
        finished |= token[:, 0] == END_ID
        if finished.all():
            break
        ids = token
    return torch.cat(responses, dim=1)


def decode(
    model: PreTrainedModel, problems: Sequence[Problem], samples: int, seed: int | None = None
) -> list[list[str]]:
    """Answers to each problem: ``samples`` at the demo's sampling, or one greedy without a seed.

    Problems are grouped by prompt length, so no padding or mask is involved. An answer that never
    ends is cut at ``MAX_NEW_TOKENS``.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    by_length: dict[int, list[int]] = defaultdict(list)
    prompts = [encode_prompt(problem) for problem in problems]
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].extend([i] * samples)
    answers: list[list[str]] = [[] for _ in problems]
    model.eval()
    for length in sorted(by_length):
        rows = by_length[length]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows[start : start + _ROWS_AT_ONCE]
            ids = torch.tensor([list(prompts[i]) for i in chunk])
            for i, response in zip(chunk, _decode_rows(model, ids, generator).tolist(), strict=True):
                answers[i].append(decode_answer(response))
    return answers
