"""A causal language model as the decode loop sees it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError
from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.boundary import adapted_model, probing, refuse_unreadable_weights
from nabla_fast.models.context import TableLookups, stated_context
from nabla_fast.models.generation import eos_ids
from nabla_fast.models.head_probe import found_map
from nabla_fast.models.prefix_reading import PrefixReading, Way, WholeReading, fastest_way
from nabla_fast.models.probes import close, probe_gradient, probe_ids, probe_length, with_states
from nabla_fast.models.replica import replica, returning_names
from nabla_fast.models.rotary import switching_length
from nabla_fast.models.tables import embedding_table, output_head

# The largest logit of a probe: a cap far above it is none.
_LARGE = 1000.0


class LanguageModel:
    """Any transformers causal LM whose logits are c·tanh(s·(W h + b)/c) of its last hidden state h.

    Attributes:
        model: the transformers model; of a PEFT model the one that its adapters are in.
        table: input embeddings E [V, H].
        head: what makes logits of hidden states.
        eos_ids: tokens that end a response.
        context: most tokens the model reads, or None if it does not say.
    """

    def __init__(self, model: nn.Module):
        """Probe the model on a few tokens.

        Raises:
            ModelError: its logits are nothing of that form, its table and head differ in size, it does
                not read embeddings as it reads tokens, or it cannot be run at all.
        """
        self.model = model = adapted_model(model)
        with probing(model, "cannot be read"):
            self._read_tables()
            self._probe()

    def _read_tables(self) -> None:
        model, name = self.model, type(self.model).__name__
        refuse_unreadable_weights(model)
        self._config = config = model.config.get_text_config()
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{name} is no causal language model")
        self.table = embedding_table(model)
        self.head = output_head(model)
        self.context: int | None = stated_context(config)
        self.eos_ids = eos_ids(model)
        self._readable = returning_names(model)
        self._forward, self._whole = Forward(backbone(self._readable)), Forward(self._readable)
        if self.table.shape[0] != self.head.vocabulary:
            raise ModelError(
                f"{name} reads {self.table.shape[0]} tokens but writes {self.head.vocabulary}: "
                "the two vocabularies must be one"
            )

    @property
    def device(self) -> torch.device:
        """Where inputs go and hidden states come from."""
        return self.table.device

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.vocabulary

    @property
    def reads_cached(self) -> bool:
        """Whether a cache gives the states of one pass; without, every token reads all before it again."""
        return self._way is not WholeReading

    def prefix_reading(self) -> PrefixReading:
        """A reading of one sequence after another by the fastest way that is right for the model."""
        return self._way(self._readable)

    @functools.cached_property
    def _way(self) -> Way:
        with probing(self.model, "cannot be read in pieces"):
            return fastest_way(self._readable, *self._probe_ids)

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
        Raises:
            ModelError: there is a cache, and the model takes none.
        """
        if cache is not None and self._forward.cache_name is None:
            raise ModelError(f"{type(self.model).__name__} takes no cache")
        return self._forward.states(
            input_ids=ids,
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **({} if cache is None else {self._forward.cache_name: cache}),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (or float64) logits [N, V] of hidden states [N, H]."""
        return self.head.logits(hidden)

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """Token ids as [1, S] on the model's device."""
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.device)

    def probe_gradient(self) -> None:
        """See to it that gradients reach the embeddings.

        Raises:
            ModelError: none does, or another one than small differences tell.
        """
        with probing(self.model, "gives no gradient"):
            ids = self._probe_ids[0][:8]
            probe_gradient(self.model, self.table[self.tensor(ids)], lambda e: self.hidden(embeddings=e))

    @functools.cached_property
    def _probe_ids(self) -> tuple[list[int], list[int]]:
        # Where frequencies follow the length of a text, so do the states of its first tokens.
        count = min(probe_length(self._config), switching_length(self.model) or sys.maxsize)
        return probe_ids(self.model, count), probe_ids(self.model, count, seed=1)

    @torch.no_grad()
    def _probe(self) -> None:
        name, dtype = type(self.model).__name__, self.head.dtype
        ids = self.tensor(self._probe_ids[0])
        # Before any replica, as some models prepare their weights in the first pass.
        theirs = self._whole.logits(input_ids=ids, use_cache=False)[0]
        if not theirs.isfinite().all():
            raise ModelError(f"{name} gives logits that are not finite")
        copied = replica(self._readable)
        forward = Forward(backbone(copied))
        with TableLookups() as lookups:
            hidden = forward.states(input_ids=ids, use_cache=False)[0]
            read = forward.states(inputs_embeds=self.table[ids], use_cache=False)[0]
        self._probe_head(copied, ids, hidden, theirs)
        if not close(read, hidden, dtype):
            raise ModelError(f"{name} does not read input embeddings the way it reads tokens")
        lookups.refuse_second_table(self.model, ids[0])
        self.context = lookups.context(ids.shape[1]) or self.context
        # No token's embedding, such as a mix of several is.
        between = self.table[ids].lerp(self.table[self.tensor(self._probe_ids[1])], 0.3)
        if not self.hidden(embeddings=between).isfinite().all():
            raise ModelError(f"{name} reads no mixes of input embeddings")
        half = ids.shape[1] // 2
        if not close(self.hidden(ids[:, :half])[0], hidden[:half], dtype):
            raise ModelError(f"{name} is not causal: states depend on the tokens after them")

    def _probe_head(self, copied: nn.Module, ids: Tensor, hidden: Tensor, theirs: Tensor) -> None:
        """Find what is done to W h, on logits as they are and on large ones, where a cap shows."""
        name, forward = type(self.model).__name__, Forward(copied)
        if hidden.shape[-1] != self.head.width:
            raise ModelError(
                f"{name}: its output head reads {self.head.width} numbers, its last hidden state has "
                f"{hidden.shape[-1]}"
            )

        def logits_of(states: Tensor) -> Tensor | None:
            return with_states(
                backbone(copied),
                copied.get_output_embeddings(),
                states[None],
                lambda: forward.logits(input_ids=ids, use_cache=False)[0],
            )

        head_map = found_map(self.head, self._config, hidden, theirs, logits_of)
        if head_map is None:
            raise ModelError(
                f"{name}: logits are not its output head times the last hidden state, "
                "nor that with a scale or a soft cap of its config"
            )
        self.head = self.head.with_map(head_map)
