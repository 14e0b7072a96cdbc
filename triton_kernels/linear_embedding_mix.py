"""The embedding mix with its logits recomputed from hidden states, for some of the rows at a time.

Whole rows of logits in bounded scratch, not tiles of the vocabulary: every product is taken once, where
tiles that are forgotten would be multiplied again for each pass of the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .embedding_mix import embedding_mix, embedding_mix_backward, row_blocks
from .vocabulary_product import vocabulary_product
from .weighted_rows import weighted_rows

Noise = tuple[Tensor, Tensor] | None


def _parts(hidden: Tensor, head: Tensor, noise: Noise) -> Iterator[tuple[slice, Tensor, Noise]]:
    """Rows, their logits in scratch that the next ones overwrite, and their noise."""
    parts = list(row_blocks(len(hidden), len(head))) or [slice(0, 0)]
    scratch = torch.empty(parts[0].stop, len(head), dtype=torch.float32, device=hidden.device)
    for part in parts:
        logits = vocabulary_product([hidden[part]], [head], out=scratch[: part.stop - part.start])
        yield part, logits, (noise[0][part], noise[1][part]) if noise else None


def linear_embedding_mix(
    hidden: Tensor, head: Tensor, tables: list[Tensor], *, tau: float, hard: bool, noise: Noise
) -> tuple[list[Tensor], Tensor]:
    """:func:`~.embedding_mix.embedding_mix` of z = hidden·headᵀ.

    Args:
        hidden: [N, H].
        head: [V, H].
        tables, tau, hard, noise: as there.
    Returns:
        One [N, H_t] a table, in its dtype; the rows' status [N] int32.
    """
    mixes, statuses = [], []
    for _, logits, keys in _parts(hidden, head, noise):
        mix, status = embedding_mix(logits, tables, tau=tau, hard=hard, noise=keys)
        mixes.append(mix)
        statuses.append(status)
    return [torch.cat(parts) for parts in zip(*mixes, strict=True)], torch.cat(statuses)


def linear_embedding_mix_backward(
    cotangents: list[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: list[Tensor],
    *,
    tau: float,
    noise: Noise,
    direct: Tensor | None,
) -> Tensor:
    """∂ℒ/∂h = Wᵀ ∂ℒ/∂z: [N, H] in the dtype of ``hidden``. Arguments as of the two functions above."""
    gradients, scratch = [], None
    for part, logits, keys in _parts(hidden, head, noise):
        scratch = torch.empty_like(logits) if scratch is None else scratch
        grad = embedding_mix_backward(
            [cotangent[part] for cotangent in cotangents],
            logits,
            tables,
            tau=tau,
            noise=keys,
            direct=None if direct is None else direct[part],
            out=scratch[: len(logits)],
        )
        gradients += weighted_rows(grad, [head], dtypes=[hidden.dtype])
    return torch.cat(gradients)
