"""Keys and values in blocks that sequences share: a pool with reference counts and block tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PoolExhausted(RuntimeError):
    """A pool may not hold what is asked of it; the message names the size that would do."""


class BlockPool:
    """Keys and values of all layers of one model, in blocks of a fixed number of tokens.

    A pool grows when its free blocks do not suffice, at least to twice its size: what all growths copy
    together is less than what it holds in the end.

    Args:
        layers, kv_heads, head_dim: of the model.
        blocks: how many there are at first, ≥ 1.
        block_size: tokens a block holds.
        limit: most blocks it may grow to; None for no limit.
        dtype, device: of keys and values.

    Attributes:
        keys, values: [layers, blocks, block_size, kv_heads, head_dim]; other tensors after a growth.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        block_size: int = 16,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if blocks < 1 or (limit is not None and limit < blocks):
            raise ValueError(f"a pool needs 1 ≤ blocks ≤ limit, got {blocks} blocks and a limit of {limit}")
        shape = (layers, blocks, block_size, kv_heads, head_dim)
        # Zeros: attention multiplies what it masks by 0, and stray NaN would come through that.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size, self.limit = block_size, limit
        self.references = [0] * blocks
        # The lowest free block is taken first, so that runs repeat exactly.
        self._free = list(range(blocks))[::-1]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.references)

    @property
    def free_blocks(self) -> int:
        """How many of them no sequence holds."""
        return len(self._free)

    def sequence(self) -> PagedSequence:
        """A new, empty sequence."""
        return self.group().sequence()

    def group(self) -> SequenceGroup:
        """A new, empty group of sequences that are given back together."""
        return SequenceGroup(self)

    def close(self) -> None:
        """Drop keys and values, though somebody may still hold the pool; it has no blocks afterwards.

        An exception's traceback keeps a failed decode's pools alive as long as itself.
        """
        self.keys, self.values = (tensor.new_zeros(0) for tensor in (self.keys, self.values))
        self.references, self._free, self.limit = [], [], 0

    def reserve(self, count: int) -> None:
        """See to it that ``count`` blocks are free.

        Raises:
            PoolExhausted: the pool may not grow that far; it is as it was.
        """
        needed = self.blocks - self.free_blocks + count
        if needed <= self.blocks:
            return
        if self.limit is not None and needed > self.limit:
            raise PoolExhausted(
                f"the key-value pool may have {self.limit} blocks of {self.block_size} tokens, "
                f"{self.blocks - self.free_blocks} are in use and {count} more are needed: "
                f"{needed} blocks ({needed * self.block_size} tokens) would do"
            )
        doubled = max(needed, 2 * self.blocks)
        self._grow(doubled if self.limit is None else min(doubled, self.limit))

    def _grow(self, blocks: int) -> None:
        former = self.blocks
        grown = []
        for tensor in (self.keys, self.values):
            layers, _, *block = tensor.shape
            grown.append(tensor.new_zeros(layers, blocks, *block))
            grown[-1][:, :former] = tensor
        self.keys, self.values = grown
        self.references += [0] * (blocks - former)
        self._free[:0] = range(blocks - 1, former - 1, -1)  # taken last, as their numbers are highest

    def take(self, count: int) -> list[int]:
        """``count`` free blocks, each now referenced once.

        Raises:
            PoolExhausted: the pool may not grow that far; none has been taken.
        """
        self.reserve(count)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self.references[block] = 1
        return taken

    def retain(self, block: int) -> None:
        """One more sequence refers to a block."""
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One sequence fewer refers to a block; the last one frees it."""
        if self.references[block] <= 0:
            raise AssertionError(f"block {block} is freed twice")
        self.references[block] -= 1
        if self.references[block] == 0:
            self._free.append(block)

    def copy(self, source: int, target: int) -> None:
        """Copy a block's keys and values."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


class SequenceGroup:
    """Sequences of one pool that are given back together: those made here, and all forks of them."""

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.holding: set[PagedSequence] = set()  # all that may have blocks

    def sequence(self) -> PagedSequence:
        """A new, empty sequence of the group."""
        return PagedSequence(self, [], 0)

    def free(self) -> None:
        """Give the blocks of all its sequences back, which are empty afterwards."""
        for sequence in list(self.holding):
            sequence.free()


