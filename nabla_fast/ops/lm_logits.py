"""The product of hidden states and head that every path shares, and its transpose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.ops.checks import expect_matrix, expect_one_device
from nabla_fast.ops.registry import op
from nabla_fast.ops.rows import accumulation_dtype
from nabla_fast.ops.triton_backend import takes

HEAD_ROWS = 16384  # rows of a half-precision head that are converted at a time


@op
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
    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    dtype = accumulation_dtype(hidden)
    hidden = hidden.to(dtype)
    if head.dtype == dtype:
        return hidden @ head.T
    return torch.cat([hidden @ block.to(dtype).T for block in head.split(HEAD_ROWS)], dim=1)


def mapped_logits(states: Tensor, table: Tensor, token_map: Tensor | None) -> Tensor:
    """states·table[token_map]ᵀ, [N, V], without a copy of the table in the order of the map.

    Args:
        states: [N, H].
        table: [V_t, H].
        token_map: [V] int64, or None: V_t is V, and every token its own row.
    """
    if token_map is None:
        return lm_logits(states, table)
    return torch.cat([lm_logits(states, table[rows]) for rows in token_map.split(HEAD_ROWS)], dim=1)


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
    blocks = zip(grad.split(HEAD_ROWS, dim=1), head.split(HEAD_ROWS), strict=True)
    return sum(part @ block.to(grad.dtype) for part, block in blocks)


@lm_logits.check
def _(hidden: Tensor, head: Tensor) -> None:
    expect_matrix("lm_logits", "hidden", hidden)
    expect_matrix("lm_logits", "head", head, columns=hidden.shape[1])
    expect_one_device("lm_logits", hidden, head)


@lm_logits.fake
def _(hidden: Tensor, head: Tensor) -> Tensor:
    return hidden.new_empty((hidden.shape[0], head.shape[0]), dtype=accumulation_dtype(hidden))


@lm_logits.gradient("hidden", "head")
def _(arguments: dict[str, Any], output: Tensor, cotangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    (dz,), hidden, head = cotangents, arguments["hidden"], arguments["head"]
    return logits_backward(dz, head).to(hidden.dtype), (dz.T @ hidden.to(dz.dtype)).to(head.dtype)


def native_takes(hidden: Tensor, head: Tensor) -> bool:
    """Whether the C++ products take hidden states [N, H] and a head [V, H] like these."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype != torch.float64
        and head.dtype in (torch.float32, torch.bfloat16)
        and head.stride(1) == 1
    )


@lm_logits.backend("cpu", when=native_takes)
def _(hidden: Tensor, head: Tensor) -> Tensor:
    hidden = hidden.float()
    return _native.lm_logits(hidden if hidden.stride(1) == 1 else hidden.contiguous(), head)


@lm_logits.backend("triton", when=takes)
def _(hidden: Tensor, head: Tensor) -> Tensor:
    from nabla_fast.triton_kernels.common.vocabulary_product import vocabulary_product

    return vocabulary_product([hidden], [head])
