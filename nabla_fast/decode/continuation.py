"""A rollout with its statistics and hard tokens, shared by both loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.plain_descent import scaled_noise
from nabla_fast.decode.problem import Problem
from nabla_fast.models import LanguageModel
from nabla_fast.ops import GumbelNoise, TokenStats, synchronize
from nabla_fast.ops.rows import row_slices


@dataclass(frozen=True)
class Continuation:
    """Tokens rolled out after a response.

    Attributes:
        tokens: a_1..a_L.
        hidden: [L, H], the LM's states over these tokens that predict them.
        stats: of z = W·hidden, [L] each.
        hard: ŷ [L] int64, the argmax of z, or of z plus its noise.
        noise: keys of the positions' Gumbel noise, or None.
    """

    tokens: list[int]
    hidden: Tensor
    stats: TokenStats
    hard: Tensor
    noise: GumbelNoise | None

    @classmethod
    def empty(cls, lm: LanguageModel) -> Continuation:
        """L = 0: after a token that ends the response."""
        hidden = torch.empty(0, lm.head.width, dtype=lm.head.dtype, device=lm.head.device)
        nothing = hidden.new_empty(0)
        tokens = nothing.long()
        return cls([], hidden, TokenStats(nothing, nothing, nothing, tokens), tokens, None)

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        config: DTOConfig,
        problem: Problem,
        response: list[int],
        tokens: list[int],
        hidden: Tensor,
        stats: TokenStats | None = None,
    ) -> Continuation:
        """The continuation rolled out after ``response``, L ≥ 1; statistics are computed if not given.

        Raises:
            RowError: the LM's logits are not finite.
        """
        if stats is None:
            stats = lm.head.stats(hidden)
        synchronize()
        if config.relaxation != "gumbel":
            return cls(tokens, hidden, stats, stats.argmax, None)
        start = len(problem.prompt_ids) + len(response)
        position = torch.arange(start, start + len(tokens), device=hidden.device)
        noise = GumbelNoise(torch.full_like(position, problem.seed), position)
        hard = torch.cat(
            [
                scaled_noise(
                    config, GumbelNoise(*(key[rows] for key in noise)), lm.logits(hidden[rows])
                ).argmax(dim=-1)
                for rows in row_slices(len(tokens), lm.vocabulary)
            ]
        )
        return cls(tokens, hidden, stats, hard, noise)

    def after(self, count: int) -> Continuation:
        """The continuation after the first ``count`` tokens."""
        rest = slice(count, None)
        return Continuation(
            self.tokens[rest],
            self.hidden[rest],
            TokenStats(*(value[rest] for value in self.stats)),
            self.hard[rest],
            None if self.noise is None else GumbelNoise(*(key[rest] for key in self.noise)),
        )
