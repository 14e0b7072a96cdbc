"""A causal language model as the decode loop sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError
from nabla_fast.models.tables import embedding_table, output_head
from nabla_fast.ops import lm_logits

# Config fields that change logits after the head: named in the refusal, so that one knows why.
_LOGIT_CHANGES = (
    "logit_scale",
    "logits_scaling",
    "output_multiplier_scale",
)


class LanguageModel:
    """Any transformers causal LM whose logits are a linear head on its last hidden state.

    Attributes:
        model: the transformers model.
        table: input embeddings E [V, H].
        head: output head W [V, H].
        eos_ids: tokens that end a response.
        context: most tokens the model reads, or None if it does not say.
    """

    def __init__(self, model: nn.Module):
        """Probe the model once on four tokens.

        Raises:
            ModelError: its logits are not head·hidden, its table and head differ in size, or it does
                not read embeddings as it reads tokens.
        """
        self.model = model
        self.table = embedding_table(model)
        self.head = output_head(model)
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.eos_ids = eos_ids(model)
        self._backbone = model.base_model
        name = type(model).__name__
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{name} is an encoder-decoder; a causal language model is needed")
        if self._backbone is model:
            raise ModelError(f"{name} does not expose a backbone under its output head")
        if self.table.shape[0] != self.head.shape[0]:
            raise ModelError(
                f"{name} reads {self.table.shape[0]} tokens but writes {self.head.shape[0]}: "
                "the two vocabularies must be one"
            )
        # Small logits pass through a soft cap almost unchanged, so a probe alone might not see it.
        if cap := getattr(config, "final_logit_softcapping", None):
            raise ModelError(
                f"{name} caps its logits (final_logit_softcapping={cap}), which is not supported"
            )
        self._probe(name, config)

    @property
    def device(self) -> torch.device:
        """Where inputs go and hidden states come from."""
        return self.table.device

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.shape[0]

    def hidden(
        self,
        ids: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        cache: Any = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            ids: [B, S] int64, or
            embeddings: [B, S, H].
            cache: transformers cache of P tokens before, which the pass extends; None for no cache.
            mask: [B, P + S] int64, 0 at padding; None where there is none.
            positions: [B, S] int64; None counts from P.
        Returns:
            [B, S, H].
        """
        output = self._backbone(
            input_ids=ids,
            inputs_embeds=embeddings,
            past_key_values=cache,
            use_cache=cache is not None,
            attention_mask=mask,
            position_ids=positions,
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (or float64) logits [N, V] of hidden states [N, H]."""
        return lm_logits(hidden, self.head)

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """Token ids as [1, S] on the model's device."""
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def _probe(self, name: str, config: Any) -> None:
        ids = self.tensor([v % self.vocabulary for v in (1, 2, 3, 5)])
        hidden = self.hidden(ids)[0]
        theirs = self.model(input_ids=ids, use_cache=False).logits[0].to(torch.float32)
        if not theirs.isfinite().all():
            raise ModelError(f"{name} gives logits that are not finite")
        if not _close(self.logits(hidden).to(torch.float32), theirs, self.head.dtype):
            fields = [
                f"{f}={v}" for f in _LOGIT_CHANGES if (v := getattr(config, f, None)) not in (None, 1.0)
            ]
            why = f" (its config has {', '.join(fields)})" if fields else ""
            raise ModelError(f"{name}: logits are not its output head times the last hidden state{why}")
        if not _close(self.hidden(embeddings=self.table[ids])[0], hidden, self.head.dtype):
            raise ModelError(f"{name} does not read input embeddings the way it reads tokens")


def _close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return bool(((ours - theirs).abs() <= tolerance * theirs.abs().amax().clamp(min=1e-3)).all())


def eos_ids(model: nn.Module) -> frozenset[int]:
    """Tokens that end a response, by the generation config or else the config."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