class PagedSequence:
    """The tokens of one sequence in a pool: a table of blocks and a length.

    Attributes:
        group: what it is given back with.
        pool: where its tokens lie.
        blocks: its block table; only the last block may be partly filled.
        length: tokens it holds.
    """

    def __init__(self, group: SequenceGroup, blocks: list[int], length: int):
        self.group, self.pool = group, group.pool
        self.blocks = blocks
        self.length = length
        group.holding.add(self)

    def extend(self, count: int) -> list[int]:
        """Make room for ``count`` tokens after the last.

        A partly filled last block that another sequence shares is copied first: shared tokens are
        never written to.

        Returns:
            A slot for each token, for :func:`nabla_fast.ops.store_keys_values`.
        Raises:
            PoolExhausted: the pool may not grow that far; the sequence is as it was.
        """
        size = self.pool.block_size
        last = len(self.blocks) - 1
        shared = self._writes_to_shared(count)
        taken = self.pool.take(self.missing(count))
        # Theirs from here on, so that whatever strikes now, they are given back with the sequence.
        self.blocks += taken
        self.group.holding.add(self)
        if shared:
            former = self.blocks[last]
            self.pool.copy(former, self.blocks[-1])
            self.blocks[last] = self.blocks.pop()
            self.pool.release(former)
        start, self.length = self.length, self.length + count
        return [self.blocks[n // size] * size + n % size for n in range(start, self.length)]

    def missing(self, count: int) -> int:
        """Blocks that an extension by ``count`` tokens takes from the pool."""
        needed = -(-(self.length + count) // self.pool.block_size)
        return needed - len(self.blocks) + self._writes_to_shared(count)

    def _writes_to_shared(self, count: int) -> bool:
        filled = self.length % self.pool.block_size
        return filled > 0 and count > 0 and self.pool.references[self.blocks[-1]] > 1

    def fork(self, length: int | None = None) -> PagedSequence:
        """A sequence with the same first ``length`` tokens (all, if None), in the same group.

        Full blocks are shared; a partly used last block is copied, so that both can go on writing.

        Raises:
            PoolExhausted: there is no block for the copy.
        """
        length = self.length if length is None else length
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot fork {length} tokens of a sequence of {self.length}")
        full, rest = divmod(length, self.pool.block_size)
        fork = PagedSequence(self.group, self.pool.take(1) if rest else [], 0)
        if rest:
            self.pool.copy(self.blocks[full], fork.blocks[0])
        shared = self.blocks[:full]
        for block in shared:
            self.pool.retain(block)
        fork.blocks[:0] = shared
        fork.length = length
        return fork

    def prefix(self, length: int) -> PagedSequence:
        """The first ``length`` tokens, borrowed: to be read while this sequence lives, nothing else."""
        # In a group of its own, which nobody gives back.
        group = SequenceGroup(self.pool)
        return PagedSequence(group, self.blocks[: -(-length // self.pool.block_size)], length)

    def truncate(self, length: int) -> None:
        """Drop the tokens after the first ``length``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a sequence of {self.length} tokens to {length}")
        kept = -(-length // self.pool.block_size)
        self.length = length
        while len(self.blocks) > kept:
            # Out of the table first: whatever strikes in between, no block is freed twice.
            self.pool.release(self.blocks.pop())

    def free(self) -> None:
        """Give all blocks back; the sequence is empty afterwards."""
        self.truncate(0)
        self.group.holding.discard(self)


def extend_all(sequences: Sequence[PagedSequence], counts: Sequence[int]) -> list[list[int]]:
    """Extend several sequences of one pool, all or none.

    Returns:
        What :meth:`PagedSequence.extend` returns for each.
    Raises:
        PoolExhausted: the pool may not grow far enough for all of them; every sequence is as it was.
    """
    pairs = list(zip(sequences, counts, strict=True))
    if pairs:
        # At once, so that the pool grows once and a refusal names what all of them need.
        sequences[0].pool.reserve(sum(sequence.missing(count) for sequence, count in pairs))
    return [sequence.extend(count) for sequence, count in pairs]


def block_tables(sequences: list[PagedSequence], device: torch.device | str = "cpu") -> Tensor:
    """Block tables of several sequences, [B, M] int64, padded with block 0."""
    width = max((len(sequence.blocks) for sequence in sequences), default=0)
    rows = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width)
