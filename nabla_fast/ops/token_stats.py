"""Logsumexp, confidence, entropy and argmax of each row of a softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.ops.checks import (
    as_native,
    expect,
    expect_matrix,
    expect_one_device,
    expect_tau,
    expect_vocabulary,
    native_tau,
)
from nabla_fast.ops.lm_logits import lm_logits, native_takes
from nabla_fast.ops.registry import op
from nabla_fast.ops.rows import accumulation_dtype, report, row_status
from nabla_fast.ops.triton_backend import takes


class TokenStats(NamedTuple):
    """What selectors ask of a row of softmax(z/τ)."""

    logsumexp: Tensor  # [N] of z/τ
    confidence: Tensor  # [N] the largest probability
    entropy: Tensor  # [N] nats
    argmax: Tensor  # [N] int64, the lowest index among equals


@op
def token_stats(rows: Tensor, head: Tensor | None = None, *, tau: float = 1.0) -> TokenStats:
    """Statistics of p = softmax(z/τ), row by row.

    Args:
        rows: logits z [N, V]; with ``head``, hidden states h [N, H] and z = h·headᵀ.
        head: [V, H] or None.
        tau: temperature τ > 0.
    Returns:
        logsumexp, confidence and entropy [N] in float32 (float64 for float64 input), argmax [N].
        −inf logits are masked tokens.
    Raises:
        InputError: a shape, dtype or device does not fit.
        RowError: a row has a NaN or +inf logit, or no finite one.
    """
    dtype = accumulation_dtype(rows)
    logits = rows.to(dtype) if head is None else lm_logits(rows, head)
    report("token_stats", row_status(logits))
    logp = torch.log_softmax(logits / tau, dim=-1)
    p = logp.exp()
    argmax = logits.argmax(dim=-1)
    top = logits.gather(1, argmax[:, None]) / tau
    logsumexp = (top - logp.gather(1, argmax[:, None])).squeeze(1)
    entropy = -(p * logp.masked_fill(logp == -torch.inf, 0)).sum(dim=-1)
    return TokenStats(logsumexp, p.amax(dim=-1), entropy, argmax)


@token_stats.check
def _(rows: Tensor, head: Tensor | None, *, tau: float) -> None:
    expect_matrix("token_stats", "rows", rows)
    if head is not None:
        expect_matrix("token_stats", "head", head, columns=rows.shape[1])
    expect(rows.shape[1] > 0, "token_stats: rows must have at least one column")
    expect_vocabulary("token_stats", rows.shape[1] if head is None else head.shape[0])
    expect_one_device("token_stats", rows, head)
    expect_tau("token_stats", tau)


@token_stats.fake
def _(rows: Tensor, head: Tensor | None, *, tau: float) -> TokenStats:
    n, dtype = rows.shape[0], accumulation_dtype(rows)
    values = [rows.new_empty(n, dtype=dtype) for _ in range(3)]
    return TokenStats(*values, rows.new_empty(n, dtype=torch.int64))


def _native_takes(rows: Tensor, head: Tensor | None, *, tau: float) -> bool:
    if not native_tau(tau):
        return False
    if head is not None:
        return native_takes(rows, head)
    return (
        rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16) and rows.stride(1) == 1
    )


@token_stats.backend("cpu", when=_native_takes)
def _(rows: Tensor, head: Tensor | None, *, tau: float) -> TokenStats:
    if head is None:
        *values, status = _native.token_stats(rows, tau)
    else:
        *values, status = _native.linear_token_stats(as_native(rows), head, tau)
    report("token_stats", status)
    return TokenStats(*values)


@token_stats.backend("triton", when=lambda rows, head, *, tau: takes(rows, head) and 2**-64 <= tau <= 2**64)
def _(rows: Tensor, head: Tensor | None, *, tau: float) -> TokenStats:
    from nabla_fast.triton_kernels import token_stats as kernels

    *values, status = kernels.token_stats(rows, head, tau)
    report("token_stats", status)
    return TokenStats(*values)
