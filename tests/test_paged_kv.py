"""The block pool under random sequences of operations: nothing leaks, nothing shared is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from nabla_fast.paged_kv import BlockPool, PagedSequence, PoolExhausted, block_tables

BLOCKS, BLOCK_SIZE = 12, 4


def small_pool(blocks: int = BLOCKS) -> BlockPool:
    return BlockPool(layers=2, kv_heads=1, head_dim=3, blocks=blocks, block_size=BLOCK_SIZE)


def write(pool: BlockPool, slots: torch.Tensor, tokens: list[int]) -> None:
    """Tokens stand for keys and values: their numbers, negated for values, plus the layer."""
    values = torch.tensor(tokens, dtype=torch.float32)[:, None, None].expand(-1, 1, 3)
    for layer in range(2):
        pool.write(layer, slots, values + layer, -values - layer)


def read(pool: BlockPool, sequence: PagedSequence) -> list[int]:
    """The tokens of a sequence, which must be the same in keys and values of both layers."""
    table = block_tables([sequence])[0]
    first = pool.keys[0][table].flatten(0, 1)[: sequence.length]
    for layer in range(2):
        assert torch.equal(pool.keys[layer][table].flatten(0, 1)[: sequence.length], first + layer)
        assert torch.equal(pool.values[layer][table].flatten(0, 1)[: sequence.length], -first - layer)
    return first[:, 0, 0].int().tolist()


class PoolMachine(RuleBasedStateMachine):
    """A pool beside the plain lists it should act like."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.pool = small_pool()
        self.alive: dict[int, tuple[PagedSequence, list[int]]] = {}
        self.number = 0
        self.token = 0

    def _add(self, sequence: PagedSequence, tokens: list[int]) -> int:
        self.number += 1
        self.alive[self.number] = (sequence, tokens)
        return self.number

    @rule(target=sequences)
    def create(self) -> int:
        return self._add(self.pool.sequence(), [])

    @rule(key=sequences, count=st.integers(0, 9))
    def extend(self, key: int, count: int):
        if key not in self.alive:
            return
        sequence, tokens = self.alive[key]
        free, references = self.pool.free_blocks, list(self.pool.references)
        try:
            slots = sequence.extend(count)
        except PoolExhausted:
            assert (self.pool.free_blocks, self.pool.references) == (free, references)
            return
        new = list(range(self.token, self.token + count))
        self.token += count
        write(self.pool, slots, new)
        tokens += new

    @rule(target=sequences, key=sequences, share=st.floats(0, 1))
    def fork(self, key: int, share: float) -> int:
        if key not in self.alive:
            return 0
        sequence, tokens = self.alive[key]
        length = round(share * len(tokens))
        try:
            return self._add(sequence.fork(length), tokens[:length])
        except PoolExhausted:
            return 0

    @rule(key=sequences, share=st.floats(0, 1))
    def truncate(self, key: int, share: float):
        if key in self.alive:
            sequence, tokens = self.alive[key]
            length = round(share * len(tokens))
            sequence.truncate(length)
            del tokens[length:]

    @rule(key=sequences)
    def free(self, key: int):
        if key in self.alive:
            sequence, _ = self.alive.pop(key)
            sequence.free()

    @precondition(lambda self: self.alive)
    @rule()
    def free_all(self):
        for sequence, _ in self.alive.values():
            sequence.free()
        self.alive.clear()
        assert self.pool.free_blocks == BLOCKS

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence, tokens in self.alive.values():
            assert sequence.length == len(tokens)
            assert read(self.pool, sequence) == tokens

    @invariant()
    def references_are_the_tables_entries(self):
        counted = [0] * BLOCKS
        for sequence, _ in self.alive.values():
            assert len(sequence.blocks) == -(-sequence.length // BLOCK_SIZE)
            for block in sequence.blocks:
                counted[block] += 1
        assert counted == self.pool.references
        assert self.pool.free_blocks == counted.count(0)


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


def test_exhaustion_names_the_size_that_would_do():
    pool = small_pool(blocks=3)
    held = pool.sequence()
    held.extend(5)
    other = pool.sequence()
    with pytest.raises(
        PoolExhausted, match=r"3 blocks of 4 tokens, 1 of them free, and 4 are needed: 6 would do"
    ):
        other.extend(16)
    enough = small_pool(blocks=6)
    enough.sequence().extend(5)
    enough.sequence().extend(16)
    assert enough.free_blocks == 0


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
