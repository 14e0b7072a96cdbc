"""The key-value pools of one decode call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nabla_fast.decode.problem import Problem
from nabla_fast.models.cache_sequences import CacheGroup, CachePool
from nabla_fast.models.paged_kv import BlockPool, SequenceGroup
from nabla_fast.models.readers import FrozenSequence, SuffixReader
from nabla_fast.models.whole_reader import OwnForward

BLOCK = 16  # tokens a block of keys and values holds


class RewardSequences(tuple[FrozenSequence, ...]):
    """A response as the rewards have read it: a sequence in the pool of each."""

    __slots__ = ()

    def free(self) -> None:
        """Give their blocks back."""
        for sequence in self:
            sequence.free()


@dataclass(frozen=True)
class SequenceGroups:
    """The sequences of one problem: a group in each model's pool; ``rewards`` has one a reward."""

    lm: SequenceGroup | CacheGroup
    rewards: tuple[SequenceGroup | CacheGroup, ...]

    def reward_sequences(self) -> RewardSequences:
        """Empty ones."""
        return RewardSequences(group.sequence() for group in self.rewards)

    def free(self) -> None:
        """Give all blocks back, wherever the problem's decode stands."""
        for group in (self.lm, *self.rewards):
            group.free()


class Pools:
    """A pool a model.

    They begin with what the first problems' prompts need and grow with what is rolled out: how long
    responses become, and how many are proposed at once, is not known before.

    Args:
        lm: reader of the LM.
        rewards: readers of the rewards, in order.
        first: the problems that are decoded first, at least one.
        max_tokens: most tokens that each pool may hold, ≥ ``BLOCK``; None for no limit.

    Attributes:
        lm: the LM's pool.
    """

    def __init__(
        self,
        lm: SuffixReader,
        rewards: Sequence[SuffixReader | OwnForward],
        first: Sequence[Problem],
        max_tokens: int | None,
    ):
        limit = None if max_tokens is None else max_tokens // BLOCK

        def pool(reader: SuffixReader | OwnForward, lengths: list[int]) -> BlockPool | CachePool:
            blocks = sum(length // BLOCK + 2 for length in lengths)
            return reader.pool(blocks if limit is None else min(blocks, limit), BLOCK, limit)

        self.lm = pool(lm, [len(p.prompt_ids) for p in first])
        self._rewards = [
            pool(reader, [sum(map(len, p.reward_context(n))) for p in first])
            for n, reader in enumerate(rewards)
        ]

    def groups(self) -> SequenceGroups:
        """Groups for a new problem, empty as yet."""
        return SequenceGroups(self.lm.group(), tuple(pool.group() for pool in self._rewards))

    def close(self) -> None:
        """Drop the memory; no problem may use its sequences any more."""
        for pool in (self.lm, *self._rewards):
            pool.close()
