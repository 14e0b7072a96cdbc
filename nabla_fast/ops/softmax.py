"""The softmax with its hard token and its Jacobian, shared by the mixes and the descents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast.ops.lm_logits import mapped_logits


def tempered(z: Tensor, tau: float) -> Tensor:
    """Logits whose softmax is that of z/τ: z/τ itself, or (z − max z)/τ in rows where that overflows.

    Args:
        z: [N, V].
        tau: τ.
    Returns:
        [N, V].
    """
    top = z.amax(dim=-1, keepdim=True)
    overflows = (top / tau).isinf() & top.isfinite()
    return torch.where(overflows, (z - top) / tau, z / tau)


def softmax_gradient(p: Tensor, grad: Tensor, token: Tensor, tau: float) -> Tensor:
    """∂ℒ/∂z = (1/τ) p ⊙ (G − ⟨p, G⟩) for p = softmax(z/τ).

    G is first centred at the hard token: where p is nearly one-hot, G[ŷ] − ⟨p, G⟩ is a difference
    of nearly equal numbers, and Adam would turn its rounding error into a step of full size. ⟨p, G⟩ is
    divided by Σp, which a float32 softmax over a large vocabulary leaves a few 1e-6 away from 1.

    Args:
        p: [N, V].
        grad: G [N, V]; its values where p is 0 do not matter, infinite or not.
        token: ŷ [N] int64, the argmax of each row of p.
        tau: τ.
    Returns:
        [N, V], exactly 0 where p is.
    """
    centred = grad - grad.gather(1, token[:, None])
    centred = centred.masked_fill(p == 0, 0)
    mean = (p * centred).sum(dim=-1, keepdim=True) / p.sum(dim=-1, keepdim=True)
    return p * (centred - mean) / tau


def onehot_gradient(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    direct: Tensor | None,
    dtype: torch.dtype,
    token_maps: Sequence[Tensor | None] = (),
) -> Tensor:
    """G = Σ_t g_t·T_tᵀ + direct.

    Args:
        cotangents: one [N, H_t] a table.
        tables: one [V, H_t] each, or [V_t, H_t] with a map.
        direct: [N, V] or None.
        dtype: of the products and the result.
        token_maps: none at all, or one a table: [V] int64, the row that stands for each token, or None.
    Returns:
        [N, V].
    """
    maps = token_maps or [None] * len(tables)
    triples = zip(cotangents, tables, maps, strict=True)
    grad = sum(mapped_logits(g.to(dtype), table, token_map) for g, table, token_map in triples)
    return grad if direct is None else grad + direct.to(dtype)
