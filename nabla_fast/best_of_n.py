"""Many independent samples of many prompts as one batch: what Best-of-N and its kin roll out with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nabla_fast.config import SamplingConfig
from nabla_fast.errors import DecodingFailed, RowError
from nabla_fast.models import LanguageModel
from nabla_fast.ops.rows import report, row_status
from nabla_fast.results import Stats


@torch.no_grad()
def sample_batch(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: SamplingConfig,
    seed: int,
    max_new_tokens: int,
    stats: Stats,
) -> list[list[list[int]]]:
    """Draw ``count`` responses to each prompt.

    Each prompt is read once, whatever ``count`` is, and a response leaves the batch when it ends.

    Args:
        prompts: P lists of token ids.
        sampling: T ≤ 0 is greedy.
        seed: of the one CPU generator that all draws come from.
        max_new_tokens: most tokens of a response, its EOS counted.
        stats: receives rollouts, rounds, and tokens read and drawn.
    Returns:
        P lists of ``count`` responses, each with its EOS where it has one.
    Raises:
        DecodingFailed: the LM's logits are not finite; it names the prompts whose they are.
    """
    generator = torch.Generator().manual_seed(seed)
    warpers = _warpers(sampling)
    ids, mask = _left_padded(prompts, lm.device)
    cache = DynamicCache(config=lm.model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    hidden = lm.hidden(ids, cache=cache, mask=mask, positions=positions)[:, -1]
    stats.token_passes["lm"] += sum(map(len, prompts))
    stats.padding_passes["lm"] += mask.numel() - sum(map(len, prompts))
    stats.generations += len(prompts) * count
    stats.rounds += 1

    cache.batch_repeat_interleave(count)
    hidden, mask = (tensor.repeat_interleave(count, dim=0) for tensor in (hidden, mask))
    position = positions[:, -1].repeat_interleave(count)
    responses: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    alive = list(range(len(responses)))
    while True:
        logits = lm.logits(hidden).cpu()
        try:
            tokens = _draw(logits, sampling, warpers, generator)
        except RowError as error:
            struck = sorted({alive[row] // count for row, _ in error.rows})
            raise DecodingFailed(struck, [], error) from error
        for row, token in zip(alive, tokens.tolist(), strict=True):
            responses[row].append(token)
        stats.generated_tokens += len(alive)
        going = [
            n
            for n, row in enumerate(alive)
            if responses[row][-1] not in lm.eos_ids and len(responses[row]) < max_new_tokens
        ]
        if not going:
            return [responses[p * count : (p + 1) * count] for p in range(len(prompts))]
        if len(going) < len(alive):
            keep = torch.tensor(going, device=lm.device)
            cache.batch_select_indices(keep)
            mask, position, tokens = mask[keep], position[keep], tokens[going]
            alive = [alive[n] for n in going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        position = position + 1
        read = tokens.to(lm.device)[:, None]
        hidden = lm.hidden(read, cache=cache, mask=mask, positions=position[:, None])[:, -1]
        stats.token_passes["lm"] += len(alive)


def _warpers(sampling: SamplingConfig) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.temperature > 0:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    return warpers


def _draw(
    logits: Tensor, sampling: SamplingConfig, warpers: LogitsProcessorList, generator: torch.Generator
) -> Tensor:
    """[B] tokens of [B, V] logits."""
    report("rollout", row_status(logits))
    if sampling.temperature <= 0:
        return logits.argmax(dim=-1)
    probabilities = warpers(None, logits).softmax(dim=-1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)[:, 0]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[P, S] ids and mask, the prompts' ends aligned."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
