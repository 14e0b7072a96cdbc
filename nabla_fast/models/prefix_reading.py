"""Ways of reading a sequence after a prefix that has been read before, probed before they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.probes import close, looking_far
from nabla_fast.models.rotary import switching_length


class PrefixReading(Protocol):
    """Reads sequences that have much in common with the one read before."""

    def last_state(self, sequence: Sequence[int]) -> tuple[Tensor, int]:
        """The hidden state [1, H] after a sequence's last token, and how many tokens were read for it."""
        ...


# Makes a reading, which has read nothing as yet, of a causal language model.
Way = Callable[[nn.Module], PrefixReading]


class WholeReading:
    """Reads everything each time."""

    def __init__(self, model: nn.Module):
        self._forward = Forward(backbone(model))
        self._device = model.get_input_embeddings().weight.device

    def last_state(self, sequence: Sequence[int]) -> tuple[Tensor, int]:
        """As of :class:`PrefixReading`."""
        ids = torch.tensor([list(sequence)], dtype=torch.int64, device=self._device)
        return self._forward.states(input_ids=ids, use_cache=False)[0, -1:], len(sequence)


class CachedReading:
    """Reads after what a transformers cache holds.

    Args:
        model: a causal language model.
        positions: tell the model where the tokens stand; else it counts by itself.
        crop: cut the cache back to what two sequences have in common. Without, a cache goes on by one token
            at a time, and is started anew for anything else.
    """

    def __init__(self, model: nn.Module, *, positions: bool, crop: bool):
        self._forward = Forward(backbone(model))
        if self._forward.cache_name is None:
            raise TypeError("the forward takes no cache")
        if positions and not self._forward.takes("position_ids"):
            raise TypeError("the forward takes no positions")
        self._config, self._positions, self._crop = model.config, positions, crop
        self._device = model.get_input_embeddings().weight.device
        self._switch = switching_length(model)
        self._cache: DynamicCache | None = None
        self._read: list[int] = []

    def last_state(self, sequence: Sequence[int]) -> tuple[Tensor, int]:
        """As of :class:`PrefixReading`."""
        sequence = list(sequence)
        start = self._rewind(sequence)
        unread = torch.tensor([sequence[start:]], dtype=torch.int64, device=self._device)
        # Until the pass is through, nobody knows what the cache holds.
        cache, self._cache = self._cache, None
        arguments: dict[str, Any] = {self._forward.cache_name: cache}
        if self._positions:
            arguments["position_ids"] = torch.arange(start, len(sequence), device=self._device)[None]
        state = self._forward.states(input_ids=unread, use_cache=True, **arguments)[0, -1:]
        self._cache, self._read = cache, sequence
        return state, len(sequence) - start

    def _rewind(self, sequence: list[int]) -> int:
        """Cut the cache back to what it shares with a sequence, one token short of it; how many that is."""
        read = self._read
        shared = len(read)
        if len(sequence) <= shared or sequence[:shared] != read:
            most = min(shared, len(sequence) - 1)
            shared = next((n for n in range(most) if read[n] != sequence[n]), most)
        if self._cache is None or not self._can_go_on(shared, len(sequence)):
            self._cache = DynamicCache(config=self._config)
            return 0
        if shared < len(read):
            self._cache.crop(shared - len(read))
        return shared

    def _can_go_on(self, shared: int, length: int) -> bool:
        before = len(self._read)
        # Keys that were rotated with other frequencies are of no use.
        if self._switch is not None and (before > self._switch) != (length > self._switch):
            return False
        if not self._crop:
            return shared == before and length == shared + 1
        return shared == before or all(map(_croppable, self._cache.layers))


def _croppable(layer: Any) -> bool:
    """Whether a cache layer can be cut back; recurrent states and full windows cannot."""
    if not isinstance(layer, DynamicLayer) or hasattr(layer, "conv_states"):
        return False
    window = getattr(layer, "sliding_window", None)
    return window is None or layer.get_seq_length() < window


# From the fastest on. The first one that reads as one pass over everything does is used.
WAYS: tuple[Way, ...] = (
    partial(CachedReading, positions=True, crop=True),
    partial(CachedReading, positions=False, crop=True),
    partial(CachedReading, positions=True, crop=False),
    partial(CachedReading, positions=False, crop=False),
)


@torch.no_grad()
def fastest_way(model: nn.Module, ids: Sequence[int], others: Sequence[int]) -> Way:
    """The first of the ways that reads what a pass over everything reads, else :class:`WholeReading`.

    Args:
        model: a causal language model, which has been run before.
        ids, others: two sequences of as many tokens, to read pieces of.
    """
    # Beyond the model's windows too, as a cache drops there what attention does not see.
    probed = looking_far(model, len(ids))
    try:
        return _fastest(probed, ids, others)
    except Exception:
        if probed is model:
            return WholeReading
    return _fastest(model, ids, others)


def _fastest(probed: nn.Module, ids: Sequence[int], others: Sequence[int]) -> Way:
    count = len(ids)
    early, middle = max(1, count // 8), count // 2
    forked = [*ids[:early], *others[early:]]
    late = [*ids[:middle], *others[middle:]]
    whole = [list(ids), forked, late]
    # Read, go on by one, cut back, cut back far, go on by one, go on by several, cut back a little.
    pieces = [(0, early), (0, early + 1), (1, middle), (0, middle + 1), (0, middle + 2)]
    pieces += [(0, min(count, middle + 5)), (2, count)]
    rows = torch.tensor(whole, device=probed.get_input_embeddings().weight.device)
    states = Forward(backbone(probed)).states(input_ids=rows, use_cache=False)
    expected = torch.cat([states[row, length - 1 : length] for row, length in pieces])
    sequences = [whole[row][:length] for row, length in pieces]
    for way in WAYS:
        if _agrees(way, probed, sequences, expected):
            return way
    return WholeReading


def _agrees(way: Way, model: nn.Module, sequences: Sequence[Sequence[int]], expected: Tensor) -> bool:
    try:
        reading = way(model)
        states = torch.cat([reading.last_state(sequence)[0] for sequence in sequences])
    except Exception:  # whatever a model says to a cache it does not take
        return False
    return close(states, expected, expected.dtype)
