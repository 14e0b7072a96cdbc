"""Rewards as a weighted sum of terms, made of what a caller has given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nabla_fast.errors import InputError, ModelError
from nabla_fast.models.alignment import VocabularyAlignment, expect_tokenizer
from nabla_fast.models.boundary import probing
from nabla_fast.models.custom_reward import CustomReward, checked_table
from nabla_fast.models.function_reward import FunctionScorer
from nabla_fast.models.given_rewards import (
    ClassifierReward,
    DifferentiableReward,
    FunctionReward,
    ProcessReward,
    RewardEnsemble,
)
from nabla_fast.models.labels import LabelChoice
from nabla_fast.models.process_reward import ProcessRewardModel
from nabla_fast.models.reward import RewardModel
from nabla_fast.models.reward_sequence import RewardSequence, ScoreMemory
from nabla_fast.models.step_ends import StepEnds
from nabla_fast.models.tables import TokenTable, table_rows


class Reward(Protocol):
    """One reward as the decode loop sees it.

    Attributes:
        name: as messages call it.
        model: the caller's module, or None.
        vocabulary: tokens it reads.
        context: most tokens it reads, or None for no limit.
        differentiable: whether it has a gradient, and with it ``table``, ``own_table``, ``device`` and
            ``embed`` as of :class:`RewardModel`.
        counts_tokens: whether what it reads are token passes.
        scores_last: whether a reward is made of states, as ``scored_positions`` and ``of_states`` of
            :class:`RewardModel` say; else ``way`` or ``unread`` says how it is read.
    """

    name: str
    model: nn.Module | None
    table: TokenTable
    own_table: Tensor
    device: torch.device
    vocabulary: int
    context: int | None
    differentiable: bool
    counts_tokens: bool
    scores_last: bool
    way: str | None
    unread: str

    def read(self, lm_ids: Sequence[int]) -> list[int]:
        """The reward's own ids of the LM's tokens."""
        ...

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings [S, H_r] of the reward's own ids."""
        ...

    def reward(
        self,
        sequence: RewardSequence,
        embeddings: Tensor | None = None,
        memory: ScoreMemory | None = None,
    ) -> Tensor:
        """The reward [1] of one sequence, as :meth:`RewardModel.reward`."""
        ...

    def probe_gradient(self) -> None:
        """See to it that gradients reach the embeddings."""
        ...


@dataclass(frozen=True)
class RewardTerm:
    """A reward, and how much it counts.

    Attributes:
        reward: a term of the sum.
        weight: its factor.
        tokenizer: the reward's own; None: the decoder's reward tokenizer.
    """

    reward: Reward
    weight: float = 1.0
    tokenizer: Any = None


@dataclass(frozen=True)
class RewardSum:
    """Σ weight · reward over terms, at least one."""

    terms: tuple[RewardTerm, ...]


def terms_of(rm: RewardSum | Reward | None) -> tuple[RewardTerm, ...]:
    """The terms of a sum; a reward by itself is one, None has none."""
    if rm is None:
        return ()
    return rm.terms if isinstance(rm, RewardSum) else (RewardTerm(rm),)


def weighted_members(given: Any, weight: float = 1.0) -> Iterator[tuple[Any, float]]:
    """What a caller has given as reward, ensembles taken apart, with the weights of all.

    Raises:
        InputError: something is no reward.
    """
    if isinstance(given, RewardEnsemble):
        for member, factor in zip(given.members, given.weights, strict=True):
            yield from weighted_members(member, weight * factor)
        return
    known = ClassifierReward, ProcessReward, FunctionReward
    model = isinstance(given, nn.Module) and hasattr(given, "get_input_embeddings")
    if not isinstance(given, known) and not model and not _is_own(given):
        name = type(given).__name__
        hint = ": wrap a function in FunctionReward" if callable(given) else ""
        raise InputError(
            "reward_model must be a transformers model, a reward of nabla_fast or an object with a table "
            f"and a score(), got {name}{hint}"
        )
    yield given, weight


def module_of(given: Any) -> nn.Module | None:
    """The module of a member, which is frozen while a decode runs."""
    module = given.model if isinstance(given, (ClassifierReward, ProcessReward)) else given
    return module if isinstance(module, nn.Module) else None


def table_of(given: Any) -> Tensor | None:
    """The table of a reward of the caller's own; None for other members."""
    return given.table if _is_own(given) else None


