"""The embedding mix with its logits recomputed from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nabla_fast import _native
from nabla_fast.ops.checks import as_native, expect_matrix, expect_mix, native_noise
from nabla_fast.ops.embedding_mix import (
    embedding_mix,
    embedding_mix_backward,
    native_takes_mix,
    triton_takes,
)
from nabla_fast.ops.gumbel_noise import GumbelNoise
from nabla_fast.ops.lm_logits import lm_logits, logits_backward
from nabla_fast.ops.registry import op
from nabla_fast.ops.rows import report, row_status
from nabla_fast.ops.triton_backend import contiguous


@op
def linear_embedding_mix(
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float = 1.0,
    hard: bool = True,
    noise: GumbelNoise | None = None,
    direct: Tensor | None = None,
) -> list[Tensor]:
    """:func:`~nabla_fast.ops.embedding_mix` of z = hidden·headᵀ, differentiable once, in ``hidden``.

    ∂ℒ/∂h = Wᵀ ∂ℒ/∂z, with W the head.

    Args:
        hidden: h [N, H].
        head: W [V, H], a constant.
        tables, tau, hard, noise, direct: as of ``embedding_mix``.
    Returns:
        One [N, H_t] a table, in the table's dtype.
    Raises:
        InputError: a shape, dtype or device does not fit.
        RowError: a row's logits have a NaN or +inf, or no finite value.
    """
    z = lm_logits(hidden, head)
    report("linear_embedding_mix", row_status(z))
    return embedding_mix.body(z, tables, tau=tau, hard=hard, noise=noise, direct=direct)


@op
def linear_embedding_mix_backward(
    cotangents: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> Tensor:
    """∂ℒ/∂h of :func:`linear_embedding_mix`: [N, H] in the dtype of ``hidden``."""
    z = lm_logits(hidden, head)
    dz = embedding_mix_backward.body(cotangents, z, tables, tau=tau, noise=noise, direct=direct)
    return logits_backward(dz, head).to(hidden.dtype)


@linear_embedding_mix.check
def _(hidden: Tensor, head: Tensor, tables: Sequence[Tensor], *, hard: bool, **options: Any) -> None:
    name = "linear_embedding_mix"
    expect_matrix(name, "hidden", hidden)
    expect_matrix(name, "head", head, columns=hidden.shape[1])
    expect_mix(name, len(hidden), len(head), tables, hidden, head, **options)


@linear_embedding_mix.fake
def _(hidden: Tensor, head: Tensor, tables: Sequence[Tensor], **_: Any) -> list[Tensor]:
    return [table.new_empty((hidden.shape[0], table.shape[1])) for table in tables]


@linear_embedding_mix_backward.fake
def _(
    cotangents: Sequence[Tensor], hidden: Tensor, head: Tensor, tables: Sequence[Tensor], **_: Any
) -> Tensor:
    return hidden.new_empty(hidden.shape)


@linear_embedding_mix.gradient("hidden")
def _(arguments: dict[str, Any], outputs: list[Tensor], cotangents: list[Tensor]) -> Tensor:
    del arguments["hard"]
    return linear_embedding_mix_backward(cotangents, **arguments)


@linear_embedding_mix.backend(
    "cpu", when=lambda hidden, head, tables, *, tau, **_: native_takes_mix(hidden, head, tables, tau)
)
def _(
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    hard: bool,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> list[Tensor]:
    mixes, status = _native.Mix(hidden, head, tables, tau, native_noise(noise)).forward(hard)
    report("linear_embedding_mix", status)
    return mixes


@linear_embedding_mix_backward.backend(
    "cpu",
    when=lambda cotangents, hidden, head, tables, *, tau, direct, **_: native_takes_mix(
        hidden, head, tables, tau, *cotangents, direct
    ),
)
def _(
    cotangents: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> Tensor:
    mix = _native.Mix(hidden, head, tables, tau, native_noise(noise))
    grad, _ = mix.backward(
        [as_native(c) for c in cotangents], None if direct is None else as_native(direct)
    )
    return grad.to(hidden.dtype)


@linear_embedding_mix.backend(
    "triton",
    when=lambda hidden, head, tables, **options: triton_takes(hidden, head, *tables, **options),
)
def _(
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
    when=lambda cotangents, hidden, head, tables, **options: triton_takes(
        *cotangents, hidden, head, *tables, **options
    ),
)
def _(
    cotangents: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: Sequence[Tensor],
    *,
    noise: GumbelNoise | None,
    **options: Any,
) -> Tensor:
    from nabla_fast.triton_kernels import linear_embedding_mix as kernels

    return kernels.linear_embedding_mix_backward(
        list(cotangents), hidden, head, list(tables), noise=contiguous(noise), **options
    )
