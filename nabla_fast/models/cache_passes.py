"""Passes of a model behind a cache of its own kind, in one of several manners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.cache_layout import CacheLayout, each_layer

# Where models that take no transformers cache keep their states.
_OTHER_NAMES = ("state",)


def _whole_windows(config: Any) -> Any:
    """transformers' cache for a config, whose windows keep all keys: the mask hides those beyond."""
    cache = DynamicCache(config=config)
    for n, layer in enumerate(cache.layers):
        # No subclass, which may keep more than keys and values.
        if type(layer).__name__ == "DynamicSlidingWindowLayer":
            cache.layers[n] = DynamicLayer()
    return cache


def _as_configured(config: Any) -> Any:
    return DynamicCache(config=config)


@dataclass(frozen=True)
class Manner:
    """How a model reads behind its cache.

    Attributes:
        empty: makes an empty cache from a config; None: the model makes its own in the first pass.
        positions: tell the model where the tokens stand; else it counts by itself.
        several: read many tokens in one pass; else one after another.
        name: of the cache.
    """

    empty: Callable[[Any], Any] | None
    positions: bool
    several: bool
    name: str


# From the one on that reads most in one pass and can be cut back.
MANNERS = tuple(
    Manner(empty, positions, several, name)
    for several in (True, False)
    for empty, name in (
        (_whole_windows, "a DynamicCache"),
        (_as_configured, "a DynamicCache with windows"),
        (None, "its own cache"),
    )
    for positions in (True, False)
)


class CachePasses:
    """Passes of one model in one manner.

    Args:
        model: a transformers model with a backbone.
        manner: one of :data:`MANNERS`.
    Raises:
        TypeError: the model's forward does not take what the manner passes.
    """

    def __init__(self, model: nn.Module, manner: Manner):
        self._forward, self._config, self.manner = Forward(backbone(model)), model.config, manner
        names = (self._forward.cache_name, *_OTHER_NAMES)
        self._name = next((name for name in names if name and self._forward.names(name)), None)
        if self._name is None:
            raise TypeError("the forward takes no cache")
        if manner.positions and not self._forward.takes("position_ids"):
            raise TypeError("the forward takes no positions")
        self.masks = True  # whether to tell the model which columns of a cache are padding

    def read(
        self,
        cache: Any,
        starts: Sequence[int],
        lengths: Sequence[int] | None = None,
        *,
        ids: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """States [B, S, H] of tokens behind a cache, which is changed, and the cache with them.

        Gradients reach ``embeddings`` and stop at the cache.

        Args:
            cache: of B rows; None: none have been read.
            starts: tokens of each row in the cache; those of shorter rows have padding before them.
            lengths: tokens of each row to be read, if some are fewer; padding stands behind them.
            ids: [B, S] int64, or
            embeddings: [B, S, H].
        """
        given = ids if ids is not None else embeddings
        if cache is None and self.manner.empty is not None:
            cache = self.manner.empty(self._config)
        if embeddings is not None and embeddings.requires_grad:
            each_layer(cache, _put_new_states_in_place_of_old)
        steps = [slice(0, given.shape[1])]
        if max(starts) and not self.manner.several:
            steps = [slice(n, n + 1) for n in range(given.shape[1])]
        places = self._places(starts, lengths or [given.shape[1]] * len(starts), given)
        states = []
        for step in steps:
            part, cache = self._pass(
                cache,
                None if ids is None else ids[:, step],
                None if embeddings is None else embeddings[:, step],
                places,
                step,
            )
            states.append(part)
        return states[0] if len(states) == 1 else torch.cat(states, dim=1), cache

    def _places(
        self, starts: Sequence[int], lengths: Sequence[int], given: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Positions [B, S] of tokens, and a mask [B, P + S] of what is padding, None where none matters."""
        device, width = given.device, given.shape[1]
        before, count = (torch.tensor(list(n), device=device)[:, None] for n in (starts, lengths))
        offsets = torch.arange(width, device=device)
        # Padding stands where the last token does: some models have no position for what comes after.
        positions = before + torch.minimum(offsets, (count - 1).clamp(min=0))
        if len(set(starts)) == 1 or not self.masks:
            return positions, None
        longest = max(starts)
        columns = torch.arange(longest + width, device=device)
        mask = (columns >= longest - before) & (columns < longest + count)
        return positions, mask.long()

    def _pass(
        self,
        cache: Any,
        ids: Tensor | None,
        embeddings: Tensor | None,
        places: tuple[Tensor, Tensor | None],
        step: slice,
    ) -> tuple[Tensor, Any]:
        """One pass over the columns of ``step``."""
        arguments: dict[str, Any] = {self._name: cache}
        positions, mask = places
        if self.manner.positions:
            arguments["position_ids"] = positions[:, step]
        if mask is not None:
            arguments["attention_mask"] = mask[:, : mask.shape[1] - positions.shape[1] + step.stop]
        output = self._forward(input_ids=ids, inputs_embeds=embeddings, use_cache=True, **arguments)
        after = getattr(output, self._name, None)
        if after is None and cache is None:
            raise TypeError("the forward returns no cache")
        return output.last_hidden_state, cache if after is None else after

    @property
    def takes_mask(self) -> bool:
        """Whether it can be told which columns are padding."""
        return self._forward.takes("attention_mask")

    def layout(self, ids: Sequence[int], device: torch.device) -> CacheLayout:
        """The layout of the model's caches, from reading the first of these tokens.

        Raises:
            UnreadableCache: it is not one that is known.
        """
        few, many = max(1, len(ids) // 2), max(2, len(ids) // 2 + 1)
        row = torch.tensor(list(ids), dtype=torch.int64, device=device)
        sizes = ((2, few), (3, few), (2, many))
        examples = [
            self.read(None, [0] * rows, ids=row[:count].expand(rows, -1))[1] for rows, count in sizes
        ]
        return CacheLayout.seen(*examples, lengths=(few, many))


def _put_new_states_in_place_of_old(layer: Any) -> None:
    """Have a layer hold the tensor of a new state, not copy it into the old one, which a backward needs."""
    if not hasattr(layer, "recurrent_states"):
        return

    def update(states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        layer.recurrent_states[state_idx] = states
        layer.is_recurrent_states_initialized[state_idx] = True
        return states

    layer.update_recurrent_state = update
