"""Norms of the one-hot gradient's rows, without keeping the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.onehot_grad import check_onehot_inputs, onehot_grad
from nabla_fast.ops.registry import op
from nabla_fast.ops.rows import accumulation_dtype, blocks
from nabla_fast.ops.triton_backend import takes


@op
def onehot_grad_norm(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    *,
    nll_coeff: float,
) -> Tensor:
    """‖G_i‖₂ of every row of :func:`~nabla_fast.ops.onehot_grad`, masked tokens left out.

    Args:
        cotangents, tables, hidden, head, nll_coeff: as of ``onehot_grad``.
    Returns:
        [N], float32 (float64 if an input is).
    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    norms = [hidden.new_zeros(0, dtype=accumulation_dtype(hidden, *cotangents))]
    for rows in blocks(len(hidden), len(head)):
        parts = [cotangent[rows] for cotangent in cotangents]
        grad = onehot_grad.body(parts, tables, hidden[rows], head, nll_coeff=nll_coeff)
        norms.append(grad.norm(dim=-1))
    return torch.cat(norms)


@onehot_grad_norm.check
def _(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **_: Any
) -> None:
    check_onehot_inputs("onehot_grad_norm", cotangents, tables, hidden, head)


@onehot_grad_norm.fake
def _(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **_: Any
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden, *cotangents))


@onehot_grad_norm.backend(
    "triton",
    when=lambda cotangents, tables, hidden, head, **_: takes(*cotangents, *tables, hidden, head),
)
def _(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    *,
    nll_coeff: float,
) -> Tensor:
    from nabla_fast.triton_kernels import onehot_grad as kernels

    return kernels.onehot_grad_norm(list(cotangents), list(tables), hidden, head, nll_coeff)
