"""How far a tensor reaches in memory."""

from __future__ import annotations

from torch import Tensor


def extent(tensor: Tensor) -> int:
    """Bytes from the first to past the last; 0 if there is none."""
    count = tensor.nbytes
    if count == 0 or tensor.is_contiguous():
        return count
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in axes) + 1) * tensor.element_size()
