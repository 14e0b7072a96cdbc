"""What Triton's interpreter does otherwise in these tests.

Its reductions take Python's time for each element: here they work on whole arrays. It cuts float32 off to
bfloat16, where GPUs round to the nearest: twice the error, and all to one side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np

from nabla_fast import _triton


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


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits [uint16] of float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Inside, reductions with a kernel's own combination and rounding to bfloat16 are these.

    Nothing is changed where kernels are compiled. A process that a test starts has to enter it itself.
    """
    if not _triton.interpreted():
        yield
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    cut_off = InterpreterBuilder.cast_impl

    def cast(builder: Any, value: Any, to: Any) -> Any:
        if value.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(_to_bfloat16(value.data), tl.bfloat16)
        return cut_off(builder, value, to)

    with (
        mock.patch.object(ReduceOps, "generic_reduce", _reduced),
        mock.patch.object(InterpreterBuilder, "cast_impl", cast),
    ):
        yield
