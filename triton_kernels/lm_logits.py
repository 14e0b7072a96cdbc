"""z = hidden·headᵀ in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import presets
from .products import operands, tile_arguments, tile_of, upcast, vocabulary_tile


@triton.jit
def _lm_logits_kernel(
    states,
    tables,
    state_strides,
    table_strides,
    widths,
    logits_ptr,  # [N, V] float32, contiguous
    rows,  # N
    vocabulary,  # V
    tiles_of_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row, column, _ = tile_of(tiles_of_rows, rows, vocabulary, ROWS, COLUMNS)
    there = (row < rows)[:, None] & (column < vocabulary)[None, :]
    product = vocabulary_tile(
        states,
        tables,
        state_strides,
        table_strides,
        widths,
        tl.minimum(row, rows - 1),
        tl.minimum(column, vocabulary - 1),
        ROWS,
        COLUMNS,
        DEPTH,
        UPCAST,
    )
    tl.store(logits_ptr + row[:, None] * vocabulary + column[None, :], product, mask=there)


def lm_logits(hidden: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden·headᵀ. A row's logits are the same bits whatever the other rows.

    Args:
        hidden: [N, H] float32, bfloat16 or float16, any strides.
        head: [V, H], likewise.
        out: [N, V] float32, contiguous; a new tensor if None.
    Returns:
        [N, V] float32.
    """
    rows, vocabulary = hidden.shape[0], head.shape[0]
    if out is None:
        out = torch.empty(rows, vocabulary, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return out
    config = presets.config("vocabulary_product", operands([hidden], [head]), hidden.device)
    tiles = triton.cdiv(rows, config["ROWS"])
    with torch.cuda.device_of(hidden):
        _lm_logits_kernel[(tiles * triton.cdiv(vocabulary, config["COLUMNS"]),)](
            *tile_arguments([hidden], [head]),
            out,
            rows,
            vocabulary,
            tiles,
            UPCAST=upcast(hidden),
            **config,
        )
    return out
