"""Reading a suffix with a transformers decoder whose prefix lies in a block pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nabla_fast.errors import InputError, ModelError, one_line
from nabla_fast.models.llama_forward import LlamaForward
from nabla_fast.models.llama_layers import can_read
from nabla_fast.models.paged_attention import IMPLEMENTATION, PagedPass
from nabla_fast.models.paged_kv import BlockPool, PagedSequence, block_tables, extend_all

# transformers picks their frequencies by the largest position of all sequences in a pass.
_BATCH_DEPENDENT_ROTARY = {"longrope", "dynamic"}


class PagedReader:
    """Reads suffixes of frozen prefixes with the backbone of a transformers model.

    Args:
        model: a decoder-only model whose attention goes through transformers' AttentionInterface.
    """

    def __init__(self, model: nn.Module):
        """Probe the model once on four tokens.

        Raises:
            ModelError: its rotary embeddings depend on the other sequences of a batch, or its states
                after a paged prefix are not those of one pass over everything.
        """
        self._model = model
        self._backbone = model.base_model
        self._llama_forward: LlamaForward | None = None
        _refuse_batch_dependent_rotary(model)
        whole = self._probe(None)
        self.renew()
        if self._llama_forward is not None:
            self._probe(whole)

    def renew(self) -> None:
        """Read the weights again, which may have changed since the last call, as may the modules."""
        known = can_read(self._backbone)
        self._llama_forward = LlamaForward(self._backbone) if known else None

    def __getstate__(self) -> dict[str, Any]:
        """Without the flat forward, which holds addresses; the next :meth:`renew` makes another."""
        return {**self.__dict__, "_llama_forward": None}

    def pool(self, blocks: int, block_size: int = 16, limit: int | None = None) -> BlockPool:
        """A pool for this model's keys and values; arguments as of :class:`BlockPool`."""
        config = self._model.config.get_text_config()
        heads = config.num_attention_heads
        weight = self._model.get_input_embeddings().weight
        return BlockPool(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            blocks=blocks,
            block_size=block_size,
            limit=limit,
            dtype=weight.dtype,
            device=weight.device,
        )

    def read(
        self,
        sequences: Sequence[PagedSequence],
        lengths: Sequence[int],
        *,
        ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        store: bool = False,
    ) -> Tensor:
        """Final hidden states of suffixes that continue sequences of one pool.

        Gradients reach ``embeddings`` and stop at the prefixes.

        Args:
            sequences: B prefixes; none may stand twice if ``store``.
            lengths: tokens of each suffix; the rest of a row, on the right, is padding.
            ids: [B, S] int64, or
            embeddings: [B, S, H].
            store: put the suffixes' keys and values after the prefixes, which grow by them.
        Returns:
            [B, S, H]; rows of padding mean nothing.
        Raises:
            InputError: the sequences do not lie in one pool.
            PoolExhausted: the pool may not grow that far; no sequence has changed.
            ModelError: the model's attention needs something that paged attention does not have.
        """
        width = (ids if ids is not None else embeddings).shape[1]
        pool = sequences[0].pool
        strangers = [n for n, sequence in enumerate(sequences) if sequence.pool is not pool]
        if strangers:
            raise InputError(f"sequence {strangers[0]} lies in another pool than sequence 0")
        device = pool.keys.device
        before = torch.tensor([sequence.length for sequence in sequences], device=device)
        tables = block_tables(list(sequences), device)
        slots = tokens = None
        if store:
            slots = torch.tensor(
                [*chain(*extend_all(sequences, lengths))], dtype=torch.int64, device=device
            )
            if min(lengths) < width:
                places = [(b, s) for b, n in enumerate(lengths) for s in range(n)]
                tokens = torch.tensor(places, device=device).view(-1, 2).T
        paged = PagedPass(pool, tables, before, slots, tokens)
        positions = before[:, None] + torch.arange(width, device=device)
        if self._llama_forward is not None:
            end = width + max(sequence.length for sequence in sequences)
            return self._llama_forward(positions, end, paged, ids=ids, embeddings=embeddings)
        with _implementation(self._model, IMPLEMENTATION):
            output = self._backbone(
                input_ids=ids,
                inputs_embeds=embeddings,
                position_ids=positions,
                use_cache=False,
                paged=paged,
            )
        return output.last_hidden_state

    @torch.no_grad()
    def _probe(self, whole: Tensor | None) -> Tensor:
        """Compare what is read in pieces with what is read at once, and return this."""
        name = type(self._model).__name__
        table = self._model.get_input_embeddings().weight
        ids = torch.tensor([[v % table.shape[0] for v in (1, 2, 3, 5)]], device=table.device)
        if whole is None:
            whole = self._backbone(input_ids=ids, use_cache=False).last_hidden_state
        try:
            sequence = self.pool(blocks=2, block_size=2).sequence()
            pieces = [self.read([sequence], [2], ids=part, store=True) for part in ids.split(2, dim=1)]
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{name} cannot read from a paged prefix: {one_line(error)}") from error
        tolerance = 1e-4 if table.dtype in (torch.float32, torch.float64) else 5e-2
        difference = (torch.cat(pieces, dim=1) - whole).abs().amax()
        if not difference <= tolerance * whole.abs().amax():
            raise ModelError(f"{name} reads something else after a paged prefix than in one pass")
        return whole


def _refuse_batch_dependent_rotary(model: nn.Module) -> None:
    """Raise ModelError for rotary embeddings whose frequencies follow the largest position of a batch."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in _BATCH_DEPENDENT_ROTARY:
                raise ModelError(
                    f"{type(model).__name__} has rotary embeddings of type {kind!r}, whose frequencies "
                    "depend on the longest sequence of a batch"
                )


@contextmanager
def _implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Attention by ``name`` inside; the model's own afterwards."""
    config = model.config.get_text_config()
    former = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = former
