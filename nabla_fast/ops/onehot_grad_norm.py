"""Norms of the one-hot gradient's rows, without keeping the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.ops.checks import as_native
from nabla_fast.ops.onehot_grad import (
    check_onehot_inputs,
    native_takes_onehot,
    onehot_rows,
    run_kernel,
    triton_takes_onehot,
)
from nabla_fast.ops.registry import op
from nabla_fast.ops.rows import accumulation_dtype, blocks, report


@op
def onehot_grad_norm(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    *,
    nll_coeff: float,
    token_maps: Sequence[Tensor | None] = (),
) -> Tensor:
    """‖G_i‖₂ of every row of :func:`~nabla_fast.ops.onehot_grad`, masked tokens left out.

    Args:
        cotangents, tables, hidden, head, nll_coeff, token_maps: as of ``onehot_grad``.
    Returns:
        [N], float32 (float64 if an input is).
    Raises:
        InputError: as of ``onehot_grad``.
        RowError: a row's logits hidden·headᵀ have a NaN or +inf, or no finite value.
    """
    norms = [hidden.new_zeros(0, dtype=accumulation_dtype(hidden, *cotangents))]
    statuses = [torch.zeros(0, dtype=torch.int32, device=hidden.device)]
    for rows in blocks(len(hidden), len(head)):
        parts = [cotangent[rows] for cotangent in cotangents]
        grad, status = onehot_rows(parts, tables, hidden[rows], head, nll_coeff, token_maps)
        norms.append(grad.norm(dim=-1))
        statuses.append(status)
    report("onehot_grad_norm", torch.cat(statuses))
    return torch.cat(norms)


@onehot_grad_norm.check
def _(*inputs: Any, token_maps: Sequence[Tensor | None], **_: Any) -> None:
    check_onehot_inputs("onehot_grad_norm", *inputs, token_maps)


@onehot_grad_norm.fake
def _(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **_: Any
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden, *cotangents))


@onehot_grad_norm.backend("cpu", when=native_takes_onehot)
def _(*inputs: Any, **options: Any) -> Tensor:
    norm, status = run_kernel(_native.onehot_grad_norm, *inputs, **options, read=as_native)
    report("onehot_grad_norm", status)
    return norm


@onehot_grad_norm.backend("triton", when=triton_takes_onehot)
def _(*inputs: Any, **options: Any) -> Tensor:
    from nabla_fast.triton_kernels import onehot_grad as kernels

    norm, status = run_kernel(kernels.onehot_grad_norm, *inputs, **options)
    report("onehot_grad_norm", status)
    return norm
