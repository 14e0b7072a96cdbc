"""Keys and values in blocks that sequences share: a pool with reference counts and block tables."""

from __future__ import annotations

import torch
from torch import Tensor


class PoolExhausted(RuntimeError):
    """A pool has too few blocks; the message names the size that would do."""


class BlockPool:
    """Keys and values of all layers of one model, in blocks of a fixed number of tokens.

    Args:
        layers, kv_heads, head_dim: of the model.
        blocks: how many there are.
        block_size: tokens a block holds.
        dtype, device: of keys and values.

    Attributes:
        keys, values: [layers, blocks, block_size, kv_heads, head_dim].
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (layers, blocks, block_size, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size
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
        return PagedSequence(self, [], 0)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put tokens where :meth:`PagedSequence.extend` made room for them.

        Args:
            layer: index of the layer.
            slots: [T] int64.
            keys, values: [T, kv_heads, head_dim].
        """
        self.keys[layer].flatten(0, 1)[slots] = keys.to(self.keys.dtype)
        self.values[layer].flatten(0, 1)[slots] = values.to(self.values.dtype)

    def take(self, count: int) -> list[int]:
        """``count`` free blocks, each now referenced once.

        Raises:
            PoolExhausted: fewer are free; none has been taken.
        """
        if count > len(self._free):
            free = len(self._free)
            raise PoolExhausted(
                f"the key-value pool has {self.blocks} blocks of {self.block_size} tokens, "
                f"{free} of them free, and {count} are needed: {self.blocks - free + count} would do"
            )
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


class PagedSequence:
    """The tokens of one sequence in a pool: a table of blocks and a length.

    Attributes:
        pool: where they lie.
        blocks: its block table; only the last block may be partly filled.
        length: tokens it holds.
    """

    def __init__(self, pool: BlockPool, blocks: list[int], length: int):
        self.pool = pool
        self.blocks = blocks
        self.length = length

    def extend(self, count: int) -> Tensor:
        """Make room for ``count`` tokens behind the last.

        A partly filled last block that another sequence shares is copied first: shared tokens are
        never written to.

        Returns:
            [count] int64 slots on the CPU for :meth:`BlockPool.write`.
        Raises:
            PoolExhausted: there are too few free blocks; the sequence is as it was.
        """
        size = self.pool.block_size
        filled = self.length % size
        shared = filled > 0 and count > 0 and self.pool.references[self.blocks[-1]] > 1
        missing = -(-(self.length + count) // size) - len(self.blocks)
        taken = self.pool.take(missing + shared)
        if shared:
            own = taken.pop()
            self.pool.copy(self.blocks[-1], own)
            self.pool.release(self.blocks[-1])
            self.blocks[-1] = own
        self.blocks += taken
        position = torch.arange(self.length, self.length + count)
        self.length += count
        table = torch.tensor(self.blocks, dtype=torch.int64)
        return table[position // size] * size + position % size

    def fork(self, length: int | None = None) -> PagedSequence:
        """A sequence with the same first ``length`` tokens (all, if None).

        Full blocks are shared; a partly used last block is copied, so that both can go on writing.

        Raises:
            PoolExhausted: there is no free block for the copy.
        """
        length = self.length if length is None else length
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot fork {length} tokens of a sequence of {self.length}")
        full, rest = divmod(length, self.pool.block_size)
        blocks = self.blocks[:full]
        if rest:
            (own,) = self.pool.take(1)
            self.pool.copy(self.blocks[full], own)
        for block in blocks:
            self.pool.retain(block)
        return PagedSequence(self.pool, [*blocks, own] if rest else list(blocks), length)

    def head(self, length: int) -> PagedSequence:
        """The first ``length`` tokens, borrowed: to be read while this sequence lives, nothing else."""
        return PagedSequence(self.pool, self.blocks[: -(-length // self.pool.block_size)], length)

    def truncate(self, length: int) -> None:
        """Drop the tokens behind the first ``length``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a sequence of {self.length} tokens to {length}")
        kept = -(-length // self.pool.block_size)
        for block in self.blocks[kept:]:
            self.pool.release(block)
        del self.blocks[kept:]
        self.length = length

    def free(self) -> None:
        """Give all blocks back; the sequence is empty afterwards."""
        self.truncate(0)


def block_tables(sequences: list[PagedSequence], device: torch.device | str = "cpu") -> Tensor:
    """Block tables of several sequences, [B, M] int64, padded with block 0."""
    width = max((len(sequence.blocks) for sequence in sequences), default=0)
    rows = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width)
