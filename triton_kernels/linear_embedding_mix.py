"""The embedding mix with its logits recomputed from hidden states, for some of the rows at a time.

Whole rows of logits in bounded scratch, not tiles of the vocabulary: every product is taken once, where
tiles that are forgotten would be multiplied again for each pass of the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common.gumbel import add_gumbel_noise
from .common.scratch import row_blocks, share
from .common.softmax_sums import softmax_sums
from .common.vocabulary_product import vocabulary_product
from .common.weighted_rows import weighted_rows
from .embedding_mix import embedding_mix_backward, mix_rows

Noise = tuple[Tensor, Tensor] | None


def _perturbed(hidden: Tensor, head: Tensor, noise: Noise, part: slice, memory: Tensor) -> Tensor:
    """hidden·headᵀ + g of some rows, in the first of ``memory``: [n, V] float32."""
    size, vocabulary = part.stop - part.start, len(head)
    logits = memory[: size * vocabulary].view(size, vocabulary)
    vocabulary_product([hidden[part]], [head], out=logits)
    if noise is not None:
        add_gumbel_noise(logits, noise[0][part], noise[1][part])
    return logits


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
    rows, vocabulary = len(hidden), len(head)
    mixes = [table.new_empty(rows, table.shape[1]) for table in tables]
    status = hidden.new_empty(rows, dtype=torch.int32)
    parts = list(row_blocks(rows, 4 * vocabulary, share(11)))
    memory = hidden.new_empty(parts[0].stop * vocabulary if parts else 0, dtype=torch.float32)
    for part in parts:
        logits = _perturbed(hidden, head, noise, part, memory)
        sums = softmax_sums(logits, tau)
        status[part] = sums.status
        mix_rows(logits, tables, sums, tau, hard, [mix[part] for mix in mixes], scratch=share(4))
    return mixes, status


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
    """∂ℒ/∂h = Wᵀ ∂ℒ/∂z: [N, H] in the dtype of ``hidden``. Arguments as of the two functions above.

    Logits and ∂ℒ/∂z are both there, 8 bytes a logit. One of them alone would do if Wᵀ met p and
    p ⊙ (G − G[ŷ]) one after the other, since ⟨p, G⟩ is known last: a third product with W, and a softmax
    in the epilogue of a product.
    """
    rows, vocabulary = len(hidden), len(head)
    result = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    # Partial sums of the result take the place of the logits, which are no longer needed.
    first = max(vocabulary, hidden.shape[1])
    parts = list(row_blocks(rows, 4 * (first + vocabulary), share(15)))
    if not parts:
        return result
    memory, other = (
        hidden.new_empty(parts[0].stop * columns, dtype=torch.float32) for columns in (first, vocabulary)
    )
    for part in parts:
        logits = _perturbed(hidden, head, noise, part, memory)
        grad = embedding_mix_backward(
            [cotangent[part] for cotangent in cotangents],
            logits,
            tables,
            tau=tau,
            noise=None,
            direct=None if direct is None else direct[part],
            out=other[: logits.numel()].view_as(logits),
        )
        weighted_rows(grad, [head], out=[result[part]], scratch=memory)
    return result
