"""The inner loop of DTO (Differentiable Textual Optimization) on logits."""

from __future__ import annotations

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
from nabla_fast.ops.limits import cuda_backend, native_backend, triton_backend
from nabla_fast.ops.registry import floats, op, tensors
from nabla_fast.ops.rows import report, row_status
from nabla_fast.ops.softmax import softmax_gradient, tempered


@op(
    mutates=("z", "state"),
    reads=("state", "until", "group"),
    arguments={
        "z": tensors(("N", "V"), dtypes=PARAMETER_DTYPES),
        "grad": floats("N", "V"),
        **descent_rules("z", "V"),
    },
)
def dto_descent(
    z: Tensor,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    *,
    until: Tensor | None = None,
    group: Tensor | None = None,
    tau: float = 1.0,
    noise: GumbelNoise | None = None,
) -> Descent:
    """Adam steps on rows of logits under a constant one-hot gradient, until a hard token moves.

    A row steps along ∂ℒ/∂z = (1/τ) p ⊙ (G − ⟨p, G⟩), p = softmax((z + g)/τ), from step
    ``state.step`` up to the end of the schedule, and stops right after the step that moves its hard
    token ŷ = argmax(z + g): G holds for the old ŷ only. Rows of one group stop together, after the
    same number of steps, at the group's earliest flip. ``z`` and ``state`` are changed in place; call
    again with a new G to go on.

    Args:
        z: [N, V] float32 or float64; −inf marks a masked token and stays.
        grad: G [N, V], floating point.
        state: Adam moments [N, V] in the dtype of ``z``, and steps [N] int64.
        schedule: learning rates float64 [K], or [N, K] where rows differ.
        until: int64 [N], the step each row stops at, at most K; None for K.
        group: int64 [N], number ≥ 0 of each row's group; rows of a group have equal ``state.step``
            and ``until``. None: every row by itself.
        tau: temperature τ > 0.
        noise: key of the rows' Gumbel noise g, or None.
    Returns:
        The rows' hard tokens now, and which of them the last step moved.
    Raises:
        InputError: a shape, dtype or device does not fit, or ``z`` or a tensor of ``state`` overlaps
            itself or another argument.
        RowError: a row of ``z`` has a NaN or +inf logit, or no finite one. Nothing has changed then, but
            on a device, where the error comes later: there a bad row stays and the others move.

    Source: DTO from Wang et al., ICLR 2026 (arXiv:2603.04948); Adam from Kingma & Ba, ICLR 2015.

    Example:
        >>> z, grad = torch.tensor([[1.0, 0.99]]), torch.tensor([[1.0, -1.0]])
        >>> state = AdamState.zeros(z)
        >>> dto_descent(z, grad, state, cosine_schedule(20, 0.01))
        Descent(token=tensor([1]), flipped=tensor([True]))
        >>> state.step  # the descent stopped at the flip
        tensor([1])
    """
    report("dto_descent", row_status(z))
    g = 0 if noise is None else gumbel_noise(noise, z.shape[1]).to(z.dtype)

    def perturbed(part: Tensor, rows: Tensor | slice) -> Tensor:
        return part if noise is None else part + g[rows]

    def gradient(part: Tensor, rows: Tensor | slice) -> Tensor:
        y = perturbed(part, rows)
        p = torch.softmax(tempered(y, tau), dim=-1)
        return softmax_gradient(p, grad[rows].to(p.dtype), y.argmax(dim=-1), tau)

    def hard_token(part: Tensor, rows: Tensor | slice) -> Tensor:
        return perturbed(part, rows).argmax(dim=-1)

    return descend(z, state, schedule, until, group, gradient, hard_token)


@dto_descent.check
def check_dto_descent(z: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any) -> None:
    expect_vocabulary("dto_descent", z.shape[1])
    check_descent("dto_descent", z, grad, state, schedule, **options)


@dto_descent.fake
def fake_dto_descent(z: Tensor, *_: Any, **__: Any) -> Descent:
    return Descent(z.new_empty(z.shape[0], dtype=torch.int64), z.new_empty(z.shape[0], dtype=torch.bool))


@dto_descent.backend(
    "cpu",
    refuses=lambda z, *inputs, **options: native_backend.descent_refusal("z", z, *inputs, **options),
    finds_overlaps=True,
)
def dto_descent_cpu(z: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any) -> Descent:
    return descend_native("dto_descent", z, None, grad, state, schedule, **options)


@dto_descent.backend(
    "triton",
    refuses=lambda z, grad, state, *_, **__: triton_backend.descent_refusal("z", z, grad, state),
)
def dto_descent_triton(
    z: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any
) -> Descent:
    from nabla_fast.triton_kernels import dto_descent as kernels

    return reported("dto_descent", *kernels.dto_descent(z, grad, *state, schedule, **options))


@dto_descent.backend(
    "cuda",
    refuses=lambda z, grad, state, *_, **__: cuda_backend.descent_refusal("z", z, grad, state),
)
def dto_descent_cuda(
    z: Tensor, grad: Tensor, state: AdamState, schedule: Tensor, **options: Any
) -> Descent:
    return descend_by_cuda("dto_descent", z, None, grad, state, schedule, **options)
