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
from nabla_fast.models.boundary import probing, refuse_unreadable_weights
from nabla_fast.models.context import TableLookups, stated_context
from nabla_fast.models.probes import close, probe_gradient, probe_ids, probe_length, with_states
from nabla_fast.models.replica import configs_of, replica, returning_names
from nabla_fast.models.tables import embedding_table

# The largest score of a probe, as a bound put on scores leaves small ones as they are.
_LARGE = 100.0


class RewardModel:
    """Any transformers sequence classifier with one label.

    Models that score the last token's hidden state (the decoder-only ones) are pooled here, which
    makes ragged batches right; any other runs through its own forward, one sequence at a time.

    Attributes:
        model: the transformers model.
        table: input embeddings R [V, H_r], read through the LM's vocabulary: what the model reads for
            token v of the LM.
        own_table: input embeddings [V_r, H_r] of the model's own tokens.
        context: most tokens the model reads, or None if it does not say.
        scores_last: whether a reward is the score head of the last token's hidden state.
    """

    def __init__(self, model: nn.Module, alignment: VocabularyAlignment):
        """Probe the model on a few tokens.

        Args:
            model: the transformers model.
            alignment: the LM's vocabulary in terms of the model's own.
        Raises:
            ModelError: the model has several labels, does not read embeddings as it reads tokens, or
                cannot be run at all.
            InputError: the alignment names tokens that the model does not have.
        """
        self.model = model
        with probing(model, "cannot be read"):
            labels = getattr(model.config, "num_labels", None)
            if labels != 1:
                raise ModelError(
                    f"{type(model).__name__} has {labels} labels; a reward model has one (num_labels=1)"
                )
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
        if self.scores_last:
            hidden = self._under.states(inputs_embeds=embeddings, use_cache=False)
            return self.model.score(hidden[:, -1])[:, 0]
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
        return self._whole.logits(inputs_embeds=embeddings, attention_mask=mask)[:, 0]

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards of token sequences, as one right-padded batch where the model allows.

        Args:
            sequences: B lists of the model's own token ids.
        Returns:
            [B] float32 (float64 for a float64 model) on the CPU.
        """
        if not self.scores_last:
            return _wide(torch.cat([self._own_score(self._whole, ids) for ids in sequences]))
        if len(sequences) > 1 and not self._batches:
            return torch.cat([self.score([ids]) for ids in sequences])
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        if bool((lengths == lengths[0]).all()):
            batch, mask = torch.stack([self._ids(ids) for ids in sequences]), None
        else:
            batch = pad_sequence([self._ids(ids) for ids in sequences], batch_first=True)
            mask = (torch.arange(batch.shape[1], device=self.device) < lengths[:, None]).long()
        hidden = self._under.states(input_ids=batch, attention_mask=mask, use_cache=False)
        last = hidden[torch.arange(len(sequences), device=self.device), lengths - 1]
        return _wide(self.model.score(last)[:, 0])

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

    @torch.no_grad()
    def _probe(self) -> None:
        name, dtype = type(self.model).__name__, self.own_table.dtype
        short, long = self._probe_ids
        ids = self._ids(long)[None]
        # Before any replica, as some models prepare their weights in the first pass.
        theirs = torch.cat([self._own_score(self._whole, part) for part in self._probe_ids])
        if not theirs.isfinite().all():
            raise ModelError(f"{name} gives a reward that is not finite")
        copied = replica(self._readable)
        # The ids hold none, and transformers logs that it would not see it among embeddings.
        for config in configs_of(copied):
            with suppress(Exception):  # some insist on a number, and say so
                config.pad_token_id = None
        whole, mask = Forward(copied), torch.ones_like(ids)
        with TableLookups() as lookups:
            whole.logits(input_ids=ids, attention_mask=mask)
            read = whole.logits(inputs_embeds=self.own_table[ids], attention_mask=mask)[0]
        self._probe_pooling(copied, theirs)
        read = torch.cat([self.score_embeddings(self.embed(short)[None]), read])
        if not close(read, theirs, dtype):
            raise ModelError(f"{name} does not read input embeddings the way it reads tokens")
        lookups.refuse_second_table(self.model, ids[0])
        self.context = lookups.context(ids.shape[1]) or self.context
        # No token's embedding, such as a mix of several is.
        longest = self.own_table[ids]
        if not self.score_embeddings(longest.lerp(longest.flip(1), 0.3)).isfinite().all():
            raise ModelError(f"{name} reads no mixes of input embeddings")

    def _own_score(self, whole: Forward, ids: Sequence[int]) -> Tensor:
        """[1], as the model's own forward scores one sequence."""
        batch = self._ids(ids)[None]
        logits = whole.logits(input_ids=batch, attention_mask=torch.ones_like(batch))
        if logits.shape != (1, 1):
            raise ModelError(
                f"{type(self.model).__name__} gives scores {list(logits.shape)} for one sequence, not one"
            )
        return logits[0]

    def _probe_pooling(self, copied: nn.Module, theirs: Tensor) -> None:
        """Whether rewards are scores of last states, and whether ragged batches may be padded."""
        pooled = isinstance(getattr(self.model, "score", None), nn.Module)
        if not pooled or self.model.base_model is self.model:
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
            if not close(self.score(self._probe_ids), _wide(theirs), dtype):
                return False
            hidden = self._under.states(input_ids=self._ids(ids)[None], use_cache=False)
            largest = float(self.model.score(hidden[:, -1]).abs().amax())
            states = hidden * (_LARGE / max(largest, 1e-30))
            if not states.isfinite().all():  # a head that scores everything 0
                return True
            for large in (states, -states):
                score = with_states(
                    backbone(copied), copied.score, large, lambda: self._own_score(Forward(copied), ids)
                )
                if score is None or not close(self.model.score(large[:, -1])[:, 0], score, dtype):
                    return False
            return True
        except Exception:  # whatever stands in the way: the model's own forward is left
            return False


def _wide(rewards: Tensor) -> Tensor:
    return rewards.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32).cpu()
