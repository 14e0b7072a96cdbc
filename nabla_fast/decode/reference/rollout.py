"""Rollouts of one sequence at a time through a transformers model and its own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from nabla_fast.config import SamplingConfig
from nabla_fast.decode.sampling import next_token
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
    """Rolls out continuations of one problem, keeping the keys and values of what they share."""

    def __init__(self, lm: LanguageModel):
        self._lm = lm
        self._cached: list[int] = []
        self._cache: DynamicCache | None = None

    @torch.no_grad()
    def roll(
        self,
        prefix: Sequence[int],
        sampling: SamplingConfig,
        generator: torch.Generator,
        ends: Callable[[list[int]], bool],
        stats: Stats,
    ) -> Rollout:
        """Draw tokens after ``prefix`` until ``ends(tokens)``; at least one.

        Args:
            prefix: tokens of the prompt and the response so far.
            sampling: T ≤ 0 is greedy.
            generator: takes one draw a token, none if greedy.
            ends: whether the rollout is over, given its tokens so far.
            stats: receives the tokens read and drawn.
        """
        unread = list(prefix[self._rewind(prefix) :])
        tokens: list[int] = []
        states = []
        while True:
            hidden = self._lm.hidden(self._lm.tensor(unread), cache=self._cache)[0, -1:]
            stats.token_passes["lm"] += len(unread)
            self._cached += unread
            states.append(hidden)
            logits = self._lm.logits(hidden).cpu()
            report("rollout", row_status(logits))
            tokens.append(next_token(logits[0], sampling, generator))
            if ends(tokens):
                break
            unread = tokens[-1:]
        stats.llm_calls += len(tokens)
        stats.generated_tokens += len(tokens)
        return Rollout(tokens, torch.cat(states))

    def _rewind(self, prefix: Sequence[int]) -> int:
        """Cut the cache back to what it shares with ``prefix``, one token short of it; how many that is."""
        shared = 0
        while shared < min(len(self._cached), len(prefix) - 1) and self._cached[shared] == prefix[shared]:
            shared += 1
        excess = len(self._cached) - shared
        if self._cache is None or (excess and not all(map(_croppable, self._cache.layers))):
            self._cache, self._cached = DynamicCache(config=self._lm.model.config), []
            return 0
        if excess:
            self._cache.crop(-excess)
            del self._cached[shared:]
        return shared


def _croppable(layer: CacheLayerMixin) -> bool:
    """Whether a cache layer can be cut back; recurrent states and full windows cannot."""
    window = getattr(layer, "sliding_window", None)
    if window is not None and layer.get_seq_length() >= window:
        return False
    return getattr(layer, "is_croppable", isinstance(layer, DynamicLayer))  # early releases do not say
