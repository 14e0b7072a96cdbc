"""Whether a tensor that an op changes in place overlaps itself, or another argument of the op."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from torch import Tensor

from nabla_fast.errors import InputError
from nabla_fast.plans.extent import extent


def expect_apart(
    op: str, changed: Sequence[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]]
) -> None:
    """Tensors that are changed share no element with themselves, each other or those that are read.

    Args:
        op: name for the message.
        changed, read: each with its name; all on one device.
    Raises:
        InputError: two do; both are named.
    """
    # Spans of bytes that lie apart are all that there is in a call that is right.
    spans = []
    for name, tensor in changed:
        if not tensor.is_contiguous() and _repeats(tensor):
            raise InputError(
                f"{op}: {name} is changed in place, and elements of it overlap: "
                f"shape {list(tensor.shape)}, strides {list(tensor.stride())}"
            )
        spans.append((*_span(tensor), name, tensor, True))
    spans += ((*_span(tensor), name, tensor, False) for name, tensor in read)
    spans.sort(key=itemgetter(0))
    end = 0
    for low, high, *_ in spans:
        if low < end and low < high:
            break
        end = max(end, high)
    else:
        return
    for n, (low, high, name, tensor, is_changed) in enumerate(spans):
        for other_low, other_high, other_name, other, other_changed in spans[:n]:
            if (
                (is_changed or other_changed)
                and low < other_high
                and other_low < high
                and np.shares_memory(_as_array(tensor), _as_array(other))
            ):
                first, second = (name, other_name) if is_changed else (other_name, name)
                raise InputError(f"{op}: {first} is changed in place, and overlaps {second}")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one that follows the last; twice one if there is none."""
    low = tensor.data_ptr()
    return low, low + extent(tensor)


def _repeats(tensor: Tensor) -> bool:
    """Whether two elements lie in one place."""
    if tensor.numel() == 0:
        return False
    axes = sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    reach = 0  # offset of the last element along the axes so far
    for stride, n in axes:
        if stride <= reach:
            break
        reach += stride * (n - 1)
    else:
        return False
    if len(axes) != 2 or axes[0][0] == 0:
        return True
    # i elements along one axis are as far as j along the other.
    (short, i_count), (long, j_count) = axes
    common = math.gcd(short, long)
    return long // common < i_count and short // common < j_count


class _Elements:
    def __init__(self, tensor: Tensor):
        size = tensor.element_size()
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": f"|u{size}" if size == 1 else f"<u{size}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }


def _as_array(tensor: Tensor) -> np.ndarray:
    """An array of the tensor's addresses, on whatever device; nothing is read."""
    return np.asarray(_Elements(tensor))
