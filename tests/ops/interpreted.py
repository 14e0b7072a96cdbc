"""What Triton's interpreter does otherwise in these tests.

Its reductions take Python's time for each element: here they work on whole arrays. It cuts float32 off to
bfloat16, where GPUs round to the nearest: twice the error, and all to one side. Its exp2 has numbers below
2⁻¹²⁶, where the kernels' (``ex2.approx.ftz``) is 0, and is an ulp further off where the CPU has AVX-512.
Before Triton 3.9 its fma rounds twice, and the larger of NaN and a number is NaN.
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


def _exp2(values: np.ndarray) -> np.ndarray:
    """2 to these powers of float32, rounded once, 0 where that is no normal number."""
    with np.errstate(all="ignore"):
        powers = np.exp2(values.astype(np.float64)).astype(np.float32)
    return np.where(powers < np.finfo(np.float32).tiny, np.float32(0), powers)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c of float32, whose products float64 holds."""
    with np.errstate(all="ignore"):
        return (a.astype(np.float64) * b + c).astype(np.float32)


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Inside, reductions with a kernel's own combination and what else is named above are these.

    Nothing is changed where kernels are compiled. A process that a test starts has to enter it itself.
    """
    if not _triton.interpreted():
        yield
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    cut_off, fma_twice_rounded = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fma

    def cast(builder: Any, value: Any, to: Any) -> Any:
        if value.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(_to_bfloat16(value.data), tl.bfloat16)
        return cut_off(builder, value, to)

    def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
        if c.dtype.scalar == tl.float32:
            return builder.ternary_op(a, b, c, _fma)
        return fma_twice_rounded(builder, a, b, c)

    replaced = {
        "cast_impl": cast,
        "create_fma": fma,
        "create_exp2": lambda builder, x: builder.unary_op(x, _exp2),
        "create_maxnumf": lambda builder, a, b: builder.binary_op(a, b, np.fmax),
        "create_minnumf": lambda builder, a, b: builder.binary_op(a, b, np.fmin),
    }
    with (
        mock.patch.object(ReduceOps, "generic_reduce", _reduced),
        mock.patch.multiple(InterpreterBuilder, **replaced),
    ):
        yield
