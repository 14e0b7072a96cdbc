"""The softmax-relaxed embedding mix over logits, and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.ops.checks import expect_mix
from nabla_fast.ops.cuda_calls import mix_backward_by_cuda, mix_by_cuda
from nabla_fast.ops.gumbel_noise import NOISE_RULE, GumbelNoise, contiguous, perturbed
from nabla_fast.ops.limits import cuda_backend, native_backend, triton_backend
from nabla_fast.ops.registry import floats, op
from nabla_fast.ops.rows import accumulation_dtype, report, row_status
from nabla_fast.ops.softmax import onehot_gradient, softmax_gradient, tempered

# Of tables and what else a mix has, beside logits or hidden states.
MIX_RULES = {"tables": floats("V", "H_t"), "noise": NOISE_RULE, "direct": floats("N", "V")}
COTANGENT_RULES = {"cotangents": floats("N", "H_t")}


@op(arguments={"logits": floats("N", "V"), **MIX_RULES}, reads=())
def embedding_mix(
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float = 1.0,
    hard: bool = True,
    noise: GumbelNoise | None = None,
    direct: Tensor | None = None,
) -> list[Tensor]:
    """e_t = Σ_v y[v] T_t[v] for each table, with y a relaxed one-hot of the row's logits.

    Forward, y is onehot(argmax(z + g)) if ``hard`` (straight-through), else softmax((z + g)/τ), with
    g the rows' Gumbel noise or 0. Backward, y has the softmax's Jacobian in both cases:
    ∂ℒ/∂z = (1/τ) p ⊙ (G − ⟨p, G⟩), G = Σ_t ⟨T_t, ∂ℒ/∂e_t⟩ + direct.

    Differentiable once, in ``logits`` alone: tables, noise and ``direct`` are constants.

    Args:
        logits: z [N, V], floating point; −inf marks a masked token, whose gradient is 0.
        tables: embedding tables [V, H_t], floating point.
        tau: temperature τ > 0.
        hard: straight-through if true, soft if false.
        noise: key of the rows' Gumbel noise, or None.
        direct: [N, V], a gradient with respect to y that does not come through a table, or None.
    Returns:
        One [N, H_t] a table, in the table's dtype.
    Raises:
        InputError: a shape, dtype or device does not fit.
        RowError: a row has a NaN or +inf logit, or no finite one.

    Source: the straight-through estimator from Bengio et al., arXiv:1308.3432; with Gumbel noise, Jang et
    al., ICLR 2017.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
        >>> (mix,) = embedding_mix(logits, [torch.tensor([[1.0], [3.0]])])
        >>> mix.detach()
        tensor([[3.]])
        >>> mix.sum().backward()
        >>> logits.grad
        tensor([[-0.3932,  0.3932]])
    """
    z = logits.to(accumulation_dtype(logits, *tables))
    report("embedding_mix", row_status(z))
    z = perturbed(z, noise)
    if hard:
        token = z.argmax(dim=-1)
        return [table[token] for table in tables]
    p = torch.softmax(tempered(z, tau), dim=-1)
    return [(p @ table.to(p.dtype)).to(table.dtype) for table in tables]


@op(arguments={"logits": floats("N", "V"), **MIX_RULES, **COTANGENT_RULES}, reads=())
def embedding_mix_backward(
    cotangents: Sequence[Tensor],
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> Tensor:
    """∂ℒ/∂z of :func:`embedding_mix`.

    Args:
        cotangents: ∂ℒ/∂e_t [N, H_t], one a table.
        logits, tables, tau, noise, direct: as in the forward.
    Returns:
        [N, V] in the dtype of ``logits``.
    """
    z = perturbed(logits.to(accumulation_dtype(logits, *tables)), noise)
    p = torch.softmax(tempered(z, tau), dim=-1)
    grad = onehot_gradient(cotangents, tables, direct, z.dtype)
    return softmax_gradient(p, grad, z.argmax(dim=-1), tau).to(logits.dtype)


@embedding_mix.check
def check_embedding_mix(logits: Tensor, tables: Sequence[Tensor], *, hard: bool, **options: Any) -> None:
    expect_mix("embedding_mix", logits.shape[1], tables, **options)


@embedding_mix_backward.check
def check_embedding_mix_backward(
    cotangents: Sequence[Tensor], logits: Tensor, tables: Sequence[Tensor], **options: Any
) -> None:
    expect_mix("embedding_mix_backward", logits.shape[1], tables, cotangents, **options)


@embedding_mix.fake
def fake_embedding_mix(logits: Tensor, tables: Sequence[Tensor], **_: Any) -> list[Tensor]:
    return [table.new_empty((logits.shape[0], table.shape[1])) for table in tables]


@embedding_mix_backward.fake
def fake_embedding_mix_backward(
    cotangents: Sequence[Tensor], logits: Tensor, tables: Sequence[Tensor], **_: Any
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@embedding_mix.gradient("logits")
def embedding_mix_gradient(
    arguments: dict[str, Any], outputs: list[Tensor], cotangents: list[Tensor]
) -> Tensor:
    del arguments["hard"]
    return embedding_mix_backward(cotangents, **arguments)


@embedding_mix.backend(
    "cpu",
    refuses=lambda logits, tables, **_: native_backend.mix_refusal(tables, logits=logits),
)
def embedding_mix_cpu(
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    hard: bool,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> list[Tensor]:
    return mix_native("embedding_mix", logits, None, tables, tau, contiguous(noise), hard)


def mix_native(
    name: str,
    rows: Tensor,
    head: Tensor | None,
    tables: Sequence[Tensor],
    tau: float,
    noise: GumbelNoise | None,
    hard: bool,
    perturbed: Tensor | None = None,
) -> list[Tensor]:
    """The mixes by the C++ kernel: ``rows`` are logits, or with a head [V, H] hidden states.

    ``perturbed``: where hidden states' z + g go, for the backward.
    """
    n = rows.shape[0]
    mixes = [torch.empty(n, table.shape[1], dtype=torch.float32, device="cpu") for table in tables]
    status = torch.empty(n, dtype=torch.int32, device="cpu")
    fields = _mix_fields(rows, head, tables, tau, noise)
    extension().embedding_mix(**fields, row_status=status, hard=hard, mixes=mixes, perturbed=perturbed)
    report(name, status)
    return [mix.to(table.dtype) for mix, table in zip(mixes, tables, strict=True)]


def _mix_fields(
    rows: Tensor,
    head: Tensor | None,
    tables: Sequence[Tensor],
    tau: float,
    noise: GumbelNoise | None,
) -> dict[str, Any]:
    """What both C++ kernels read."""
    seed, position = noise or (None, None)
    return {
        "num_threads": torch.get_num_threads(),
        "rows": rows.shape[0],
        "vocab": rows.shape[1] if head is None else head.shape[0],
        "logits": rows if head is None else None,
        "hidden": None if head is None else rows,
        "head": head,
        "tau": tau,
        "noise_seed": seed,
        "noise_position": position,
        "tables": tables,
    }


@embedding_mix_backward.backend(
    "cpu",
    refuses=lambda cotangents, logits, tables, *, direct, **_: native_backend.mix_refusal(
        tables, cotangents=cotangents, direct=direct, logits=logits
    ),
)
def embedding_mix_backward_cpu(
    cotangents: Sequence[Tensor],
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> Tensor:
    return mix_backward_native(cotangents, logits, None, tables, tau, contiguous(noise), direct)


def mix_backward_native(
    cotangents: Sequence[Tensor],
    rows: Tensor,
    head: Tensor | None,
    tables: Sequence[Tensor],
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
    perturbed: Tensor | None = None,
) -> Tensor:
    """∂ℒ/∂rows by the C++ kernel, of logits in their dtype, of hidden states in float32.

    ``perturbed``: hidden states' z + g as the forward left them.
    """
    cotangents = [native_backend.as_native(cotangent) for cotangent in cotangents]
    direct = None if direct is None else native_backend.as_native(direct)
    grad = native_backend.empty_matrix(*rows.shape, rows.dtype if head is None else torch.float32)
    status = torch.empty(rows.shape[0], dtype=torch.int32, device="cpu")
    fields = _mix_fields(rows, head, tables, tau, noise)
    extension().embedding_mix_backward(
        **fields,
        row_status=status,
        cotangents=cotangents,
        direct=direct,
        grad=grad,
        perturbed=perturbed,
    )
    return grad


@embedding_mix.backend(
    "triton",
    refuses=lambda logits, tables, *, noise, direct, **_: triton_backend.refusal(
        logits=logits, tables=tables, noise=noise, direct=direct
    ),
)
def embedding_mix_triton(
    logits: Tensor, tables: Sequence[Tensor], *, tau: float, hard: bool, noise: GumbelNoise | None, **_: Any
) -> list[Tensor]:
    from nabla_fast.triton_kernels import embedding_mix as kernels

    mixes, status = kernels.embedding_mix(logits, list(tables), tau=tau, hard=hard, noise=contiguous(noise))
    report("embedding_mix", status)
    return mixes


@embedding_mix_backward.backend(
    "triton",
    refuses=lambda cotangents, logits, tables, *, noise, direct, **_: triton_backend.refusal(
        cotangents=cotangents, logits=logits, tables=tables, noise=noise, direct=direct
    ),
)
def embedding_mix_backward_triton(
    cotangents: Sequence[Tensor],
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    noise: GumbelNoise | None,
    **options: Any,
) -> Tensor:
    from nabla_fast.triton_kernels import embedding_mix as kernels

    return kernels.embedding_mix_backward(
        list(cotangents), logits, list(tables), noise=contiguous(noise), **options
    )


@embedding_mix.backend(
    "cuda",
    refuses=lambda logits, tables, **_: cuda_backend.refusal(logits.shape[1], logits=logits, tables=tables),
)
def embedding_mix_cuda(
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    hard: bool,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> list[Tensor]:
    return mix_by_cuda("embedding_mix", logits, None, tables, tau, contiguous(noise), hard)


@embedding_mix_backward.backend(
    "cuda",
    refuses=lambda cotangents, logits, tables, *, direct, **_: cuda_backend.refusal(
        logits.shape[1], cotangents=cotangents, logits=logits, tables=tables, direct=direct
    ),
)
def embedding_mix_backward_cuda(
    cotangents: Sequence[Tensor],
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> Tensor:
    return mix_backward_by_cuda(cotangents, logits, None, tables, tau, contiguous(noise), direct)
