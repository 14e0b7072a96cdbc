"""Norms of the rows of the one-hot gradient G, without [N, V] in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.ops.limits import native_backend, triton_backend
from nabla_fast.ops.onehot_grad import (
    ONEHOT_RULES,
    check_onehot_inputs,
    onehot_fields,
    onehot_rows,
    run_kernel,
)
from nabla_fast.ops.registry import op
from nabla_fast.ops.rows import accumulation_dtype, report, row_slices


@op(arguments=ONEHOT_RULES, reads=("token_maps",))
def onehot_grad_norm(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    *,
    nll_coeff: float,
    token_maps: Sequence[Tensor | None] = (),
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """‖G_i‖₂ of every row of :func:`~nabla_fast.ops.onehot_grad`, masked tokens left out.

    Args:
        cotangents, tables, hidden, head, nll_coeff, token_maps, bias, scale, softcap: as in
            ``onehot_grad``.
    Returns:
        [N], float32 (float64 if an input is).
    Raises:
        InputError: as in ``onehot_grad``.
        RowError: a row's logits hidden·headᵀ have a NaN or +inf, or no finite value.

    Example:
        >>> table, hidden, head = torch.eye(3), torch.zeros(1, 2), torch.ones(3, 2)
        >>> onehot_grad_norm([torch.tensor([[3.0, 0.0, 4.0]])], [table], hidden, head, nll_coeff=0.0)
        tensor([5.])
    """
    head_map = {"bias": bias, "scale": scale, "softcap": softcap}
    norms = [hidden.new_zeros(0, dtype=accumulation_dtype(hidden, *cotangents))]
    statuses = [torch.zeros(0, dtype=torch.int32, device=hidden.device)]
    for rows in row_slices(len(hidden), len(head)):
        parts = [cotangent[rows] for cotangent in cotangents]
        grad, status = onehot_rows(parts, tables, hidden[rows], head, nll_coeff, token_maps, head_map)
        norms.append(grad.norm(dim=-1))
        statuses.append(status)
    report("onehot_grad_norm", torch.cat(statuses))
    return torch.cat(norms)


@onehot_grad_norm.check
def check_onehot_grad_norm(*inputs: Any, **options: Any) -> None:
    check_onehot_inputs("onehot_grad_norm", *inputs, **options)


@onehot_grad_norm.fake
def fake_onehot_grad_norm(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **_: Any
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden, *cotangents))


def onehot_grad_norm_native(*inputs: Any, **head_map: Any) -> tuple[Tensor, Tensor]:
    """‖G_i‖₂ [N] of :func:`onehot_fields`, and a status [N] int32; NaN where it is not 0."""
    fields = onehot_fields(*inputs, **head_map)
    norm = torch.empty(fields["rows"], dtype=torch.float32, device="cpu")
    status = torch.empty(fields["rows"], dtype=torch.int32, device="cpu")
    extension().onehot_grad_norm(**fields, row_status=status, norm=norm)
    return norm, status


@onehot_grad_norm.backend("cpu", refuses=native_backend.onehot_refusal)
def onehot_grad_norm_cpu(*inputs: Any, **options: Any) -> Tensor:
    norm, status = run_kernel(onehot_grad_norm_native, *inputs, **options, convert=native_backend.as_native)
    report("onehot_grad_norm", status)
    return norm


@onehot_grad_norm.backend("triton", refuses=triton_backend.onehot_refusal)
def onehot_grad_norm_triton(
    *inputs: Any, nll_coeff: float, token_maps: Sequence[Tensor | None], **_: Any
) -> Tensor:
    from nabla_fast.triton_kernels import onehot_grad as kernels

    norm, status = run_kernel(kernels.onehot_grad_norm, *inputs, nll_coeff=nll_coeff, token_maps=token_maps)
    report("onehot_grad_norm", status)
    return norm
