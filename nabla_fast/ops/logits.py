"""The product of hidden states and head that every path shares, and its transpose."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops.rows import accumulation_dtype

_BLOCK = 16384  # rows of a half-precision head converted at a time


def lm_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """z = hidden·headᵀ in float32 (float64 if hidden is).

    Half-precision logits tie, which makes an argmax depend on chance, so the product is never
    rounded to the head's dtype. A half-precision head is converted block by block: a float32 copy
    of a large vocabulary's head would not fit beside the model.

    Args:
        hidden: [N, H].
        head: [V, H].
    Returns:
        [N, V].
    """
    dtype = accumulation_dtype(hidden)
    hidden = hidden.to(dtype)
    if head.dtype == dtype:
        return hidden @ head.T
    return torch.cat([hidden @ block.to(dtype).T for block in head.split(_BLOCK)], dim=1)


def logits_backward(grad: Tensor, head: Tensor) -> Tensor:
    """∂ℒ/∂hidden = ∂ℒ/∂z·head of :func:`lm_logits`.

    Args:
        grad: ∂ℒ/∂z [N, V] float32 or float64.
        head: [V, H].
    Returns:
        [N, H] in the dtype of ``grad``.
    """
    if head.dtype == grad.dtype:
        return grad @ head
    blocks = zip(grad.split(_BLOCK, dim=1), head.split(_BLOCK), strict=True)
    return sum(part @ block.to(grad.dtype) for part, block in blocks)