@dataclass(frozen=True)
class RewardSetting:
    """What rewards are read with.

    Attributes:
        vocabulary: V of the LM.
        tokenizer: the LM's, or None.
        reward_tokenizer: of rewards without one of their own.
        alignment: of rewards without one of their own.
    """

    vocabulary: int
    tokenizer: Any
    reward_tokenizer: Any
    alignment: VocabularyAlignment | None

    def sum_of(self, members: Sequence[tuple[Any, float]]) -> RewardSum:
        """Read and probe members, weighted.

        Raises:
            ModelError: a model cannot be used.
            InputError: vocabularies differ and there is no alignment, or a choice names what is not there.
        """
        return RewardSum(
            tuple(
                RewardTerm(self._reward(given), weight, self._tokenizer_of(given))
                for given, weight in members
            )
        )

    def _tokenizer_of(self, given: Any) -> Any:
        """A member's own tokenizer; one of the caller's own reads what the LM reads, if it says nothing."""
        own = getattr(given, "tokenizer", None)
        if own is not None:
            expect_tokenizer(f"{type(given).__name__}.tokenizer", own, "get_vocab")
        return self.tokenizer if own is None and _is_own(given) else own

    def _reward(self, given: Any) -> Reward:
        if isinstance(given, FunctionReward):
            return FunctionScorer(given, self.tokenizer, self.vocabulary)
        if _is_own(given):
            return CustomReward(given, self._own_alignment(given))
        own = self._tokenizer_of(given)
        tokenizer = self.reward_tokenizer if own is None else own
        module = module_of(given)
        name = type(module).__name__
        with probing(module, "cannot be read"):
            rows = table_rows(module)
        if isinstance(given, ProcessReward):
            ends = StepEnds.of_separator(given.separator, tokenizer, rows)
            labels = LabelChoice(given.label, given.weights, given.probability)
            alignment = self._alignment(given, rows, tokenizer)
            return ProcessRewardModel(module, alignment, labels, ends, given.reduce)
        if name.endswith("ForTokenClassification"):
            raise ModelError(f"{name} scores every token: pass ProcessReward(model, separator=…)")
        labels = None
        if isinstance(given, ClassifierReward):
            labels = LabelChoice(given.label, given.weights, given.probability)
        return RewardModel(module, self._alignment(given, rows, tokenizer), labels)

    def _own_alignment(self, given: DifferentiableReward) -> VocabularyAlignment:
        """How a reward of the caller's own reads the LM's tokens: as its alignment says, if it has one."""
        rows, name = len(checked_table(given)), type(given).__name__
        if getattr(given, "alignment", None) is not None:
            return self._alignment(given, rows, self._tokenizer_of(given))
        if rows != self.vocabulary:
            raise InputError(
                f"{name}.table has {rows} rows, the LM {self.vocabulary} tokens: a row for each of them is "
                f"needed, or {name}.alignment, a VocabularyAlignment"
            )
        return VocabularyAlignment.identity()

    def _alignment(self, given: Any, theirs: int, tokenizer: Any) -> VocabularyAlignment:
        """How a reward of ``theirs`` tokens reads the LM's."""
        alignment = getattr(given, "alignment", None)
        if alignment is None:
            alignment = self.alignment
        if alignment is not None and not isinstance(alignment, VocabularyAlignment):
            raise InputError(f"alignment must be a VocabularyAlignment, got {type(alignment).__name__}")
        ours = self.vocabulary
        if alignment is not None and alignment.token_map is not None:
            mapped = len(alignment.token_map)
            if mapped != ours:
                raise InputError(
                    f"the alignment maps {mapped} tokens, the LM has {ours}: "
                    f"pass vocabulary={ours} where it is made"
                )
            return alignment
        if ours != theirs:
            # The LM's tokens have to be a part of the reward model's for a table to be cut.
            cut = (
                f", or VocabularyAlignment.truncated({ours}) if the reward model's table is only padded"
                if ours < theirs
                else ""
            )
            raise InputError(
                f"the LM has {ours} tokens, the reward model {theirs}: pass "
                "alignment=VocabularyAlignment.from_tokenizers(tokenizer, reward_tokenizer, "
                f"vocabulary={ours}){cut}"
            )
        if alignment is not None:
            return alignment
        left, right = self.tokenizer, tokenizer
        if left is None or right is left or right is None:
            return VocabularyAlignment.identity()
        expect_tokenizer("tokenizer", left, "get_vocab")
        expect_tokenizer("reward_tokenizer", right, "get_vocab")
        if left.get_vocab() != right.get_vocab():
            raise InputError(
                "tokenizer and reward_tokenizer have different vocabularies: pass "
                "alignment=VocabularyAlignment.from_tokenizers(tokenizer, reward_tokenizer)"
            )
        return VocabularyAlignment.identity()


def _is_own(given: Any) -> bool:
    """Whether a member is a reward of the caller's own."""
    if isinstance(given, nn.Module) and hasattr(given, "get_input_embeddings"):
        return False
    return isinstance(given, DifferentiableReward) and callable(given.score)
