"""Results in the form that ``generate`` of transformers returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from nabla_fast.results import Result


@dataclass
class NablaGenerateOutput(GenerateDecoderOnlyOutput):
    """What ``generate(return_dict_in_generate=True)`` returns of a decoder.

    ``rewards`` and ``results`` are attributes and no items, as a pipeline cuts items into batches and
    cannot do that with these.

    Attributes:
        sequences: [N, T + n] int64, prompts and responses.
        rewards: [N] float64, of the responses; None without a reward model.
        results: a :class:`~nabla_fast.Result` a row, with proposals and costs.
        scores, logits, attentions, hidden_states, past_key_values: None.
    """

    rewards: ClassVar[Tensor | None] = None
    results: ClassVar[list[Result] | None] = None


def sequences_of(input_ids: Tensor, results: Sequence[Result], pad_token_id: int | None) -> Tensor:
    """Prompts and responses, those with their EOS, side by side.

    Args:
        input_ids: [N, T] int64.
        results: one a row.
        pad_token_id: fills shorter responses up; None where all have one length.
    Returns:
        [N, T + n] int64; n is the length of the longest response.
    """
    responses = [r.token_ids + ([] if r.eos_token_id is None else [r.eos_token_id]) for r in results]
    longest = max(map(len, responses))
    filled = [tokens + [pad_token_id] * (longest - len(tokens)) for tokens in responses]
    new = torch.tensor(filled, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, new], dim=1)


def output_of(sequences: Tensor, results: list[Result]) -> NablaGenerateOutput:
    """The same with rewards and results."""
    scores = [result.reward for result in results]
    rewards = None if None in scores else torch.tensor(scores, dtype=torch.float64, device=sequences.device)
    output = NablaGenerateOutput(sequences=sequences)
    vars(output).update(rewards=rewards, results=results)
    return output
