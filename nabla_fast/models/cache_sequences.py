"""Sequences in a model's own caches: what :mod:`nabla_fast.models.paged_kv` is for pools of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from nabla_fast.models.cache_layout import CacheLayout
from nabla_fast.models.paged_kv import PoolExhausted

# Tokens between two states that a sequence remembers of its way: it can be forked there alone.
SPACING = 32


@dataclass(eq=False)
class CachedRows:
    """A cache of several sequences after as many tokens each. No pass is given it: passes get copies.

    Attributes:
        cache: the model's own cache object; None: nothing has been read.
        rows: how many sequences it has.
        length: tokens that each of them has read, at least.
    """

    cache: Any
    rows: int
    length: int


class CachePool:
    """Sequences of one model, and how many tokens their caches hold together.

    Args:
        layout: of the model's caches; None: no cache is kept, and every sequence remains empty.
        limit: most tokens that may be held; None for no limit.
        spacing: tokens between two remembered states.
    """

    def __init__(self, layout: CacheLayout | None, limit: int | None = None, spacing: int = SPACING):
        self.layout, self.limit, self.spacing = layout, limit, spacing
        self._held: WeakSet[CachedRows] = WeakSet()

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values or states are held."""
        return sum(held.rows * held.length for held in self._held)

    def sequence(self) -> CachedSequence:
        """A new, empty sequence."""
        return self.group().sequence()

    def group(self) -> CacheGroup:
        """A new, empty group of sequences that are given back together."""
        return CacheGroup(self)

    def close(self) -> None:
        """Nothing is held but by sequences."""

    def expect_room(self, count: int) -> None:
        """See to it that ``count`` tokens more may be held.

        Raises:
            PoolExhausted: the limit is lower; the message says what would do.
        """
        held = self.tokens
        if self.limit is not None and held + count > self.limit:
            raise PoolExhausted(
                f"caches may hold {self.limit} tokens, {held} are held and {count} more are needed: "
                f"{held + count} tokens would do"
            )

    def hold(self, rows: CachedRows) -> CachedRows:
        """Count what these rows hold, as long as anybody has them."""
        self._held.add(rows)
        return rows


class CacheGroup:
    """Sequences that are given back together: those made here, and all forks of them."""

    def __init__(self, pool: CachePool):
        self.pool = pool
        self.holding: set[CachedSequence] = set()

    def sequence(self) -> CachedSequence:
        """A new, empty sequence of the group."""
        return CachedSequence(self)

    def free(self) -> None:
        """Drop what all its sequences hold, which are empty afterwards."""
        for sequence in list(self.holding):
            sequence.free()


class CachedSequence:
    """The tokens of one sequence in a cache.

    A cache with states can be gone on with after its last token alone; a sequence remembers states of its
    way, and a fork begins at the last one that is not beyond what was asked for. So a fork, a prefix and
    what is left after :meth:`truncate` may be shorter than asked: the rest has to be read again.

    Attributes:
        group: what it is given back with.
        pool: of the group.
        length: how many tokens it has read.
    """

    def __init__(self, group: CacheGroup):
        self.group, self.pool = group, group.pool
        self.rows: CachedRows | None = None
        self.row = self.length = 0
        self._marks: dict[int, tuple[CachedRows, int]] = {}  # states after so many tokens
        group.holding.add(self)

    def go_on(self, rows: CachedRows, row: int, length: int, *, mark: bool) -> None:
        """Be that row from now on, after ``length`` tokens; remember this state if ``mark``."""
        self.rows, self.row, self.length = rows, row, length
        self.group.holding.add(self)
        if mark and not self.pool.layout.croppable:
            self._marks[length] = CachedRows(self.pool.layout.states(rows.cache), rows.rows, length), row

    def fork(self, length: int | None = None) -> CachedSequence:
        """A sequence of the same group with the first ``length`` tokens, or with fewer."""
        fork = CachedSequence(self.group)
        self._begin(fork, self.length if length is None else length)
        return fork

    def prefix(self, length: int) -> CachedSequence:
        """The first ``length`` tokens, or fewer, in a group that nobody gives back."""
        prefix = CachedSequence(CacheGroup(self.pool))
        self._begin(prefix, length)
        return prefix

    def truncate(self, length: int) -> None:
        """Drop the tokens after the first ``length``, or some more."""
        if length < self.length:
            self._begin(self, length)

    def free(self) -> None:
        """Drop what it holds; it is empty afterwards."""
        self.rows, self.row, self.length, self._marks = None, 0, 0, {}
        self.group.holding.discard(self)

    def _begin(self, other: CachedSequence, length: int) -> None:
        if length >= self.length:
            other.rows, other.row, other.length = self.rows, self.row, self.length
            other._marks = dict(self._marks)
            return
        layout = self.pool.layout
        if layout is not None and layout.croppable:
            other.rows, other.row, other.length = self.rows, self.row, length
            return
        marks = {n: mark for n, mark in self._marks.items() if n <= length}
        latest, row, start = self.rows, self.row, max(marks, default=0)
        other.rows, other.row, other.length, other._marks = None, 0, start, marks
        if start:
            states, place = marks[start]
            cache = layout.restored(states.cache, latest.cache, (place, row), start)
            other.rows = CachedRows(cache, 1, start)
