"""Σ_t states_t·tables_tᵀ in float32: logits, or the gradient of one-hot tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import tile_arguments, tile_config, tile_of, upcast, vocabulary_tile


@triton.jit(do_not_specialize=["rows", "tiles_of_rows"])
def _vocabulary_product_kernel(
    states,
    tables,
    state_strides,
    table_strides,
    widths,
    shift_ptr,  # [N] float32 if SHIFT: taken from each row
    product_ptr,  # [N, V] float32, contiguous
    rows,  # N
    vocabulary,  # V
    tiles_of_rows,
    SHIFT: tl.constexpr,
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
    if SHIFT:
        product -= tl.load(shift_ptr + tl.minimum(row, rows - 1))[:, None]
    tl.store(product_ptr + row[:, None] * vocabulary + column[None, :], product, mask=there)


def vocabulary_product(
    states: list[Tensor],
    tables: list[Tensor],
    *,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Σ_t states_t·tables_tᵀ − shift. A row is the same bits whatever the other rows.

    Args:
        states: [N, H_t] each: float32, bfloat16 or float16, any strides.
        tables: [V, H_t] each, likewise.
        shift: [N] float32 or None.
        out: [N, V] float32, contiguous; a new tensor if None.
    Returns:
        [N, V] float32.
    """
    rows, vocabulary = len(states[0]), len(tables[0])
    if out is None:
        out = torch.empty(rows, vocabulary, dtype=torch.float32, device=tables[0].device)
    if rows == 0:
        return out
    config = tile_config("vocabulary_product", states, tables)
    tiles = triton.cdiv(rows, config["ROWS"])
    with torch.cuda.device_of(out):
        _vocabulary_product_kernel[(tiles * triton.cdiv(vocabulary, config["COLUMNS"]),)](
            *tile_arguments(states, tables),
            out if shift is None else shift,
            out,
            rows,
            vocabulary,
            tiles,
            SHIFT=shift is not None,
            UPCAST=upcast(out),
            **config,
        )
    return out
