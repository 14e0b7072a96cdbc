"""A reward model as the decode loop sees it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nabla_fast.errors import ModelError
from nabla_fast.models.alignment import VocabularyAlignment
from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.boundary import adapted_model, probing, refuse_unreadable_weights
from nabla_fast.models.context import TableLookups, stated_context
from nabla_fast.models.labels import LabelChoice
from nabla_fast.models.probes import close, probe_gradient, probe_ids, probe_length, with_states
from nabla_fast.models.replica import configs_of, replica, returning_names
from nabla_fast.models.reward_sequence import RewardSequence, ScoreMemory
from nabla_fast.models.score_head import head_logits
from nabla_fast.models.tables import embedding_table

# The largest score of a probe, as a bound put on scores leaves small ones as they are.
_LARGE = 100.0


class RewardModel:
    """Any transformers sequence classifier: one number of its labels' logits.

    Models that score the last token's hidden state (the decoder-only ones) are pooled here, which
    makes ragged batches right; any other runs through its own forward, one sequence at a time.

    Attributes:
        model: the transformers model.
        table: input embeddings R [V, H_r], read through the LM's vocabulary: what the model reads for
            token v of the LM.
        own_table: input embeddings [V_r, H_r] of the model's own tokens.
        context: most tokens the model reads, or None if it does not say.
        scores_last: whether a reward is made of the score head of hidden states (the last token's).
    """

    differentiable = counts_tokens = True
    wrapper = "ClassifierReward"  # what labels are chosen with
    way: str | None = None  # how it is read, where no reader is asked for

    def __init__(self, model: nn.Module, alignment: VocabularyAlignment, labels: LabelChoice | None = None):
        """Probe the model on a few tokens.

        Args:
            model: the transformers model.
            alignment: the LM's vocabulary in terms of the model's own.
            labels: what the reward is of the labels' logits; None: the model has one label.
        Raises:
            ModelError: the model has several labels and there is no choice among them, does not read
                embeddings as it reads tokens, or cannot be run at all.
            InputError: the alignment names tokens, or the choice labels, that the model does not have.
        """
        self.model = model = adapted_model(model)
        with probing(model, "cannot be read"):
            self._labels = (LabelChoice() if labels is None else labels).among(model, self.wrapper)
            refuse_unreadable_weights(model)
            self.own_table = embedding_table(model)
            self._token_map = alignment.token_map
            self.table = alignment.through(self.own_table)
            self._config = model.config.get_text_config()
            self.context: int | None = stated_context(self._config)
            self._readable = returning_names(model)
            self._whole = Forward(self._readable)
            self.scores_last = self._batches = False
            self._probe()

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def unread(self) -> str:
        """Why no reader can be used where ``scores_last`` is false."""
        return f"{self.name} does not score its last token's state"

    @property
    def device(self) -> torch.device:
        """Where inputs go and rewards come from."""
        return self.own_table.device

    @property
    def vocabulary(self) -> int:
        """V_r, the model's own."""
        return self.own_table.shape[0]

    def read(self, lm_ids: Sequence[int]) -> list[int]:
        """The model's own ids of a sequence of the LM's tokens."""
        return list(lm_ids) if self._token_map is None else self._token_map[list(lm_ids)].tolist()

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings [S, H_r] of the model's own token ids."""
        return self.own_table[self._ids(ids)]

    def score_embeddings(self, embeddings: Tensor) -> Tensor:
        """Rewards [1] of one sequence of input embeddings [1, S, H_r]; differentiable."""
        return self._labels.of(self._logits(inputs_embeds=embeddings))

    def reward(
        self,
        sequence: RewardSequence,
        embeddings: Tensor | None = None,
        memory: ScoreMemory | None = None,
    ) -> Tensor:
        """The reward [1] of one sequence.

        Args:
            embeddings: [S, H_r], what is read in place of the tokens; differentiable.
            memory: of this reward and problem, where it needs one.
        """
        if embeddings is None:
            return self.score([sequence.ids])
        return self.score_embeddings(embeddings[None])

    def scored_positions(self, sequence: RewardSequence, memory: ScoreMemory | None = None) -> list[int]:
        """The positions, ascending, whose states a reward is made of: the last.

        Args:
            memory: of this reward and problem; what it has is left out, where a reward has several.
        """
        return [len(sequence) - 1]

    def of_states(
        self,
        states: Sequence[Tensor],
        sequences: Sequence[RewardSequence] = (),
        positions: Sequence[Sequence[int]] = (),
        memories: Sequence[ScoreMemory] = (),
    ) -> Tensor:
        """Rewards [B] of B sequences from the states [n, H] at their ``scored_positions``.

        Args:
            sequences, positions, memories: of each, where something is remembered; none: without a memory.
        """
        return self._labels.of(head_logits(self._head, torch.cat(list(states))))

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards of token sequences, as one right-padded batch where the model allows.

        Args:
            sequences: B lists of the model's own token ids.
        Returns:
            [B] float32 (float64 for a float64 model) on the CPU.
        """
        if not self.scores_last:
            logits = [self._own_logits(self._whole, input_ids=self._ids(ids)[None]) for ids in sequences]
            return wide_on_cpu(self._labels.of(torch.cat(logits)))
        if len(sequences) > 1 and not self._batches:
            return torch.cat([self.score([ids]) for ids in sequences])
        return wide_on_cpu(self._labels.of(self._head(self._last_states(sequences))))

    def _last_states(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """States [B, H] of the last tokens of sequences that are read as one right-padded batch."""
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        if bool((lengths == lengths[0]).all()):
            batch, mask = torch.stack([self._ids(ids) for ids in sequences]), None
        else:
            batch = pad_sequence([self._ids(ids) for ids in sequences], batch_first=True)
            mask = (torch.arange(batch.shape[1], device=self.device) < lengths[:, None]).long()
        hidden = self._under.states(input_ids=batch, attention_mask=mask, use_cache=False)
        return hidden[torch.arange(len(sequences), device=self.device), lengths - 1]

    def probe_gradient(self) -> None:
        """See to it that gradients reach the embeddings.

        Raises:
            ModelError: none does, or another one than small differences tell.
        """
        with probing(self.model, "gives no gradient"):
            probe_gradient(self.model, self.embed(self._probe_ids[1][:8])[None], self._score_each)

    def _score_each(self, embeddings: Tensor) -> Tensor:
        """Rewards [B] of embeddings [B, S, H_r]."""
        # Slices, not a split: some models scale in place what they are given, which a split forbids.
        return torch.cat([self.score_embeddings(embeddings[n : n + 1]) for n in range(len(embeddings))])

    @functools.cached_property
    def _under(self) -> Forward:
        return Forward(backbone(self._readable))

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self.device)

    @functools.cached_property
    def _probe_ids(self) -> tuple[list[int], list[int]]:
        """A short sequence and a long one."""
        count = probe_length(self._config)
        lengths = min(5, max(1, count // 2)), count
        short, long = (probe_ids(self.model, n, seed) for seed, n in enumerate(lengths))
        return short, long

    @property
    def _head(self) -> nn.Module:
        """What makes logits of states."""
        return self._head_of(self.model)

    @staticmethod
    def _head_of(model: nn.Module) -> nn.Module | None:
        return getattr(model, "score", None)

    def _logits(self, **tokens: Tensor) -> Tensor:
        """Logits that rewards are made of, of one sequence: [1, labels]."""
        if self.scores_last:
            return self._head(self._scored(self._under.states(use_cache=False, **tokens)))
        return self._own_logits(self._whole, **tokens)

    def _scored(self, states: Tensor) -> Tensor:
        """Those of the states [1, S, H] of one sequence that have logits: the last, [1, H]."""
        return states[:, -1]

    def _own_logits(self, whole: Forward, **tokens: Tensor) -> Tensor:
        """Logits [1, labels] of one sequence by the model's own forward.

        Args:
            tokens: ``input_ids`` [1, S] or ``inputs_embeds`` [1, S, H_r].
        """
        (given,) = tokens.values()
        mask = torch.ones(given.shape[:2], dtype=torch.int64, device=given.device)
        logits = whole.logits(attention_mask=mask, **tokens)
        if logits.shape != (1, self._labels.count):
            wanted = "one" if self._labels.count == 1 else f"{self._labels.count}"
            hint = " (a score a token is for ProcessReward)" if logits.dim() == 3 else ""
            raise ModelError(
                f"{self.name} gives scores {list(logits.shape)} for one sequence, not {wanted}{hint}"
            )
        return logits

    @torch.no_grad()
    def _probe(self) -> None:
        name, dtype = type(self.model).__name__, self.own_table.dtype
        short, long = self._probe_ids
        ids = self._ids(long)[None]
        # Before any replica, as some models prepare their weights in the first pass.
        own = [self._own_logits(self._whole, input_ids=self._ids(part)[None]) for part in (short, long)]
        # Logits of all labels are compared: in their sums rounding may be all that is left.
        theirs = torch.cat(own)
        if not theirs.isfinite().all():
            raise ModelError(f"{name} gives a reward that is not finite")
        copied = replica(self._readable)
        # The ids hold none, and transformers logs that it would not see it among embeddings.
        for config in configs_of(copied):
            with suppress(Exception):  # some insist on a number, and say so
                config.pad_token_id = None
        whole = Forward(copied)
        with TableLookups() as lookups:
            self._own_logits(whole, input_ids=ids)
            read = self._own_logits(whole, inputs_embeds=self.own_table[ids])
        self._probe_pooling(copied, theirs)
        first = self._logits(inputs_embeds=self.embed(short)[None])
        if not close(torch.cat([first, read]), theirs, dtype):
            raise ModelError(f"{name} does not read input embeddings the way it reads tokens")
        lookups.refuse_second_table(self.model, ids[0])
        self.context = lookups.context(ids.shape[1]) or self.context
        # No token's embedding, such as a mix of several is.
        longest = self.own_table[ids]
        mixed = self._logits(inputs_embeds=longest.lerp(longest.flip(1), 0.3))
        if not mixed.isfinite().all():
            raise ModelError(f"{name} reads no mixes of input embeddings")

    def _probe_pooling(self, copied: nn.Module, theirs: Tensor) -> None:
        """Whether rewards are scores of last states, and whether ragged batches may be padded."""
        if not isinstance(self._head, nn.Module) or self.model.base_model is self.model:
            return
        for batches in (True, False):
            self.scores_last, self._batches = True, batches
            if self._is_pooled(copied, theirs):
                return
        self.scores_last = self._batches = False

    def _is_pooled(self, copied: nn.Module, theirs: Tensor) -> bool:
        """Whether the scores of last states are the model's own rewards, also where they are large."""
        ids, dtype = self._probe_ids[1], self.own_table.dtype
        try:
            if not close(self._pooled_probes(), theirs, dtype):
                return False
            hidden = self._under.states(input_ids=self._ids(ids)[None], use_cache=False)
            largest = float(self._head(self._scored(hidden)).abs().amax())
            states = hidden * (_LARGE / max(largest, 1e-30))
            if not states.isfinite().all():  # a head that scores everything 0
                return True
            for large in (states, -states):
                score = with_states(
                    backbone(copied),
                    self._head_of(copied),
                    large,
                    lambda: self._own_logits(Forward(copied), input_ids=self._ids(ids)[None]),
                )
                if score is None or not close(self._head(self._scored(large)), score, dtype):
                    return False
            return True
        except Exception:  # whatever stands in the way: the model's own forward is left
            return False

    def _pooled_probes(self) -> Tensor:
        """Logits [n, labels] of both probes, read as a batch is, or one by one."""
        batches = [self._probe_ids] if self._batches else [[ids] for ids in self._probe_ids]
        return torch.cat([self._head(self._last_states(batch)) for batch in batches])


def wide_on_cpu(rewards: Tensor) -> Tensor:
    """Rewards as float32, or as the float64 that they are."""
    return rewards.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32).cpu()
