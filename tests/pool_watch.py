"""A watch over the key-value pools of decode calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nabla_fast.models.paged_kv import BlockPool, PagedSequence, SequenceGroup


class Watch:
    """Pools made and closed while it lasts.

    Attributes:
        made: every pool.
        closed: of every one of these that was closed, (free blocks, blocks) just before.
        left: sequences that still had blocks when their group was given back.
        most: of every pool, blocks in use at once.
    """

    def __init__(self):
        self.made: list[BlockPool] = []
        self.closed: list[tuple[int, int]] = []
        self.left: list[PagedSequence] = []
        self.most: dict[BlockPool, int] = {}

    def all_given_back(self) -> bool:
        """Whether every pool was closed, with all its blocks free."""
        return len(self.closed) == len(self.made) and all(free == blocks for free, blocks in self.closed)


@contextmanager
def watched_pools() -> Iterator[Watch]:
    """Watch the pools that are made inside."""
    watch = Watch()
    make, close, take, free = BlockPool.__init__, BlockPool.close, BlockPool.take, SequenceGroup.free

    def made(self: BlockPool, **options) -> None:
        make(self, **options)
        watch.made.append(self)

    def closed(self: BlockPool) -> None:
        # Garbage of earlier calls may be collected, and closed, meanwhile.
        if self in watch.made:
            watch.closed.append((self.free_blocks, self.blocks))
        close(self)

    def taken(self: BlockPool, count: int) -> list[int]:
        blocks = take(self, count)
        watch.most[self] = max(watch.most.get(self, 0), self.blocks - self.free_blocks)
        return blocks

    def freed(self: SequenceGroup) -> None:
        watch.left += [sequence for sequence in self.holding if sequence.blocks]
        free(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockPool, "__init__", made)
        patch.setattr(BlockPool, "close", closed)
        patch.setattr(BlockPool, "take", taken)
        patch.setattr(SequenceGroup, "free", freed)
        yield watch
