"""Calls of the C interface on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast._native.loading import extension

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # nabla_fast_dtype of nabla_fast.h


def matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """``nabla_fast_matrix`` or ``nabla_fast_output``: [M, H] float32 or bfloat16, unit stride along H."""
    return tensor.data_ptr(), tensor.shape[1], tensor.stride(0), _DTYPES[tensor.dtype]


def call(name: str, **fields: Any) -> bool:
    """Call ``nabla_fast_<name>`` with the fields of its struct, on as many threads as torch uses.

    A number or an array's address stands for itself; a matrix is :func:`matrix` of it, a tensor of an
    attention ``(address, strides)``, an array of these a sequence, None what is not there. The extension
    fills in the rest: the struct's size, the counts of arrays and a workspace.

    Returns:
        False where the function found rows that it has no answer for, and says so in their statuses.
    Raises:
        ValueError: with the line of the status, for what the function refuses.
        TypeError: a field that the struct does not have.
        RuntimeError: the extension is missing.
    """
    native = extension()
    status = getattr(native, name)(num_threads=torch.get_num_threads(), **fields)
    if status == 0:
        return True
    if status != native.BAD_ROWS:
        raise ValueError(native.status_string(status))
    return False
