"""Sequences in a model's own caches: what :mod:`nabla_fast.models.paged_kv` is for pools of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, ref

from nabla_fast.models.cache_layout import CacheLayout, Part
from nabla_fast.models.paged_kv import PoolExhausted

# Tokens between two states that a sequence remembers of its way: it can be forked there alone.
SPACING = 32


@dataclass(eq=False)
class CachedRows:
    """A cache of several sequences. No pass is given it: passes get copies.

    Attributes:
        cache: the model's own cache object; None: nothing has been read.
        rows: how many sequences it has.
        length: columns of what grows with each token: tokens, and padding beside them.
        readers: the sequences that are rows of it.
    """

    cache: Any
    rows: int
    length: int
    readers: WeakSet[CachedSequence] = field(default_factory=WeakSet)

    def shrink(self) -> None:
        """Give the sequences copies of their own where half of the rows or more are nobody's."""
        if 2 * len(self.readers) <= self.rows > 1:
            for sequence in list(self.readers):
                sequence.part_from_others()


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
        self._states: tuple[ref[CachedRows], Any] | None = None

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

    def states_of(self, rows: CachedRows) -> Any:
        """The states of these rows alone; the same object for all who ask one after another."""
        if self._states is None or self._states[0]() is not rows:
            self._states = ref(rows), self.layout.states(rows.cache)
        return self._states[1]

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
        rows, row, start: the cache it is in, its row there, and the column of its first token.
        length: how many tokens it has read.
    """

    def __init__(self, group: CacheGroup):
        self.group, self.pool = group, group.pool
        self.rows: CachedRows | None = None
        self.row = self.start = self.length = 0
        self._marks: dict[int, tuple[Any, int]] = {}  # states after so many tokens, and the row in them
        group.holding.add(self)

    @property
    def part(self) -> Part:
        """What it is of its cache; it must have read something."""
        return Part(self.rows.cache, self.row, self.start, self.length)

    def go_on(self, rows: CachedRows, row: int, start: int, length: int) -> None:
        """Be that row from now on, whose ``length`` tokens begin at column ``start``."""
        several = length > self.length + 1
        self._be(rows, row, start, length)
        self.group.holding.add(self)
        if not self.pool.layout.croppable and (
            several or length >= max(self._marks, default=0) + self.pool.spacing
        ):
            self._marks[length] = self.pool.states_of(rows), row

    def fork(self, length: int | None = None) -> CachedSequence:
        """A sequence of the same group with the first ``length`` tokens, or with fewer."""
        fork = CachedSequence(self.group)
        self._begin(fork, self.length if length is None else length)
        return fork

    def prefix(self, length: int) -> CachedSequence:
        """The first ``length`` tokens, or fewer, in a group that nobody gives back."""
        prefix = CachedSequence(CacheGroup(self.pool))
        prefix.group.holding.clear()  # it would be kept alive by its group
        self._begin(prefix, length)
        return prefix

    def truncate(self, length: int) -> None:
        """Drop the tokens after the first ``length``, or some more."""
        if length < self.length:
            former = self.rows
            self._begin(self, length)
            former.shrink()

    def free(self) -> None:
        """Drop what it holds; it is empty afterwards."""
        former, self._marks = self.rows, {}
        self._be(None, 0, 0, 0)
        self.group.holding.discard(self)
        if former is not None:
            former.shrink()

    def part_from_others(self) -> None:
        """Have a cache of one row, which shares nothing with the rows of others."""
        cache = self.pool.layout.alone(self.part)
        self._be(self.pool.hold(CachedRows(cache, 1, self.length)), 0, 0, self.length)

    def _be(self, rows: CachedRows | None, row: int, start: int, length: int) -> None:
        if self.rows is not None:
            self.rows.readers.discard(self)
        if rows is not None:
            rows.readers.add(self)
        self.rows, self.row, self.start, self.length = rows, row, start, length

    def _begin(self, other: CachedSequence, length: int) -> None:
        if length >= self.length:
            other._be(self.rows, self.row, self.start, self.length)
            other._marks = dict(self._marks)
            return
        layout = self.pool.layout
        if layout is not None and layout.croppable:
            other._be(self.rows, self.row, self.start, length)
            return
        marks = {n: mark for n, mark in self._marks.items() if n <= length}
        kept = max(marks, default=0)
        rows = None
        if kept:
            latest = self.part._replace(length=kept)
            rows = CachedRows(layout.restored(*marks[kept], latest), 1, kept)
        other._be(rows, 0, 0, kept)
        other._marks = marks
        if kept and other is self:
            self.part_from_others()  # of those that it has been read with
