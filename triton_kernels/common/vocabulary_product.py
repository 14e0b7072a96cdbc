"""Σ_t states_t·tables_tᵀ in float32: logits, or the gradient of one-hot tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched
from .library_products import add_vocabulary_products, converted_bytes
from .products import (
    in_terms,
    operands,
    parts_in_terms,
    terms_bytes,
    tile_arguments,
    tile_config,
    tile_of,
    upcast,
    vocabulary_tile,
)
from .sizes import cdiv


@launched
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
    row, column, _ = tile_of(tiles_of_rows, vocabulary, state_strides, ROWS, COLUMNS)
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
        states: [N, H_t] each: float32, bfloat16 or float16, any strides; or by
            :func:`~.products.in_terms`.
        tables: [V, H_t] each, likewise.
        out: [N, V] float32, contiguous; a new tensor if None.
    Returns:
        ``out``.
    """
    rows, vocabulary = states[0].shape[-2], len(tables[0])
    if out is None:
        out = torch.empty(rows, vocabulary, dtype=torch.float32, device=tables[0].device)
    if rows == 0:
        return out
    config = tile_config("vocabulary_product", states, tables)
    slices = cdiv(vocabulary, config["COLUMNS"])
    with torch.cuda.device_of(out):
        for part, of_part in parts_in_terms(states, tables):
            size = part.stop - part.start
            tiles = cdiv(size, config["ROWS"])
            _vocabulary_product_kernel[(tiles * slices,)](
                *tile_arguments(of_part, tables),
                out[part],
                size,
                vocabulary,
                tiles,
                UPCAST=upcast(out),
                **config,
            )
    return out


def chunk_states(states: list[Tensor], tables: list[Tensor]) -> list[Tensor]:
    """What :func:`chunk_product` takes for the chunks of these tables: made once for all of them."""
    return in_terms(states, tables) if operands(states, tables) == "split" else states


def chunk_bytes(states: list[Tensor], tables: list[Tensor]) -> int:
    """That a row of :func:`chunk_states` and of :func:`chunk_product` takes beside its results."""
    take = terms_bytes if operands(states, tables) == "split" else converted_bytes
    return take(states, tables)


def chunk_product(states: list[Tensor], tables: list[Tensor], out: Tensor) -> None:
    """Σ_t states_t·tables_tᵀ by the library, where a row need not be the same bits in any batch.

    The library has no product of float32 with bfloat16; converted to float32, the tables would be
    multiplied at a tenth of the rate that three bfloat16 terms of the states have here.

    Args:
        states: of :func:`chunk_states`.
        tables: [C, H_t] each.
        out: [N, C] float32, contiguous.
    """
    if operands(states, tables) == "split":
        vocabulary_product(states, tables, out=out)
    else:
        add_vocabulary_products(out, states, tables)
