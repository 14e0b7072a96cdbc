"""The softmax-relaxed embedding mix over logits, and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.ops.checks import (
    as_native,
    expect_matrix,
    expect_mix,
    native_matrix,
    native_noise,
    native_tau,
)
from nabla_fast.ops.gumbel_noise import GumbelNoise, perturbed
from nabla_fast.ops.registry import op
from nabla_fast.ops.rows import accumulation_dtype, report, row_status
from nabla_fast.ops.softmax import onehot_gradient, softmax_gradient
from nabla_fast.ops.triton_backend import contiguous, takes


@op
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
        logits: z [N, V]; −inf marks a masked token, whose gradient is 0.
        tables: embedding tables [V, H_t].
        tau: temperature τ > 0.
        hard: straight-through if true, soft if false.
        noise: key of the rows' Gumbel noise, or None.
        direct: [N, V], a gradient with respect to y that does not come through a table.
    Returns:
        One [N, H_t] a table, in the table's dtype.
    Raises:
        InputError: a shape, dtype or device does not fit.
        RowError: a row has a NaN or +inf logit, or no finite one.
    """
    z = logits.to(accumulation_dtype(logits, *tables))
    report("embedding_mix", row_status(z))
    z = perturbed(z, noise)
    if hard:
        token = z.argmax(dim=-1)
        return [table[token] for table in tables]
    p = torch.softmax(z / tau, dim=-1)
    return [(p @ table.to(p.dtype)).to(table.dtype) for table in tables]


@op
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
        logits, tables, tau, noise, direct: as given to the forward.
    Returns:
        [N, V] in the dtype of ``logits``.
    """
    z = perturbed(logits.to(accumulation_dtype(logits, *tables)), noise)
    p = torch.softmax(z / tau, dim=-1)
    grad = onehot_gradient(cotangents, tables, direct, z.dtype)
    return softmax_gradient(p, grad, z.argmax(dim=-1), tau).to(logits.dtype)


@embedding_mix.check
def _(logits: Tensor, tables: Sequence[Tensor], *, hard: bool, **options: Any) -> None:
    expect_matrix("embedding_mix", "logits", logits)
    expect_mix("embedding_mix", *logits.shape, tables, logits, **options)


@embedding_mix.fake
def _(logits: Tensor, tables: Sequence[Tensor], **_: Any) -> list[Tensor]:
    return [table.new_empty((logits.shape[0], table.shape[1])) for table in tables]


@embedding_mix_backward.fake
def _(cotangents: Sequence[Tensor], logits: Tensor, tables: Sequence[Tensor], **_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@embedding_mix.gradient("logits")
def _(arguments: dict[str, Any], outputs: list[Tensor], cotangents: list[Tensor]) -> Tensor:
    del arguments["hard"]
    return embedding_mix_backward(cotangents, **arguments)


def native_takes_mix(
    rows: Tensor, head: Tensor | None, tables: Sequence[Tensor], tau: float, *others: Tensor | None
) -> bool:
    """Whether the C++ mixes take logits, or hidden states and a head, and tables like these.

    Args:
        others: cotangents and direct gradient; in float64 they are nothing for float32 kernels.
    """
    return (
        all(native_matrix(tensor) for tensor in (rows, *tables, *([] if head is None else [head])))
        and native_tau(tau)
        and all(other is None or other.dtype != torch.float64 for other in others)
    )


@embedding_mix.backend(
    "cpu", when=lambda logits, tables, *, tau, **_: native_takes_mix(logits, None, tables, tau)
)
def _(
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    hard: bool,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> list[Tensor]:
    mixes, status = _native.Mix(logits, None, tables, tau, native_noise(noise)).forward(hard)
    report("embedding_mix", status)
    return mixes


@embedding_mix_backward.backend(
    "cpu",
    when=lambda cotangents, logits, tables, *, tau, direct, **_: native_takes_mix(
        logits, None, tables, tau, *cotangents, direct
    ),
)
def _(
    cotangents: Sequence[Tensor],
    logits: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> Tensor:
    mix = _native.Mix(logits, None, tables, tau, native_noise(noise))
    return mix.backward([as_native(c) for c in cotangents], None if direct is None else as_native(direct))[
        0
    ]


def triton_takes(
    *tensors: Tensor, tau: float, noise: GumbelNoise | None, direct: Tensor | None, **_: Any
) -> bool:
    """Whether Triton kernels mix tensors like these."""
    return takes(*tensors, *(noise or ()), direct) and 2**-64 <= tau <= 2**64


@embedding_mix.backend(
    "triton", when=lambda logits, tables, **options: triton_takes(logits, *tables, **options)
)
def _(
    logits: Tensor, tables: Sequence[Tensor], *, tau: float, hard: bool, noise: GumbelNoise | None, **_: Any
) -> list[Tensor]:
    from nabla_fast.triton_kernels import embedding_mix as kernels

    mixes, status = kernels.embedding_mix(logits, list(tables), tau=tau, hard=hard, noise=contiguous(noise))
    report("embedding_mix", status)
    return mixes


@embedding_mix_backward.backend(
    "triton",
    when=lambda cotangents, logits, tables, **options: triton_takes(
        *cotangents, logits, *tables, **options
    ),
)
def _(
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
