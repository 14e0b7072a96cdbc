"""The softmax-relaxed embedding mix over logits that are recomputed from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.checks import expect, expect_mix
from nabla_fast.ops.cuda_calls import mix_backward_by_cuda, mix_by_cuda
from nabla_fast.ops.embedding_mix import (
    COTANGENT_RULES,
    MIX_RULES,
    embedding_mix,
    embedding_mix_backward,
    mix_backward_native,
    mix_native,
)
from nabla_fast.ops.gumbel_noise import GumbelNoise, contiguous
from nabla_fast.ops.head_map import (
    BIAS_RULE,
    check_head_map,
    head_map_refusal,
    is_product,
    product_gradient,
)
from nabla_fast.ops.limits import cuda_backend, native_backend, triton_backend
from nabla_fast.ops.lm_logits import lm_logits, logits_backward
from nabla_fast.ops.registry import floats, op
from nabla_fast.ops.registry.gradients import is_recorded, keep, kept
from nabla_fast.ops.rows import report, row_status

# Bytes of z + g that the C++ kernel keeps from a forward to its backward, at most: of 64 rows, V up to
# 262,144. A product of hidden states and head is a third of what the backward multiplies.
MOST_KEPT_BYTES = 64 << 20

_HIDDEN_RULES = {"hidden": floats("N", "H"), "head": floats("V", "H"), **BIAS_RULE}


@op(arguments={**_HIDDEN_RULES, **MIX_RULES}, reads=())
def linear_embedding_mix(
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float = 1.0,
    hard: bool = True,
    noise: GumbelNoise | None = None,
    direct: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> list[Tensor]:
    """:func:`~nabla_fast.ops.embedding_mix` of z = hidden·headᵀ, differentiable once, in ``hidden``.

    ∂ℒ/∂h = Wᵀ ∂ℒ/∂(hidden·headᵀ), with W the lm_head. Of logits that are the product itself, the C++
    kernel keeps z + g in float32 from a forward with a gradient to its backward where they take at most
    64 MiB, as of 64 rows of 151,936 logits; others, and those of other backends, are computed again.

    Args:
        hidden: h [N, H], floating point.
        head: W [V, H], floating point, a constant.
        tables, tau, hard, noise, direct: as in ``embedding_mix``.
        bias, scale, softcap: of the logits, as in ``lm_logits``; without them z = h·headᵀ.
    Returns:
        One [N, H_t] a table, in the table's dtype.
    Raises:
        InputError: a shape, dtype or device does not fit.
        RowError: a row's logits have a NaN or +inf, or no finite value.

    Example:
        >>> hidden, head = torch.tensor([[0.0, 1.0]], requires_grad=True), torch.eye(2)
        >>> (mix,) = linear_embedding_mix(hidden, head, [torch.tensor([[1.0], [3.0]])])
        >>> mix.sum().backward()
        >>> hidden.grad
        tensor([[-0.3932,  0.3932]])
    """
    z = lm_logits(hidden, head, bias=bias, scale=scale, softcap=softcap)
    report("linear_embedding_mix", row_status(z))
    return embedding_mix.body(z, tables, tau=tau, hard=hard, noise=noise, direct=direct)


@op(arguments={**_HIDDEN_RULES, **MIX_RULES, **COTANGENT_RULES}, reads=())
def linear_embedding_mix_backward(
    cotangents: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """∂ℒ/∂h of :func:`linear_embedding_mix`.

    Args:
        cotangents: ∂ℒ/∂e_t [N, H_t], one a table.
        hidden, head, tables, tau, noise, direct, bias, scale, softcap: as in the forward.
    Returns:
        [N, H] in the dtype of ``hidden``.
    """
    z = lm_logits(hidden, head, bias=bias, scale=scale, softcap=softcap)
    dz = embedding_mix_backward.body(cotangents, z, tables, tau=tau, noise=noise, direct=direct)
    return logits_backward(product_gradient(dz, z, scale, softcap), head).to(hidden.dtype)


@linear_embedding_mix.check
def check_linear_embedding_mix(
    hidden: Tensor, head: Tensor, tables: Sequence[Tensor], *, hard: bool, **options: Any
) -> None:
    _check("linear_embedding_mix", hidden, head, tables, **options)


@linear_embedding_mix_backward.check
def check_linear_embedding_mix_backward(
    cotangents: Sequence[Tensor], hidden: Tensor, head: Tensor, tables: Sequence[Tensor], **options: Any
) -> None:
    _check("linear_embedding_mix_backward", hidden, head, tables, cotangents, **options)


def _check(
    name: str,
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    **options: Any,
) -> None:
    check_head_map(name, bias, scale, softcap)
    expect(hidden.shape[1] > 0, f"{name}: hidden must have at least one column")
    expect_mix(name, len(head), tables, cotangents, **options)


@linear_embedding_mix.fake
def fake_linear_embedding_mix(
    hidden: Tensor, head: Tensor, tables: Sequence[Tensor], **_: Any
) -> list[Tensor]:
    return [table.new_empty((hidden.shape[0], table.shape[1])) for table in tables]


@linear_embedding_mix_backward.fake
def fake_linear_embedding_mix_backward(
    cotangents: Sequence[Tensor], hidden: Tensor, head: Tensor, tables: Sequence[Tensor], **_: Any
) -> Tensor:
    return hidden.new_empty(hidden.shape)


@linear_embedding_mix.gradient("hidden")
def linear_embedding_mix_gradient(
    arguments: dict[str, Any], outputs: list[Tensor], cotangents: list[Tensor]
) -> Tensor:
    del arguments["hard"]
    return linear_embedding_mix_backward(cotangents, **arguments)


@linear_embedding_mix.backend(
    "cpu",
    refuses=lambda hidden, head, tables, **_: native_backend.mix_refusal(tables, hidden=hidden, head=head),
)
def linear_embedding_mix_cpu(
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    hard: bool,
    noise: GumbelNoise | None,
    direct: Tensor | None,
    **head_map: Any,
) -> list[Tensor]:
    if not is_product(**head_map):
        z = lm_logits(hidden, head, **head_map)
        return mix_native("linear_embedding_mix", z, None, tables, tau, contiguous(noise), hard)
    perturbed = None
    elements = len(head) * (-(-len(hidden) // 16) * 16)
    if is_recorded("linear_embedding_mix") and 4 * elements <= MOST_KEPT_BYTES:
        perturbed = torch.empty(elements, dtype=torch.float32, device="cpu")
        keep(perturbed)
    return mix_native("linear_embedding_mix", hidden, head, tables, tau, contiguous(noise), hard, perturbed)


@linear_embedding_mix_backward.backend(
    "cpu",
    refuses=lambda cotangents, hidden, head, tables, *, direct, **_: native_backend.mix_refusal(
        tables, cotangents=cotangents, direct=direct, hidden=hidden, head=head
    ),
)
def linear_embedding_mix_backward_cpu(
    cotangents: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
    **head_map: Any,
) -> Tensor:
    if not is_product(**head_map):
        z = lm_logits(hidden, head, **head_map)
        dz = mix_backward_native(cotangents, z, None, tables, tau, contiguous(noise), direct)
        du = product_gradient(dz, z, head_map["scale"], head_map["softcap"])
        return logits_backward(du, head).to(hidden.dtype)
    perturbed = kept("linear_embedding_mix")
    grad = mix_backward_native(cotangents, hidden, head, tables, tau, contiguous(noise), direct, perturbed)
    return grad.to(hidden.dtype)


@linear_embedding_mix.backend(
    "triton",
    refuses=lambda hidden, head, tables, *, noise, direct, **options: (
        triton_backend.refusal(hidden=hidden, head=head, tables=tables, noise=noise, direct=direct)
        or head_map_refusal("Triton", **options)
    ),
)
def linear_embedding_mix_triton(
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    hard: bool,
    noise: GumbelNoise | None,
    **_: Any,
) -> list[Tensor]:
    from nabla_fast.triton_kernels import linear_embedding_mix as kernels

    mixes, status = kernels.linear_embedding_mix(
        hidden, head, list(tables), tau=tau, hard=hard, noise=contiguous(noise)
    )
    report("linear_embedding_mix", status)
    return mixes


@linear_embedding_mix_backward.backend(
    "triton",
    refuses=lambda cotangents, hidden, head, tables, *, noise, direct, **options: (
        triton_backend.refusal(
            cotangents=cotangents, hidden=hidden, head=head, tables=tables, noise=noise, direct=direct
        )
        or head_map_refusal("Triton", **options)
    ),
)
def linear_embedding_mix_backward_triton(
    cotangents: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
    **_: Any,
) -> Tensor:
    from nabla_fast.triton_kernels import linear_embedding_mix as kernels

    return kernels.linear_embedding_mix_backward(
        list(cotangents), hidden, head, list(tables), tau=tau, noise=contiguous(noise), direct=direct
    )


@linear_embedding_mix.backend(
    "cuda",
    refuses=lambda hidden, head, tables, **options: (
        cuda_backend.refusal(len(head), hidden=hidden, head=head, tables=tables)
        or head_map_refusal("CUDA", **options)
    ),
)
def linear_embedding_mix_cuda(
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    hard: bool,
    noise: GumbelNoise | None,
    direct: Tensor | None,
    **_: Any,
) -> list[Tensor]:
    return mix_by_cuda("linear_embedding_mix", hidden, head, tables, tau, contiguous(noise), hard)


@linear_embedding_mix_backward.backend(
    "cuda",
    refuses=lambda cotangents, hidden, head, tables, *, direct, **options: (
        cuda_backend.refusal(
            len(head), cotangents=cotangents, hidden=hidden, head=head, tables=tables, direct=direct
        )
        or head_map_refusal("CUDA", **options)
    ),
)
def linear_embedding_mix_backward_cuda(
    cotangents: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
    **_: Any,
) -> Tensor:
    grad = mix_backward_by_cuda(cotangents, hidden, head, tables, tau, contiguous(noise), direct)
    return grad.to(hidden.dtype)
