"""Σ_t states_t·tables_tᵀ in float32: logits, or the gradient of one-hot tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library_products import add_vocabulary_products, multiplies
from .products import operands, tile_arguments, tile_config, tile_of, upcast, vocabulary_tile


@triton.jit(do_not_specialize=["rows", "tiles_of_rows"])
def _vocabulary_product_kernel(
    states,
    tables,
    state_strides,
    table_strides,
    widths,
    product_ptr,  # [N, V] float32, contiguous
    rows,  # N
    vocabulary,  # V
    tiles_of_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row, column, _ = tile_of(tiles_of_rows, rows, vocabulary, ROWS, COLUMNS)
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
    there = (row < rows)[:, None] & (column < vocabulary)[None, :]
    tl.store(product_ptr + row[:, None] * vocabulary + column[None, :], product, mask=there)


def vocabulary_product(states: list[Tensor], tables: list[Tensor], *, out: Tensor | None = None) -> Tensor:
    """Σ_t states_t·tables_tᵀ. A row is the same bits whatever the other rows.

    Args:
        states: [N, H_t] each: float32, bfloat16 or float16, any strides.
        tables: [V, H_t] each, likewise.
        out: [N, V] float32, contiguous; a new tensor if None.
    Returns:
        ``out``.
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
            out,
            rows,
            vocabulary,
            tiles,
            UPCAST=upcast(out),
            **config,
        )
    return out


def chunk_product(states: list[Tensor], tables: list[Tensor], out: Tensor) -> None:
    """Σ_t states_t·tables_tᵀ by the library, where a row need not be the same bits in any batch.

    The library has no product of float32 with bfloat16; converted to float32, the tables would be
    multiplied at a tenth of the rate that three bfloat16 terms of the states have here.

    Args:
        states: [N, H_t] each.
        tables: [C, H_t] each.
        out: [N, C] float32, contiguous.
    """
    if operands(states, tables) == "split" and not all(map(multiplies, states, tables)):
        vocabulary_product(states, tables, out=out)
    else:
        add_vocabulary_products(out, states, tables)
