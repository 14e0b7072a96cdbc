"""Reasons for which kernels refuse an argument.

A refusal is None for an argument that the kernels take, else one line that names the argument and says
what they take. No line is written for an argument that is taken: ops are called in inner loops. The
docstring of each function says what is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_refusal(name: str, tensor: Tensor, taken: tuple[torch.dtype, ...], kernels: str) -> str | None:
    """A tensor has one of the dtypes ``taken``; ``kernels`` is "C++" or "Triton"."""
    if tensor.dtype in taken:
        return None
    *others, last = (_short(dtype) for dtype in taken)
    wanted = f"{', '.join(others)} and {last}" if others else last
    return f"{name} is {_short(tensor.dtype)} (the {kernels} kernels take {wanted})"


def stride_refusal(name: str, tensor: Tensor, kernels: str) -> str | None:
    """A tensor has unit stride along its last dimension."""
    if tensor.stride(-1) == 1:
        return None
    between = f"{tensor.stride(-1)} between its {'columns' if tensor.ndim == 2 else 'elements'}"
    return f"{name} has stride {between} (the {kernels} kernels read unit stride)"


def contiguous_refusal(name: str, tensor: Tensor | None, kernels: str) -> str | None:
    """A tensor is contiguous, or None."""
    if tensor is None or tensor.is_contiguous():
        return None
    return f"{name} has strides {list(tensor.stride())} (the {kernels} kernels read contiguous memory)"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
