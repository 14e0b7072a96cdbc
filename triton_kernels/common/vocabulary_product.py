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
    product_ptr,  # [N, V], contiguous
    rest_ptr,  # [N, V] bfloat16, contiguous, if SPLIT: what product_ptr's dtype has no bits for
    rows,  # N
    vocabulary,  # V
    tiles_of_rows,
    SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    LARGEST: tl.constexpr,  # finite number of product_ptr's dtype
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
    at = row[:, None] * vocabulary + column[None, :]
    if SPLIT:
        # Within range, what is left of a float16 past its largest number is the rest's.
        high = tl.minimum(tl.maximum(product, -LARGEST), LARGEST).to(product_ptr.dtype.element_ty)
        rest = product - high.to(tl.float32)
        tl.store(product_ptr + at, high, mask=there)
        tl.store(rest_ptr + at, rest.to(tl.bfloat16), mask=there)
    else:
        tl.store(product_ptr + at, product, mask=there)


def vocabulary_product(
    states: list[Tensor],
    tables: list[Tensor],
    *,
    shift: Tensor | None = None,
    out: Tensor | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    """Σ_t states_t·tables_tᵀ − shift. A row is the same bits whatever the other rows.

    In half precision the product is the sum of ``out`` and ``rest``: 16 bits of it, and more of a
    float16's.

    Args:
        states: [N, H_t] each: float32, bfloat16 or float16, any strides.
        tables: [V, H_t] each, likewise.
        shift: [N] float32 or None.
        out: [N, V] float32, or with ``rest`` also bfloat16 or float16; contiguous. A new float32
            tensor if None.
        rest: [N, V] bfloat16, contiguous, or None.
    Returns:
        ``out``.
    """
    rows, vocabulary = len(states[0]), len(tables[0])
    if out is None:
        out = torch.empty(rows, vocabulary, dtype=torch.float32, device=tables[0].device)
    if rows == 0:
        return out
    # Splitting a tile in two takes registers, which the largest tiles do not leave.
    kernel = "vocabulary_product" if rest is None else "vocabulary_epilogue"
    config = tile_config(kernel, states, tables)
    tiles = triton.cdiv(rows, config["ROWS"])
    with torch.cuda.device_of(out):
        _vocabulary_product_kernel[(tiles * triton.cdiv(vocabulary, config["COLUMNS"]),)](
            *tile_arguments(states, tables),
            out if shift is None else shift,
            out,
            out if rest is None else rest,
            rows,
            vocabulary,
            tiles,
            SHIFT=shift is not None,
            SPLIT=rest is not None,
            LARGEST=torch.finfo(out.dtype).max,
            UPCAST=upcast(out),
            **config,
        )
    return out
