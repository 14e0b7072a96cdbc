"""Logits from hidden states and the lm_head, as every path computes them, and the gradient back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.ops.head_map import BIAS_RULE, check_head_map, logits_of_product, product_gradient
from nabla_fast.ops.limits import native_backend, triton_backend
from nabla_fast.ops.registry import Table, floats, op, tensors
from nabla_fast.ops.registry.schema import read_parameters
from nabla_fast.ops.rows import accumulation_dtype

# Rows of a half-precision lm_head that are converted at a time.
HEAD_ROWS = 16384


@op(arguments={"hidden": floats("N", "H"), "head": floats("V", "H"), **BIAS_RULE}, reads=())
def lm_logits(
    hidden: Tensor,
    head: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """z = c·tanh(s·(hidden·headᵀ + b)/c) in float32 (float64 if hidden is); hidden·headᵀ by default.

    Half-precision logits tie, which makes an argmax depend on chance, so the product is never
    rounded to the head's dtype. A half-precision head is converted a few rows at a time: a float32
    copy of a large vocabulary's head would not fit beside the model.

    Differentiable in ``hidden`` and ``head``.

    Args:
        hidden: h [N, H], floating point.
        head: the lm_head W [V, H], floating point.
        bias: b [V], floating point, a constant; None for none. −inf masks a token, unless there is a cap.
        scale: s, as of Cohere's and Granite's models.
        softcap: c, positive, as of Gemma 2; None for no cap.
    Returns:
        [N, V].
    Raises:
        InputError: a shape, dtype or device does not fit.

    Example:
        >>> lm_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 2.]])
    """
    dtype = accumulation_dtype(hidden)
    hidden = hidden.to(dtype)
    if head.dtype == dtype:
        product = hidden @ head.T
    else:
        product = torch.cat([hidden @ part.to(dtype).T for part in head.split(HEAD_ROWS)], dim=1)
    return logits_of_product(product, bias, scale, softcap)


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
    Raises:
        InputError: a shape, dtype or device does not fit.

    Example:
        >>> logits_backward(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 2.]])
    """
    grad, head = _BACKWARD.plain(grad, head)
    if head.dtype == grad.dtype:
        return grad @ head
    parts = zip(grad.split(HEAD_ROWS, dim=1), head.split(HEAD_ROWS), strict=True)
    return sum(columns @ rows.to(grad.dtype) for columns, rows in parts)


_BACKWARD = Table(
    "logits_backward",
    read_parameters(logits_backward),
    {
        "grad": tensors(("N", "V"), dtypes=(torch.float32, torch.float64)),
        "head": floats("V", "H"),
    },
)


@lm_logits.check
def check_lm_logits(hidden: Tensor, head: Tensor, **head_map: Any) -> None:
    check_head_map("lm_logits", **head_map)


@lm_logits.fake
def fake_lm_logits(hidden: Tensor, head: Tensor, **_: Any) -> Tensor:
    return hidden.new_empty((hidden.shape[0], head.shape[0]), dtype=accumulation_dtype(hidden))


@lm_logits.gradient("hidden", "head")
def lm_logits_gradient(
    arguments: dict[str, Any], output: Tensor, cotangents: list[Tensor]
) -> tuple[Tensor, Tensor]:
    (dz,), hidden, head = cotangents, arguments["hidden"], arguments["head"]
    du = product_gradient(dz, output, arguments["scale"], arguments["softcap"])
    return logits_backward(du, head).to(hidden.dtype), (du.T @ hidden.to(du.dtype)).to(head.dtype)


@lm_logits.backend("cpu", refuses=native_backend.hidden_refusal)
def lm_logits_cpu(hidden: Tensor, head: Tensor, **head_map: Any) -> Tensor:
    hidden, rows, vocab = native_backend.as_float32(hidden), hidden.shape[0], head.shape[0]
    logits = native_backend.empty_matrix(rows, vocab)
    extension().lm_logits(
        num_threads=torch.get_num_threads(),
        rows=rows,
        vocab=vocab,
        hidden=hidden,
        head=head,
        logits=logits,
        **native_backend.head_map_fields(**head_map),
    )
    return logits


@lm_logits.backend(
    "triton", refuses=lambda hidden, head, **_: triton_backend.refusal(hidden=hidden, head=head)
)
def lm_logits_triton(hidden: Tensor, head: Tensor, **head_map: Any) -> Tensor:
    from nabla_fast.triton_kernels.common.vocabulary_product import vocabulary_product

    return logits_of_product(vocabulary_product([hidden], [head]), **head_map)
