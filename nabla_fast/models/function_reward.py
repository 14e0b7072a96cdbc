"""A reward without a gradient, as the decode loop sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast.errors import InputError, ModelError
from nabla_fast.models.alignment import expect_tokenizer
from nabla_fast.models.given_rewards import FunctionReward
from nabla_fast.models.reward_sequence import RewardSequence, ScoreMemory


class FunctionScorer:
    """A :class:`~nabla_fast.FunctionReward`, called with the LM's own tokens or their text.

    Attributes as of :class:`~nabla_fast.models.RewardModel`, as far as they make sense without embeddings.
    """

    differentiable = counts_tokens = scores_last = False
    context = model = None

    def __init__(self, given: FunctionReward, tokenizer: Any, vocabulary: int):
        """
        Args:
            tokenizer: the LM's.
            vocabulary: V of the LM.
        Raises:
            InputError: text is asked for, and there is no tokenizer.
        """
        if given.reads == "text":
            if tokenizer is None:
                raise InputError(
                    f"{given.name} reads text: pass a tokenizer, or FunctionReward(…, reads='tokens')"
                )
            expect_tokenizer("tokenizer", tokenizer, "decode")
        self.given, self.name, self.vocabulary = given, given.name, vocabulary
        self._tokenizer = tokenizer
        self.way = f"by calling it with {given.reads}, without a gradient"

    def read(self, lm_ids: Sequence[int]) -> list[int]:
        """The LM's own ids."""
        return list(lm_ids)

    def reward(
        self,
        sequence: RewardSequence,
        embeddings: Tensor | None = None,
        memory: ScoreMemory | None = None,
    ) -> Tensor:
        """The reward [1] float64 of a sequence of the LM's tokens; of embeddings there is none.

        Raises:
            ModelError: the function returns no number.
        """
        prompt, response = list(sequence.before), list(sequence.response)
        if self.given.reads == "text":
            texts = (
                self._tokenizer.decode(prompt),
                self._tokenizer.decode(response, skip_special_tokens=True),
            )
            value = self.given.function(*texts)
        else:
            value = self.given.function(prompt, response)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{self.name} must return a number, got {type(value).__name__}") from error
        return torch.tensor([number], dtype=torch.float64, device="cpu")

    def probe_gradient(self) -> None:
        """There is none to probe."""
