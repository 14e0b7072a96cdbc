"""The gradient of the negative log-likelihood with respect to the hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.ops.checks import expect, expect_vocabulary
from nabla_fast.ops.head_map import BIAS_RULE, check_head_map, product_gradient
from nabla_fast.ops.limits import native_backend
from nabla_fast.ops.lm_logits import lm_logits, logits_backward
from nabla_fast.ops.registry import floats, integers, op
from nabla_fast.ops.rows import accumulation_dtype, report, row_slices, row_status


@op(
    arguments={
        "hidden": floats("N", "H"),
        "head": floats("V", "H"),
        "tokens": integers("N"),
        **BIAS_RULE,
    },
    reads=("tokens",),
)
def nll_grad(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """∂/∂h of −Σ_i log π(token_i), with π = softmax(z): (∂z/∂(h·headᵀ) ⊙ (π − onehot(token)))·head.

    Args:
        hidden: h [N, H], floating point.
        head: the lm_head W [V, H], floating point.
        tokens: [N] int64.
        bias, scale, softcap: of the logits, as in ``lm_logits``; without them z = h·headᵀ.
    Returns:
        [N, H], float32 (float64 if ``hidden`` is).
    Raises:
        InputError: a shape, dtype or device does not fit, or a token is not in the vocabulary.
        RowError: a row's logits have a NaN or +inf, or no finite value.

    Example:
        >>> nll_grad(torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0]))
        tensor([[-0.5000,  0.5000]])
    """
    gradients = [hidden.new_zeros(0, hidden.shape[1], dtype=accumulation_dtype(hidden))]
    for rows in row_slices(len(hidden), len(head)):
        z = lm_logits(hidden[rows], head, bias=bias, scale=scale, softcap=softcap)
        dz = target_gradient(z, tokens[rows])
        gradients.append(logits_backward(product_gradient(dz, z, scale, softcap), head))
    return torch.cat(gradients)


def target_gradient(z: Tensor, tokens: Tensor) -> Tensor:
    """∂/∂z of −Σ_i log π(token_i), π − onehot(token).

    Args:
        z: logits [N, V].
        tokens: [N] int64.
    Returns:
        [N, V].
    Raises:
        RowError: a row has a NaN or +inf, or no finite value.
    """
    report("nll_grad", row_status(z))
    pi = z.softmax(dim=-1)
    pi[torch.arange(len(pi), device=pi.device), tokens] -= 1
    return pi


@nll_grad.check
def check_nll_grad(hidden: Tensor, head: Tensor, tokens: Tensor, **head_map: Any) -> None:
    check_head_map("nll_grad", **head_map)
    expect_vocabulary("nll_grad", head.shape[0])
    if tokens.device.type == "cpu" and len(tokens):  # on a device the look-up itself raises
        low, high = int(tokens.min()), int(tokens.max())
        expect(
            low >= 0 and high < len(head),
            f"nll_grad: tokens must be in 0..{len(head) - 1}, got {low if low < 0 else high}",
        )


@nll_grad.fake
def fake_nll_grad(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden.new_empty(hidden.shape, dtype=accumulation_dtype(hidden))


@nll_grad.backend(
    "cpu", refuses=lambda hidden, head, tokens, **_: native_backend.hidden_refusal(hidden, head)
)
def nll_grad_cpu(hidden: Tensor, head: Tensor, tokens: Tensor, **head_map: Any) -> Tensor:
    hidden, tokens = native_backend.as_float32(hidden), tokens.contiguous()
    rows = hidden.shape[0]
    grad = torch.empty(hidden.shape, dtype=torch.float32, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    extension().nll_grad(
        num_threads=torch.get_num_threads(),
        rows=rows,
        vocab=head.shape[0],
        hidden=hidden,
        head=head,
        targets=tokens,
        grad=grad,
        row_status=status,
        **native_backend.head_map_fields(**head_map),
    )
    report("nll_grad", status)
    return grad
