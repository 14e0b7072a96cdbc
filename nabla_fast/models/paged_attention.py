"""Attention over a paged prefix as transformers' models call it, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nabla_fast.errors import ModelError
from nabla_fast.models.paged_kv import BlockPool
from nabla_fast.ops.prefix_attention import Attention, prefix_attention

IMPLEMENTATION = "nabla_paged"

# Arguments that models pass to an attention function and that do not change its result.
_HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}


@dataclass
class PagedPass:
    """One pass over suffixes of paged prefixes, as the attention of every layer needs it."""

    pool: BlockPool
    tables: Tensor  # [B, M] int64
    lengths: Tensor  # [B] int64, of the prefixes
    slots: Tensor | None  # [T] int64, where the suffixes' keys and values are put; None: nowhere
    tokens: Tensor | None  # [2, T] row and position of each of these in the batch; None: no padding
    backend: Callable[..., Attention] | None = None  # of the op, chosen in the layer that asks first
    calls: int = 0  # of attention, by all layers

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """[B, Hq, S, D] of q [B, Hq, S, D] over the prefixes and k, v [B, Hkv, S, D]; stores k and v."""
        pool = self.pool
        arguments = (q, k, v, pool.keys[layer], pool.values[layer], self.tables, self.lengths)
        if q.requires_grad and torch.is_grad_enabled():
            output, _ = prefix_attention(*arguments, scale=scale, window=window)
        else:
            if self.backend is None:
                self.backend = prefix_attention.chosen(*arguments, scale=scale, window=window)
            output, _ = self.backend(*arguments, scale=scale, window=window)
        if self.slots is not None:
            pool.write(layer, self.slots, self._tokens_of(k), self._tokens_of(v))
        return output

    def _tokens_of(self, x: Tensor) -> Tensor:
        """[T, Hkv, D] of [B, Hkv, S, D], padding left out."""
        if self.tokens is None:
            return x.transpose(1, 2).flatten(0, 1)
        row, position = self.tokens
        return x[row, :, position]


# What the attention of the pass under way in this thread reads: not every model hands arguments of its own
# down to its layers.
_under_way: ContextVar[PagedPass] = ContextVar("paged pass")


@contextmanager
def reading(paged: PagedPass) -> Iterator[None]:
    """Attention by ``IMPLEMENTATION`` reads this pass inside."""
    token = _under_way.set(paged)
    try:
        yield
    finally:
        _under_way.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer."""
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise ModelError(
            f"{type(module).__name__} needs {', '.join(unknown)}, which paged attention does not have"
        )
    paged = _under_way.get()
    paged.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = paged.attend(module.layer_idx, query, key, value, scale, sliding_window)
    return output.transpose(1, 2), None


# Without a mask function of its own, transformers would cut the keys to the suffix without a word.
AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
