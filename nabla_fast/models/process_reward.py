"""A process reward model: a classifier of tokens, read where steps end."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError
from nabla_fast.models.alignment import VocabularyAlignment
from nabla_fast.models.backbone import Forward
from nabla_fast.models.labels import LabelChoice
from nabla_fast.models.reward import RewardModel, wide_on_cpu
from nabla_fast.models.reward_sequence import RewardSequence, ScoreMemory
from nabla_fast.models.score_head import head_logits
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

    def reward(
        self,
        sequence: RewardSequence,
        embeddings: Tensor | None = None,
        memory: ScoreMemory | None = None,
    ) -> Tensor:
        """The reward [1] of one sequence, as :meth:`RewardModel.reward`."""
        positions = self.scored_positions(sequence, memory)
        if embeddings is not None:
            logits = self._logits(inputs_embeds=embeddings[None])
            return self._reduced(self._labels.of(logits[positions]))[None]
        with torch.no_grad():
            logits = self._logits(input_ids=self._ids(sequence.ids)[None])
            scores = self._labels.of(logits[positions])
            if memory is not None:
                scores = self._remembered(scores, sequence, positions, memory)
            return wide_on_cpu(self._reduced(scores)[None])

    def scored_positions(self, sequence: RewardSequence, memory: ScoreMemory | None = None) -> list[int]:
        """The positions, ascending, where steps of the response end; those in the memory are left out.

        At least one is returned: the last, where all are in the memory.
        """
        start = len(sequence.before)
        positions = [start + n for n in self._ends.of(sequence.response)]
        if memory is None or not self._looks_back_only:
            return positions
        ids = sequence.ids
        return [p for p in positions if tuple(ids[: p + 1]) not in memory] or positions[-1:]

    def of_states(
        self,
        states: Sequence[Tensor],
        sequences: Sequence[RewardSequence] = (),
        positions: Sequence[Sequence[int]] = (),
        memories: Sequence[ScoreMemory] = (),
    ) -> Tensor:
        """Rewards [B] of B sequences, as :meth:`RewardModel.of_states`."""
        logits = head_logits(self._head, torch.cat(list(states)))
        scores = self._labels.of(logits).split(list(map(len, states)))
        if memories:
            scores = list(map(self._remembered, scores, sequences, positions, memories))
        return torch.stack(list(map(self._reduced, scores)))

    def score_embeddings(self, embeddings: Tensor) -> Tensor:
        """What the gradient is probed with: scores [1] of all tokens of [1, S, H_r], reduced."""
        return self._reduced(self._labels.of(self._logits(inputs_embeds=embeddings)))[None]

    def _remembered(
        self, scores: Tensor, sequence: RewardSequence, positions: Sequence[int], memory: ScoreMemory
    ) -> Tensor:
        """Scores of all steps, those at ``positions`` given; of steps scored before, what was found then.

        Two responses that begin alike have steps in common, and with "min" often the very step that is
        their reward. Read in other passes, it would be another number in the last digits, by which one of
        two equals would be the better.
        """
        if not self._looks_back_only:
            return scores
        ids = sequence.ids
        for position, score in zip(positions, scores.tolist(), strict=True):
            memory.setdefault(tuple(ids[: position + 1]), score)
        return scores.new_tensor([memory[tuple(ids[: p + 1])] for p in self.scored_positions(sequence)])

    @functools.cached_property
    @torch.no_grad()
    def _looks_back_only(self) -> bool:
        """Whether a score depends on nothing after it: another last token changes no score before it."""
        ids = self._ids(self._probe_ids[1])
        last, first = ids.clone(), ids.clone()
        last[-1], first[0] = ids[0], ids[-1]
        whole, by_last, by_first = (self._logits(input_ids=row[None])[:-1] for row in (ids, last, first))
        return bool((by_last - whole).norm() <= 1e-3 * (by_first - whole).norm())

    def _reduced(self, scores: Tensor) -> Tensor:
        """One number of the scores [n] of steps."""
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
