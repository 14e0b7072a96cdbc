"""The ways of reading a suffix behind a prefix, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from nabla_fast.errors import ModelError, one_line
from nabla_fast.models.cache_reader import CacheReader
from nabla_fast.models.cache_sequences import CachedSequence, CachePool
from nabla_fast.models.paged_attention import expect_own_cap
from nabla_fast.models.paged_kv import BlockPool, PagedSequence
from nabla_fast.models.reader import PagedReader
from nabla_fast.models.reward_terms import Reward
from nabla_fast.models.rotary import expect_fixed_frequencies
from nabla_fast.models.whole_reader import OwnForward, WholeReader

FrozenSequence = PagedSequence | CachedSequence


class SuffixReader(Protocol):
    """Reads suffixes of sequences whose beginnings have been read before.

    Attributes:
        way: how it reads, in words.
        cuts_back: whether sequences can be cut back to any length; else they may become shorter than asked.
        frozen_gradients: whether gradients behind a prefix are right; else the prefix is read anew.
        dtype: of the states that it computes; embeddings of this dtype get a gradient that is not rounded.
    """

    way: str
    cuts_back: bool
    frozen_gradients: bool
    dtype: torch.dtype

    def renew(self) -> None:
        """Read the weights and modules again, which may have changed."""
        ...

    def pool(self, blocks: int, block_size: int = 16, limit: int | None = None) -> BlockPool | CachePool:
        """Where its sequences come from."""
        ...

    def read(
        self,
        sequences: Sequence[FrozenSequence],
        lengths: Sequence[int],
        *,
        ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        store: bool = False,
    ) -> Tensor:
        """Final hidden states [B, S, H] of suffixes, as :meth:`PagedReader.read`."""
        ...


def suffix_reader(model: nn.Module) -> SuffixReader:
    """The fastest reader that is right for a model, by probing.

    From the fastest on: a prefix in a block pool, a cache of the model's own kind, and everything read
    anew. Another model beside it does not matter.

    Raises:
        ModelError: none is: what the model reads depends on the longest sequence of a batch, on the others
            of a batch, or is something else than its weights say.
    """
    expect_fixed_frequencies(model)
    expect_own_cap(model)
    reasons = []
    for kind in (PagedReader, CacheReader, WholeReader):
        try:
            return kind(model)
        except ModelError as error:
            reasons.append(error)
    raise reasons[-1] from reasons[0]


def reward_reader(rm: Reward) -> SuffixReader | OwnForward:
    """The fastest reader that is right for a reward; its own forward where none is."""
    if rm.way is not None:
        return OwnForward(None, rm.way)
    if not rm.scores_last:
        return OwnForward(rm.unread)
    try:
        return suffix_reader(rm.model)
    except ModelError as error:
        return OwnForward(one_line(error))
