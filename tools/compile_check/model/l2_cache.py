"""The L2 cache, of tensors that hold nothing: which of their bytes a launch finds there."""

from __future__ import annotations

import collections

from torch import Tensor

from tools.compile_check.work import Memory, size


class L2Cache:
    """What was used last, in lines of 16 kB, of which a launch may use part."""

    LINE = 1 << 14

    def __init__(self, capacity: int):
        self._lines: collections.OrderedDict[tuple[int, int], None] = collections.OrderedDict()
        self._most = capacity // self.LINE
        self._kept: list[Tensor] = []  # addresses are not used twice

    def missed(self, memory: Memory) -> int:
        """Bytes of a tensor, or of its first part, that are not there; now they are."""
        tensor = memory[0] if isinstance(memory, tuple) else memory
        self._kept.append(tensor)
        storage, width = tensor.untyped_storage()._cdata, tensor.element_size()
        first = tensor.storage_offset() * width
        if isinstance(memory, tuple) or tensor.is_contiguous() or tensor.ndim != 2 or tensor.stride(1) != 1:
            return self._missed(storage, first, first + size(memory))
        starts = (first + row * tensor.stride(0) * width for row in range(len(tensor)))
        return sum(self._missed(storage, start, start + tensor.shape[1] * width) for start in starts)

    def _missed(self, storage: int, first: int, last: int) -> int:
        missed = 0
        for line in range(first // self.LINE, -(-last // self.LINE)):
            if (storage, line) not in self._lines:
                begin, end = line * self.LINE, (line + 1) * self.LINE
                missed += min(end, last) - max(begin, first)
            self._lines[storage, line] = None
            self._lines.move_to_end((storage, line))
            if len(self._lines) > self._most:
                self._lines.popitem(last=False)
        return missed
