"""Reductions of Triton's interpreter by whole arrays: its own take Python's time for each element."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np


def _reduced(reduction: Any, inputs: Sequence[Any]) -> list[Any]:
    """In the place of ``ReduceOps.generic_reduce``: halves are combined until one element is left.

    Args:
        reduction: the ``ReduceOps``; its axis has a power of two of elements.
        inputs: tensors that are reduced together.
    """
    shape, axis = inputs[0].handle.data.shape, reduction.axis
    parts = [
        np.moveaxis(tensor.handle.data if axis is not None else tensor.handle.data.ravel(), axis or 0, 0)
        for tensor in inputs
    ]
    types = [tensor.dtype for tensor in inputs]
    while (half := len(parts[0]) // 2) > 0:
        pairs = [
            [reduction.to_tensor(part[side], dtype) for part, dtype in zip(parts, types, strict=True)]
            for side in (slice(0, half), slice(half, None))
        ]
        combined = reduction.combine_fn.fn(*pairs[0], *pairs[1])
        combined = combined if isinstance(combined, tuple) else (combined,)
        parts = [
            tensor.handle.data.reshape(part[:half].shape)
            for tensor, part in zip(combined, parts, strict=True)
        ]
    results = [part[0] for part in parts]
    if reduction.keep_dims:
        ones = [1] * len(shape) if axis is None else [*shape[:axis], 1, *shape[axis + 1 :]]
        results = [result.reshape(ones) for result in results]
    return [reduction.to_tensor(result, dtype) for result, dtype in zip(results, types, strict=True)]


@contextlib.contextmanager
def fast_reductions() -> Iterator[None]:
    """Inside, reductions with a kernel's own combination are these."""
    from triton.runtime.interpreter import ReduceOps

    with mock.patch.object(ReduceOps, "generic_reduce", _reduced):
        yield
