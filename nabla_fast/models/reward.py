"""A reward model as the decode loop sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nabla_fast.errors import ModelError
from nabla_fast.models.alignment import VocabularyAlignment
from nabla_fast.models.tables import embedding_table


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
        """Probe the model once on four tokens.

        Args:
            model: the transformers model.
            alignment: the LM's vocabulary in terms of the model's own.
        Raises:
            ModelError: the model has several labels, or does not read embeddings as it reads tokens.
            InputError: the alignment names tokens that the model does not have.
        """
        labels = getattr(model.config, "num_labels", None)
        if labels != 1:
            raise ModelError(
                f"{type(model).__name__} has {labels} labels; a reward model has one (num_labels=1)"
            )
        self.model = model
        self.own_table = embedding_table(model)
        self._token_map = alignment.token_map
        self.table = alignment.through(self.own_table)
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._backbone = getattr(model, "base_model", model)
        self.scores_last = False
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
            hidden = self._backbone(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            return self.model.score(hidden[:, -1])[:, 0]
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
        return self.model(inputs_embeds=embeddings, attention_mask=mask).logits[:, 0]

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards of token sequences, as one right-padded batch where the model allows.

        Args:
            sequences: B lists of the model's own token ids.
        Returns:
            [B] float32 (float64 for a float64 model) on the CPU.
        """
        if not self.scores_last:
            rewards = [self.score_embeddings(self.embed(ids)[None]) for ids in sequences]
            return _wide(torch.cat(rewards))
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        if bool((lengths == lengths[0]).all()):
            batch, mask = torch.stack([self._ids(ids) for ids in sequences]), None
        else:
            batch = pad_sequence([self._ids(ids) for ids in sequences], batch_first=True)
            mask = (torch.arange(batch.shape[1], device=self.device) < lengths[:, None]).long()
        hidden = self._backbone(input_ids=batch, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(sequences), device=self.device), lengths - 1]
        return _wide(self.model.score(last)[:, 0])

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def _probe(self) -> None:
        name = type(self.model).__name__
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        ids = [v % self.vocabulary for v in range(1, 6) if v % self.vocabulary != pad]
        mask = torch.ones(1, len(ids), dtype=torch.int64, device=self.device)
        logits = self.model(input_ids=self._ids(ids)[None], attention_mask=mask).logits
        if logits.shape != (1, 1):
            raise ModelError(f"{name} gives scores {list(logits.shape)} for one sequence, not one")
        theirs = float(logits)
        if not math.isfinite(theirs):
            raise ModelError(f"{name} gives a reward that is not finite")
        if hasattr(self.model, "score") and self._backbone is not self.model:
            self.scores_last = True
            self.scores_last = self._close(float(self.score([ids])[0]), theirs)
        if not self._close(float(self.score_embeddings(self.embed(ids)[None])[0]), theirs):
            raise ModelError(f"{name} does not read input embeddings the way it reads tokens")

    def _close(self, ours: float, theirs: float) -> bool:
        wide = self.own_table.dtype in (torch.float32, torch.float64)
        return abs(ours - theirs) <= (1e-3 if wide else 5e-2) * max(0.01 if wide else 0.1, abs(theirs))


def _wide(rewards: Tensor) -> Tensor:
    return rewards.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32).cpu()
