"""Rows of the gradient with respect to the one-hot tokens, from small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.checks import (
    expect,
    expect_matrix,
    expect_one_device,
    expect_tables,
    expect_vocabulary,
)
from nabla_fast.ops.logits import lm_logits
from nabla_fast.ops.registry import op
from nabla_fast.ops.rows import accumulation_dtype
from nabla_fast.ops.softmax import onehot_gradient
from nabla_fast.ops.triton_backend import takes


@op
def onehot_grad(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    *,
    nll_coeff: float,
) -> Tensor:
    """G[v] = Σ_t ⟨T_t[v], ∂ℒ/∂e_t⟩ − ν log π(v), with log π = log_softmax(hidden·headᵀ).

    Args:
        cotangents: ∂ℒ/∂e_t [N, H_t], one a table.
        tables: [V, H_t] each.
        hidden: final hidden states [N, H] that predict the rows' tokens over the hard sequence.
        head: [V, H].
        nll_coeff: ν.
    Returns:
        [N, V], float32 (float64 if an input is). A token of probability exactly 0 is masked: its
        gradient is 0.
    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    dtype = accumulation_dtype(hidden, *cotangents)
    grad = onehot_gradient(cotangents, tables, None, dtype)
    log_pi = torch.log_softmax(lm_logits(hidden.to(dtype), head), dim=-1)
    return (grad - nll_coeff * log_pi).masked_fill(log_pi == -torch.inf, 0)


def check_onehot_inputs(
    name: str, cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor
) -> None:
    """Arguments that rows of G and their norms share."""
    expect_matrix(name, "hidden", hidden)
    expect_matrix(name, "head", head, columns=hidden.shape[1])
    expect_vocabulary(name, head.shape[0])
    expect_tables(name, tables, head.shape[0])
    expect(
        len(cotangents) == len(tables),
        f"{name}: one cotangent a table is needed, got {len(cotangents)} for {len(tables)}",
    )
    for t, (cotangent, table) in enumerate(zip(cotangents, tables, strict=True)):
        expect_matrix(name, f"cotangents[{t}]", cotangent, rows=hidden.shape[0], columns=table.shape[1])
    expect_one_device(name, *cotangents, *tables, hidden, head)


@onehot_grad.check
def _(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **_: Any
) -> None:
    check_onehot_inputs("onehot_grad", cotangents, tables, hidden, head)


@onehot_grad.fake
def _(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **_: Any
) -> Tensor:
    return hidden.new_empty((hidden.shape[0], head.shape[0]), dtype=accumulation_dtype(hidden, *cotangents))


@onehot_grad.backend(
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

    return kernels.onehot_grad(list(cotangents), list(tables), hidden, head, nll_coeff)
