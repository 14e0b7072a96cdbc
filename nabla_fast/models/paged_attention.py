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
from nabla_fast.ops.store_keys_values import store_keys_values

IMPLEMENTATION = "nabla_paged"

# Arguments that models pass to an attention function and that do not change its result.
_HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}


@dataclass
class PagedPass:
    """One pass over suffixes of paged prefixes, as the attention of every layer needs it."""

    pool: BlockPool
    tables: Tensor  # [B, M] int64
    lengths: Tensor  # [B] int64, of the prefixes
    slots: Tensor | None  # [B, S] int64, where the suffixes' keys and values are put; None: nowhere
    backend: Callable[..., Attention] | None = None  # of the op, chosen in the layer that asks first
    store: Callable[..., Tensor] | None = None  # of store_keys_values, likewise
    calls: int = 0  # of attention, by all layers

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[B, Hq, S, D] of q [B, Hq, S, D] over the prefixes and k, v [B, Hkv, S, D]; stores k and v.

        Other arguments are those of :func:`nabla_fast.ops.prefix_attention`.
        """
        pool = self.pool
        arguments = (q, k, v, pool.keys[layer], pool.values[layer], self.tables, self.lengths)
        options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        if q.requires_grad and torch.is_grad_enabled():
            output, _ = prefix_attention(*arguments, **options)
        else:
            if self.backend is None:
                self.backend = prefix_attention.chosen(*arguments, **options)
            output, _ = self.backend(*arguments, **options)
        if self.slots is not None:
            stored = (k, v, pool.keys[layer], pool.values[layer], self.slots)
            if self.store is None:
                self.store = store_keys_values.chosen(*stored)
            self.store(*stored)
        return output


def expect_own_cap(model: nn.Module) -> None:
    """Expect a model whose attention scores are capped to cap them where it runs by itself too.

    Raises:
        ModelError: it runs transformers' ``sdpa``, which leaves the cap out without a word.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None and "sdpa" in (config._attn_implementation or ""):
        raise ModelError(
            f"{type(model).__name__} caps attention scores at {cap}, and its attention "
            f"{config._attn_implementation!r} leaves the cap out: load it with attn_implementation='eager'"
        )


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    Args:
        softcap: of Gemma 2's scores.
        s_aux: [Hq], gpt-oss's sinks.
    """
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise ModelError(
            f"{type(module).__name__} needs {', '.join(unknown)}, which paged attention does not have"
        )
    paged = _under_way.get()
    paged.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = paged.attend(
        module.layer_idx, query, key, value, scale, sliding_window, softcap=softcap, sinks=s_aux
    )
    return output.transpose(1, 2), None


# Without a mask function of its own, transformers would cut the keys to the suffix without a word.
AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
