"""The inner loop of DTO (Differentiable Textual Optimization) on hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.adam import AdamState
from nabla_fast.ops.checks import expect_vocabulary
from nabla_fast.ops.cuda_calls import descend_by_cuda
from nabla_fast.ops.descent_loop import (
    PARAMETER_DTYPES,
    Descent,
    check_descent,
    descend,
    descend_native,
    descent_rules,
    reported,
)
from nabla_fast.ops.gumbel_noise import GumbelNoise, gumbel_noise
from nabla_fast.ops.head_map import (
    BIAS_RULE,
    check_head_map,
    head_map_refusal,
    product_gradient,
    without_head_map,
)
from nabla_fast.ops.limits import cuda_backend, native_backend, triton_backend
from nabla_fast.ops.lm_logits import lm_logits, logits_backward
from nabla_fast.ops.registry import floats, op, tensors
from nabla_fast.ops.rows import report, row_status
from nabla_fast.ops.softmax import softmax_gradient, tempered


@op(
    mutates=("h", "state"),
    reads=("state", "until", "group"),
    arguments={
        "h": tensors(("N", "H"), dtypes=PARAMETER_DTYPES),
        "head": floats("V", "H"),
        "grad": floats("N", "V"),
        **descent_rules("h", "H"),
        **BIAS_RULE,
    },
)
def dto_descent_latents(
    h: Tensor,
    head: Tensor,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    *,
    until: Tensor | None = None,
    group: Tensor | None = None,
    tau: float = 1.0,
    noise: GumbelNoise | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Descent:
    """:func:`~nabla_fast.ops.dto_descent` with z = h·headᵀ: the steps move h along Wᵀ ∂ℒ/∂(h·headᵀ).

    Args:
        h: [N, H] float32 or float64, changed in place.
        head: the lm_head W [V, H], floating point, a constant.
        grad: G [N, V], floating point.
        state: Adam moments [N, H] in the dtype of ``h``, and steps [N] int64; changed in place.
        schedule, until, group, tau, noise: as in ``dto_descent``.
        bias, scale, softcap: of the logits, as in ``lm_logits``; without them z = h·headᵀ.
    Returns:
        The rows' hard tokens now, and which of them the last step moved.
    Raises:
        InputError: a shape, dtype or device does not fit, or ``h`` or a tensor of ``state`` overlaps
            itself or another argument.
        RowError: a row's logits have a NaN or +inf, or no finite value; as in ``dto_descent``.

    Example:
        >>> h, head = torch.tensor([[1.0, 0.99]]), torch.eye(2)
        >>> grad = torch.tensor([[1.0, -1.0]])
        >>> dto_descent_latents(h, head, grad, AdamState.zeros(h), cosine_schedule(20, 0.01))
        Descent(token=tensor([1]), flipped=tensor([True]))
    """

    def logits(part: Tensor) -> Tensor:
        return lm_logits(part, head, bias=bias, scale=scale, softcap=softcap)

    def backward(dz: Tensor, z: Tensor) -> Tensor:
        return logits_backward(product_gradient(dz, z, scale, softcap), head)

    return descend_latents(logits, backward, h, grad, state, schedule, until, group, tau, noise)


def descend_latents(
    logits: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor, Tensor], Tensor],
    h: Tensor,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    until: Tensor | None = None,
    group: Tensor | None = None,
    tau: float = 1.0,
    noise: GumbelNoise | None = None,
) -> Descent:
    """The descent over any head, in plain PyTorch.

    Args:
        logits: z [n, V] of h [n, H].
        backward: ∂ℒ/∂h of (∂ℒ/∂z, z).
        h, grad, state, schedule, until, group, tau, noise: as of :func:`dto_descent_latents`, checked.
    Raises:
        RowError: a row's logits have a NaN or +inf, or no finite value.
    """
    report("dto_descent_latents", row_status(logits(h)))
    g = 0 if noise is None else gumbel_noise(noise, grad.shape[1]).to(h.dtype)

    def perturbed(z: Tensor, rows: Tensor | slice) -> Tensor:
        return z if noise is None else z + g[rows]

    def gradient(part: Tensor, rows: Tensor | slice) -> Tensor:
        z = logits(part)
        y = perturbed(z, rows)
        dz = softmax_gradient(
            torch.softmax(tempered(y, tau), dim=-1), grad[rows].to(z.dtype), y.argmax(dim=-1), tau
        )
        return backward(dz, z)

    def hard_token(part: Tensor, rows: Tensor | slice) -> Tensor:
        return perturbed(logits(part), rows).argmax(dim=-1)

    return descend(h, state, schedule, until, group, gradient, hard_token)


@dto_descent_latents.check
def check_dto_descent_latents(
    h: Tensor,
    head: Tensor,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    **options: Any,
) -> None:
    name = "dto_descent_latents"
    expect_vocabulary(name, head.shape[0])
    check_head_map(name, bias, scale, softcap)
    check_descent(name, h, grad, state, schedule, **options)


@dto_descent_latents.fake
def fake_dto_descent_latents(h: Tensor, *_: Any, **__: Any) -> Descent:
    return Descent(h.new_empty(h.shape[0], dtype=torch.int64), h.new_empty(h.shape[0], dtype=torch.bool))


def _cpu_refusal(h: Tensor, head: Tensor, *inputs: Any, **options: Any) -> str | None:
    return native_backend.matrix_refusal("head", head) or native_backend.descent_refusal(
        "h", h, *inputs, **options
    )


@dto_descent_latents.backend("cpu", refuses=_cpu_refusal, finds_overlaps=True)
def dto_descent_latents_cpu(
    h: Tensor,
    head: Tensor,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    **options: Any,
) -> Descent:
    options |= native_backend.head_map_fields(bias=bias, scale=scale, softcap=softcap)
    return descend_native("dto_descent_latents", h, head, grad, state, schedule, **options)


def _triton_refusal(
    h: Tensor, head: Tensor, grad: Tensor, state: AdamState, *_: Any, **options: Any
) -> str | None:
    return (
        triton_backend.refusal(head=head)
        or triton_backend.descent_refusal("h", h, grad, state)
        or head_map_refusal("Triton", **options)
    )


@dto_descent_latents.backend("triton", refuses=_triton_refusal)
def dto_descent_latents_triton(
    h: Tensor, head: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any
) -> Descent:
    from nabla_fast.triton_kernels import dto_descent_latents as kernels

    found = kernels.dto_descent_latents(h, head, grad, *state, schedule, **without_head_map(options))
    return reported("dto_descent_latents", *found)


@dto_descent_latents.backend("cuda", refuses=cuda_backend.latents_refusal)
def dto_descent_latents_cuda(
    h: Tensor, head: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any
) -> Descent:
    options = without_head_map(options)
    return descend_by_cuda("dto_descent_latents", h, head, grad, state, schedule, **options)
