"""The block pool under random sequences of operations: nothing leaks, nothing shared is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nabla_fast.models.paged_kv import (
    BlockPool,
    PagedSequence,
    PoolExhausted,
    SequenceGroup,
    block_tables,
    extend_all,
)
from nabla_fast.ops import store_keys_values

BLOCKS, BLOCK_SIZE = 12, 4


def small_pool(blocks: int = BLOCKS, limit: int | None = None) -> BlockPool:
    return BlockPool(layers=2, kv_heads=1, head_dim=3, blocks=blocks, limit=limit, block_size=BLOCK_SIZE)


def write(pool: BlockPool, slots: list[int], tokens: list[int]) -> None:
    """Tokens stand for keys and values: their numbers, negated for values, plus the layer."""
    values = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None].expand(-1, -1, -1, 3)
    numbers = torch.tensor([slots], dtype=torch.int64)
    for layer in range(2):
        store_keys_values(values + layer, -values - layer, pool.keys[layer], pool.values[layer], numbers)


def read(pool: BlockPool, sequence: PagedSequence) -> list[int]:
    """The tokens of a sequence, which must be the same in keys and values of both layers."""
    table = block_tables([sequence])[0]
    first = pool.keys[0][table].flatten(0, 1)[: sequence.length]
    for layer in range(2):
        assert torch.equal(pool.keys[layer][table].flatten(0, 1)[: sequence.length], first + layer)
        assert torch.equal(pool.values[layer][table].flatten(0, 1)[: sequence.length], -first - layer)
    return first[:, 0, 0].int().tolist()


class PoolMachine(RuleBasedStateMachine):
    """A pool that grows, beside the plain lists it should act like."""

    groups = Bundle("groups")
    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[PagedSequence, list[int], SequenceGroup]] = {}
        self.number = 0
        self.token = 0

    @initialize(blocks=st.integers(1, BLOCKS), room=st.none() | st.integers(0, 8))
    def make(self, blocks: int, room: int | None):
        self.pool = small_pool(blocks, None if room is None else blocks + room)

    def _add(self, sequence: PagedSequence, tokens: list[int], group: SequenceGroup) -> int:
        self.number += 1
        self.alive[self.number] = (sequence, tokens, group)
        return self.number

    def _write(self, sequence: PagedSequence, tokens: list[int], slots: list[int]) -> None:
        new = list(range(self.token, self.token + len(slots)))
        self.token += len(slots)
        write(self.pool, slots, new)
        tokens += new

    def _state(self) -> tuple:
        pool = self.pool
        tables = [(list(s.blocks), s.length) for s, *_ in self.alive.values()]
        return pool.blocks, pool.free_blocks, list(pool.references), tables, pool.keys.clone()

    def _refused(self, before: tuple, needed: int) -> None:
        """The pool was right to refuse ``needed`` more blocks, and nothing has changed."""
        in_use = before[0] - before[1]
        assert self.pool.limit is not None
        assert in_use + needed > self.pool.limit
        *after, keys = self._state()
        assert after == list(before[:-1])
        assert torch.equal(keys, before[-1])

    @rule(target=groups)
    def create_group(self) -> SequenceGroup:
        return self.pool.group()

    @rule(target=sequences, group=groups)
    def create(self, group: SequenceGroup) -> int:
        return self._add(group.sequence(), [], group)

    @rule(key=sequences, count=st.integers(0, 9))
    def extend(self, key: int, count: int):
        if key not in self.alive:
            return
        sequence, tokens, _ = self.alive[key]
        before, needed = self._state(), sequence.missing(count)
        try:
            slots = sequence.extend(count)
        except PoolExhausted:
            self._refused(before, needed)
            return
        self._write(sequence, tokens, slots)

    @rule(keys=st.sets(sequences, min_size=2, max_size=4), count=st.integers(0, 9))
    def extend_several(self, keys: set[int], count: int):
        chosen = [self.alive[key] for key in sorted(keys) if key in self.alive]
        counts = [count + n for n in range(len(chosen))]
        before = self._state()
        needed = sum(chosen[n][0].missing(counts[n]) for n in range(len(chosen)))
        try:
            slots = extend_all([sequence for sequence, *_ in chosen], counts)
        except PoolExhausted:
            self._refused(before, needed)
            return
        for (sequence, tokens, _), own in zip(chosen, slots, strict=True):
            self._write(sequence, tokens, own)

    @rule(target=sequences, key=sequences, share=st.floats(0, 1))
    def fork(self, key: int, share: float) -> int:
        if key not in self.alive:
            return 0
        sequence, tokens, group = self.alive[key]
        length = round(share * len(tokens))
        before = self._state()
        try:
            return self._add(sequence.fork(length), tokens[:length], group)
        except PoolExhausted:
            self._refused(before, 1)
            return 0

    @rule(key=sequences, share=st.floats(0, 1))
    def truncate(self, key: int, share: float):
        if key in self.alive:
            sequence, tokens, _ = self.alive[key]
            length = round(share * len(tokens))
            sequence.truncate(length)
            del tokens[length:]

    @rule(key=sequences)
    def free(self, key: int):
        if key in self.alive:
            sequence, tokens, _ = self.alive[key]
            sequence.free()
            tokens.clear()  # it may be extended again

    @rule(group=groups)
    def free_group(self, group: SequenceGroup):
        others = {s: list(s.blocks) for s, _, own in self.alive.values() if own is not group}
        group.free()
        assert not group.holding
        for _, tokens, own in self.alive.values():
            if own is group:
                tokens.clear()
        assert others == {s: s.blocks for s in others}

    @precondition(lambda self: self.alive)
    @rule()
    def free_everything(self):
        for group in {group for *_, group in self.alive.values()}:
            group.free()
        for _, tokens, _ in self.alive.values():
            tokens.clear()
        assert self.pool.free_blocks == self.pool.blocks

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence, tokens, _ in self.alive.values():
            assert sequence.length == len(tokens)
            assert read(self.pool, sequence) == tokens

    @invariant()
    def references_are_the_tables_entries(self):
        if not hasattr(self, "pool"):
            return
        counted = [0] * self.pool.blocks
        for sequence, *_ in self.alive.values():
            assert len(sequence.blocks) == -(-sequence.length // BLOCK_SIZE)
            for block in sequence.blocks:
                counted[block] += 1
        assert counted == self.pool.references
        assert self.pool.free_blocks == counted.count(0)
        assert self.pool.keys.shape[1] == self.pool.values.shape[1] == self.pool.blocks
        assert self.pool.limit is None or self.pool.blocks <= self.pool.limit


PoolMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow],
)
TestPool = PoolMachine.TestCase


def test_full_blocks_are_shared_and_a_partial_one_is_copied():
    pool = small_pool()
    sequence = pool.sequence()
    write(pool, sequence.extend(10), list(range(10)))
    fork = sequence.fork(9)
    assert fork.blocks[:2] == sequence.blocks[:2]
    assert fork.blocks[2] != sequence.blocks[2]
    assert pool.free_blocks == BLOCKS - 4


def test_a_shared_block_is_copied_before_it_is_written():
    pool = small_pool()
    sequence = pool.sequence()
    write(pool, sequence.extend(8), list(range(8)))
    fork = sequence.fork(8)
    fork.truncate(6)  # its last block is still the other's
    write(pool, fork.extend(1), [99])
    assert read(pool, sequence) == list(range(8))
    assert read(pool, fork) == [0, 1, 2, 3, 4, 5, 99]
    sequence.free()
    fork.free()
    assert pool.free_blocks == BLOCKS


def test_exhaustion_names_the_size_that_would_do():
    pool = small_pool(blocks=1, limit=3)
    held = pool.sequence()
    held.extend(5)
    other = pool.sequence()
    with pytest.raises(
        PoolExhausted,
        match=r"3 blocks of 4 tokens, 2 are in use and 4 more are needed: 6 blocks \(24 tokens\) would do",
    ):
        other.extend(16)
    enough = small_pool(blocks=1, limit=6)
    enough.sequence().extend(5)
    enough.sequence().extend(16)
    assert enough.free_blocks == 0


def test_exhaustion_by_several_names_what_all_of_them_need():
    pool = small_pool(blocks=3, limit=3)
    sequences = [pool.sequence(), pool.sequence()]
    with pytest.raises(PoolExhausted, match="0 are in use and 5 more are needed: 5 blocks"):
        extend_all(sequences, [8, 9])
    assert [s.length for s in sequences] == [0, 0]
    assert pool.free_blocks == pool.blocks


def test_growth_is_cheap_and_keeps_what_is_there():
    pool = small_pool(blocks=1)
    sequence = pool.sequence()
    copied, tokens = 0, 1000 * BLOCK_SIZE
    for token in range(tokens):
        before = pool.blocks
        write(pool, sequence.extend(1), [token])
        copied += before if pool.blocks > before else 0
    assert read(pool, sequence) == list(range(tokens))
    assert pool.blocks < 2 * 1000 + 1
    assert copied < pool.blocks  # all growths together


def test_growth_stops_at_the_limit():
    pool = small_pool(blocks=4, limit=7)
    pool.take(5)
    assert (pool.blocks, pool.free_blocks) == (7, 2)
    pool.take(2)
    with pytest.raises(PoolExhausted, match="8 blocks"):
        pool.take(1)


def test_a_large_request_grows_once():
    pool = small_pool(blocks=2)
    pool.take(1)
    pool.take(9)
    assert (pool.blocks, pool.free_blocks) == (10, 0)


def test_the_lowest_free_blocks_are_taken_first_also_after_growth():
    pool = small_pool(blocks=3)
    assert pool.take(2) == [0, 1]
    assert pool.take(3) == [2, 3, 4]
    assert pool.take(1) == [5]


@pytest.mark.parametrize(("blocks", "limit"), [(0, None), (0, 3), (4, 3)])
def test_sizes_that_make_no_pool_are_refused(blocks: int, limit: int | None):
    with pytest.raises(ValueError, match=f"1 ≤ blocks ≤ limit, got {blocks} blocks and a limit of {limit}"):
        small_pool(blocks, limit)


def test_a_group_is_given_back_with_all_forks_and_no_others():
    pool = small_pool()
    group = pool.group()
    sequence = group.sequence()
    sequence.extend(10)
    fork = sequence.fork(9).fork(6)
    other = pool.sequence()
    write(pool, other.extend(5), list(range(5)))
    sequence.free()
    sequence.extend(3)  # an emptied sequence is of its group still
    group.free()
    assert (sequence.length, fork.length, fork.blocks) == (0, 0, [])
    assert read(pool, other) == list(range(5))
    assert pool.free_blocks == BLOCKS - 2


def test_a_closed_pool_keeps_no_memory():
    pool = small_pool()
    pool.close()
    assert pool.keys.nbytes == pool.values.nbytes == pool.blocks == 0
    with pytest.raises(PoolExhausted):
        pool.sequence().extend(1)


def test_a_block_cannot_be_freed_twice():
    pool = small_pool()
    (block,) = pool.take(1)
    pool.release(block)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(block)


@pytest.mark.parametrize("length", [-1, 6])
def test_lengths_out_of_range_are_refused(length: int):
    sequence = small_pool().sequence()
    sequence.extend(5)
    with pytest.raises(ValueError, match="cannot fork"):
        sequence.fork(length)
    with pytest.raises(ValueError, match="cannot cut"):
        sequence.truncate(length)
