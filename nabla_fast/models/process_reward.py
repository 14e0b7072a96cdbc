"""A process reward model: a classifier of tokens, read where steps end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError
from nabla_fast.models.alignment import VocabularyAlignment
from nabla_fast.models.backbone import Forward
from nabla_fast.models.labels import LabelChoice
from nabla_fast.models.reward import RewardModel, wide_on_cpu
from nabla_fast.models.reward_sequence import RewardSequence
from nabla_fast.models.step_ends import StepEnds


class ProcessRewardModel(RewardModel):
    """Any transformers token classifier: its scores at the ends of a response's steps, reduced.

    Attributes as of :class:`RewardModel`; with ``scores_last`` all scored tokens' states get the head.
    """

    wrapper = "ProcessReward"

    def __init__(
        self,
        model: nn.Module,
        alignment: VocabularyAlignment,
        labels: LabelChoice,
        ends: StepEnds,
        reduce: str,
    ):
        """Probe the model on a few tokens.

        Args:
            model, alignment, labels: as of :class:`RewardModel`.
            ends: where steps end.
            reduce: "min", "mean" or "last", over the scores of steps.
        Raises:
            ModelError, InputError: as of :class:`RewardModel`.
        """
        self._ends, self._reduce = ends, reduce
        super().__init__(model, alignment, labels)

    @property
    def unread(self) -> str:
        """Why no reader can be used where ``scores_last`` is false."""
        return f"{self.name} does not score its tokens' states"

    def reward(self, sequence: RewardSequence, embeddings: Tensor | None = None) -> Tensor:
        """The reward [1] of one sequence: of its tokens, or of embeddings [S, H_r], differentiable."""
        if embeddings is None:
            with torch.no_grad():
                given = {"input_ids": self._ids(sequence.ids)[None]}
                return wide_on_cpu(
                    self._reduced(self._logits(**given)[self.scored_positions(sequence)])[None]
                )
        logits = self._logits(inputs_embeds=embeddings[None])
        return self._reduced(logits[self.scored_positions(sequence)])[None]

    def scored_positions(self, sequence: RewardSequence) -> list[int]:
        """The positions, ascending, where steps of the response end."""
        start = len(sequence.before)
        return [start + n for n in self._ends.of(sequence.response)]

    def of_states(self, states: Sequence[Tensor]) -> Tensor:
        """Rewards [B] of B sequences from the states [n, H] at their ``scored_positions``."""
        logits = self._head(torch.cat(list(states)))
        return torch.stack([self._reduced(part) for part in logits.split(list(map(len, states)))])

    def score_embeddings(self, embeddings: Tensor) -> Tensor:
        """What the gradient is probed with: scores [1] of all tokens of [1, S, H_r], reduced."""
        return self._reduced(self._logits(inputs_embeds=embeddings))[None]

    def _reduced(self, logits: Tensor) -> Tensor:
        """One number of the logits [n, labels] at n ends of steps."""
        scores = self._labels.of(logits)
        if self._reduce == "last":
            return scores[-1]
        return scores.amin(dim=0) if self._reduce == "min" else scores.mean(dim=0)

    @staticmethod
    def _head_of(model: nn.Module) -> nn.Module | None:
        return getattr(model, "score", None) or getattr(model, "classifier", None)

    def _scored(self, states: Tensor) -> Tensor:
        return states[0]

    def _own_logits(self, whole: Forward, **tokens: Tensor) -> Tensor:
        """Logits [S, labels] of all tokens of one sequence by the model's own forward."""
        (given,) = tokens.values()
        mask = torch.ones(given.shape[:2], dtype=torch.int64, device=given.device)
        logits = whole.logits(attention_mask=mask, **tokens)
        if logits.shape != (1, given.shape[1], self._labels.count):
            raise ModelError(
                f"{self.name} gives scores {list(logits.shape)} for {given.shape[1]} tokens, "
                f"not {self._labels.count} for each: a process reward is an AutoModelForTokenClassification"
            )
        return logits[0]

    def _pooled_probes(self) -> Tensor:
        return torch.cat([self._logits(input_ids=self._ids(ids)[None]) for ids in self._probe_ids])
