"""Logsumexp, confidence, entropy and argmax of each row of a softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.ops.checks import expect, expect_tau, expect_vocabulary
from nabla_fast.ops.head_map import BIAS_RULE, check_head_map, head_map_refusal, is_product
from nabla_fast.ops.limits import native_backend, triton_backend
from nabla_fast.ops.lm_logits import lm_logits
from nabla_fast.ops.registry import floats, op
from nabla_fast.ops.rows import accumulation_dtype, report, row_status
from nabla_fast.ops.softmax import tempered


class TokenStats(NamedTuple):
    """Statistics of N rows of softmax(z/τ), which selectors read."""

    logsumexp: Tensor  # [N] of z/τ
    confidence: Tensor  # [N] the largest probability
    entropy: Tensor  # [N] nats
    argmax: Tensor  # [N] int64, the lowest index among equals


@op(arguments={"rows": floats("N", "M"), "head": floats("V", "M"), **BIAS_RULE}, reads=())
def token_stats(
    rows: Tensor,
    head: Tensor | None = None,
    *,
    tau: float = 1.0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """Statistics of p = softmax(z/τ), row by row.

    Args:
        rows: logits z [N, V]; with ``head``, hidden states h [N, H] and z = h·headᵀ. Floating point.
        head: the lm_head W [V, H], floating point, or None.
        tau: temperature τ > 0.
        bias, scale, softcap: of logits h·headᵀ, as in ``lm_logits``; not without ``head``.
    Returns:
        logsumexp, confidence and entropy [N] in float32 (float64 for float64 input), argmax [N].
        −inf logits are masked tokens.
    Raises:
        InputError: a shape, dtype or device does not fit.
        RowError: a row has a NaN or +inf logit, or no finite one.

    Example:
        >>> stats = token_stats(torch.tensor([[0.0, 0.0, -torch.inf]]))
        >>> stats.confidence, stats.argmax
        (tensor([0.5000]), tensor([0]))
    """
    dtype = accumulation_dtype(rows)
    if head is None:
        logits = rows.to(dtype)
    else:
        logits = lm_logits(rows, head, bias=bias, scale=scale, softcap=softcap)
    report("token_stats", row_status(logits))
    logp = torch.log_softmax(tempered(logits, tau), dim=-1)
    p = logp.exp()
    argmax = logits.argmax(dim=-1)
    top = logits.gather(1, argmax[:, None]) / tau
    logsumexp = (top - logp.gather(1, argmax[:, None])).squeeze(1)
    entropy = -(p * logp.masked_fill(logp == -torch.inf, 0)).sum(dim=-1)
    return TokenStats(logsumexp, p.amax(dim=-1), entropy, argmax)


@token_stats.check
def check_token_stats(rows: Tensor, head: Tensor | None, *, tau: float, **head_map: Any) -> None:
    expect(rows.shape[1] > 0, "token_stats: rows must have at least one column")
    expect_vocabulary("token_stats", rows.shape[1] if head is None else head.shape[0])
    expect_tau("token_stats", tau)
    check_head_map("token_stats", **head_map)
    if head is None:
        expect(
            is_product(**head_map),
            "token_stats: bias, scale and softcap are of a head, and none is given",
        )


@token_stats.fake
def fake_token_stats(rows: Tensor, head: Tensor | None, **_: Any) -> TokenStats:
    n, dtype = rows.shape[0], accumulation_dtype(rows)
    values = [rows.new_empty(n, dtype=dtype) for _ in range(3)]
    return TokenStats(*values, rows.new_empty(n, dtype=torch.int64))


def _cpu_refusal(rows: Tensor, head: Tensor | None, **_: Any) -> str | None:
    if head is not None:
        return native_backend.product_refusal("rows", rows, "head", head)
    return native_backend.matrix_refusal("rows", rows)


@token_stats.backend("cpu", refuses=_cpu_refusal)
def token_stats_cpu(rows: Tensor, head: Tensor | None, *, tau: float, **head_map: Any) -> TokenStats:
    values, status = token_stats_native(rows, head, tau, **head_map)
    report("token_stats", status)
    return values


def token_stats_native(
    rows: Tensor, head: Tensor | None, tau: float, **head_map: Any
) -> tuple[TokenStats, Tensor]:
    """Statistics by the C++ kernels, and a status [N] int32; of a row with another one than 0 they are NaN,
    and its argmax is −1."""
    n = rows.shape[0]
    logsumexp, confidence, entropy = (torch.empty(n, dtype=torch.float32, device="cpu") for _ in range(3))
    argmax = torch.empty(n, dtype=torch.int64, device="cpu")
    status = torch.empty(n, dtype=torch.int32, device="cpu")
    results = {
        "logsumexp": logsumexp,
        "confidence": confidence,
        "entropy": entropy,
        "argmax": argmax,
        "row_status": status,
    }
    native, threads = extension(), torch.get_num_threads()
    if head is None:
        native.token_stats(
            num_threads=threads, rows=n, vocab=rows.shape[1], logits=rows, tau=tau, **results
        )
    else:
        hidden, vocab = native_backend.as_native(rows), head.shape[0]
        results |= native_backend.head_map_fields(**head_map)
        native.linear_token_stats(
            num_threads=threads, rows=n, vocab=vocab, hidden=hidden, head=head, tau=tau, **results
        )
    return TokenStats(logsumexp, confidence, entropy, argmax), status


def _triton_refusal(rows: Tensor, head: Tensor | None, *, tau: float, **head_map: Any) -> str | None:
    return triton_backend.refusal(rows=rows, head=head) or head_map_refusal("Triton", **head_map)


@token_stats.backend("triton", refuses=_triton_refusal)
def token_stats_triton(rows: Tensor, head: Tensor | None, *, tau: float, **_: Any) -> TokenStats:
    from nabla_fast.triton_kernels import token_stats as kernels

    *values, status = kernels.token_stats(rows, head, tau)
    report("token_stats", status)
    return TokenStats(*values)
