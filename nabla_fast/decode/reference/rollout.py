"""Rollouts of one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast.config import SamplingConfig
from nabla_fast.decode.draws import Draws, Stream
from nabla_fast.models import LanguageModel
from nabla_fast.ops.rows import report, row_status
from nabla_fast.results import Stats


@dataclass(frozen=True)
class Rollout:
    """Tokens drawn from the LM.

    Attributes:
        tokens: a_1..a_L.
        hidden: [L, H], the final hidden states that predicted them.
    """

    tokens: list[int]
    hidden: Tensor


class Roller:
    """Rolls out continuations of one problem, reading what they share once where the LM allows."""

    def __init__(self, lm: LanguageModel):
        self._lm = lm
        self._reading = lm.prefix_reading()

    @torch.no_grad()
    def roll(
        self,
        prefix: Sequence[int],
        sampling: SamplingConfig,
        draws: Draws,
        stream: Stream,
        ends: Callable[[list[int]], bool],
        stats: Stats,
    ) -> Rollout:
        """Draw tokens after ``prefix`` until ``ends(tokens)``; at least one.

        Args:
            prefix: tokens of the prompt and the response so far.
            sampling: T ≤ 0 is greedy.
            draws, stream: what tokens are drawn with.
            ends: whether the rollout is over, given its tokens so far.
            stats: receives the tokens read and drawn.
        """
        tokens: list[int] = []
        states = []
        while True:
            hidden, read = self._reading.last_state([*prefix, *tokens])
            stats.token_passes["lm"] += read
            states.append(hidden)
            logits = self._lm.logits(hidden)
            report("rollout", row_status(logits))
            tokens.append(draws.rollout(logits, sampling, [stream], [len(prefix) + len(tokens)])(0))
            if ends(tokens):
                break
        stats.llm_calls += len(tokens)
        stats.generated_tokens += len(tokens)
        return Rollout(tokens, torch.cat(states))
