"""Rows of the one-hot gradient, and their norms, from small tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import launched
from .common.products import (
    map_arguments,
    parts_in_terms,
    terms_bytes,
    tile_arguments,
    tile_config,
    tile_of,
    upcast,
    vocabulary_tile,
)
from .common.row_totals import row_totals
from .common.scratch import row_blocks, share
from .common.sizes import cdiv
from .common.softmax_sums import softmax_sums
from .common.vocabulary_product import vocabulary_product


@launched
@triton.jit(do_not_specialize=["rows", "tiles_of_rows", "slices"])
def _onehot_grad_kernel(
    states,  # [N, H_t] each, or their terms: ∂ℒ/∂e_t
    tables,  # [V, H_t] each, or [V_t, H_t] with a map
    state_strides,
    table_strides,
    widths,
    logits_ptr,  # [N, V] float32, contiguous; G takes its place unless NORM
    top_ptr,  # [N] float32
    total_ptr,  # [N] float32
    squares_ptr,  # [N, slices] float32 if NORM: Σ G² over a tile
    rows,
    vocabulary,
    tiles_of_rows,
    slices,
    nll_coeff,
    maps,  # of vocabulary_tile, as are last_rows and MAPPED
    last_rows,
    MAPPED: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row, column, slice = tile_of(tiles_of_rows, vocabulary, state_strides, ROWS, COLUMNS)
    within = tl.minimum(row, rows - 1)
    there = (row < rows)[:, None] & (column < vocabulary)[None, :]
    grad = vocabulary_tile(
        states,
        tables,
        state_strides,
        table_strides,
        widths,
        within,
        tl.minimum(column, vocabulary - 1),
        ROWS,
        COLUMNS,
        DEPTH,
        UPCAST,
        maps,
        last_rows,
        MAPPED,
    )
    at = logits_ptr + row[:, None] * vocabulary + column[None, :]
    z = tl.load(at, mask=there, other=0.0)
    log_pi = (z - tl.load(top_ptr + within)[:, None]) - tl.log(tl.load(total_ptr + within))[:, None]
    masked = log_pi == -float("inf")
    grad = tl.where(masked, 0.0, grad - nll_coeff * tl.where(masked, 0.0, log_pi))
    if NORM:
        grad = tl.where(there, grad, 0.0)
        tl.store(squares_ptr + row * slices + slice, tl.sum(grad * grad, axis=1), mask=row < rows)
    else:
        tl.store(at, grad, mask=there)


def _launch(
    cotangents: list[Tensor],
    tables: list[Tensor],
    logits: Tensor,
    nll_coeff: float,
    token_maps: list[Tensor | None],
    squares: Tensor | None = None,
) -> Tensor:
    vocabulary = logits.shape[1]
    sums = softmax_sums(logits, 1.0)
    config = tile_config("vocabulary_epilogue", cotangents, tables)
    slices = cdiv(vocabulary, config["COLUMNS"])
    with torch.cuda.device_of(logits):
        for part, of_part in parts_in_terms(cotangents, tables):
            rows = part.stop - part.start
            tiles = cdiv(rows, config["ROWS"])
            _onehot_grad_kernel[(tiles * slices,)](
                *tile_arguments(of_part, tables),
                logits[part],
                sums.top[part],
                sums.total[part],
                (logits if squares is None else squares)[part],
                rows,
                vocabulary,
                tiles,
                slices,
                nll_coeff,
                **map_arguments(tables, token_maps),
                NORM=squares is not None,
                UPCAST=upcast(logits),
                **config,
            )
    return sums.status


def onehot_grad(
    cotangents: list[Tensor],
    tables: list[Tensor],
    hidden: Tensor,
    head: Tensor,
    nll_coeff: float,
    token_maps: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """G[v] = Σ_t ⟨T_t[v], ∂ℒ/∂e_t⟩ − ν log π(v), 0 where π is.

    Args:
        cotangents: [N, H_t] each.
        tables: [V, H_t] each, or [V_t, H_t] with a map.
        hidden: [N, H].
        head: [V, H].
        nll_coeff: ν.
        token_maps: none at all, or one a table: None, or [V] int64, contiguous, the row of the table
            that stands for each token.
    Returns:
        [N, V] float32, NaN in a bad row; the status [N] int32 of the rows of hidden·headᵀ.
    """
    grad = vocabulary_product([hidden], [head])
    if len(grad) == 0:
        return grad, grad.new_empty(0, dtype=torch.int32)
    return grad, _launch(cotangents, tables, grad, nll_coeff, token_maps)


def onehot_grad_norm(
    cotangents: list[Tensor],
    tables: list[Tensor],
    hidden: Tensor,
    head: Tensor,
    nll_coeff: float,
    token_maps: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """‖G_i‖₂ of every row of :func:`onehot_grad`: [N] float32, and its status [N] int32.

    Logits exist for some of the rows at a time, G does not.
    """
    rows, vocabulary = len(hidden), len(head)
    norms = hidden.new_empty(rows, dtype=torch.float32)
    status = hidden.new_empty(rows, dtype=torch.int32)
    config = tile_config("vocabulary_epilogue", cotangents, tables)
    slices = cdiv(vocabulary, config["COLUMNS"])
    # Terms of hidden states are gone when those of the cotangents are made; they have the sixteenth that
    # sums of softmaxes have in between.
    of_terms = max(terms_bytes([hidden], [head]), terms_bytes(cotangents, tables))
    row_bytes = 4 * (vocabulary + slices)
    row_bytes = max(row_bytes, cdiv(15 * (row_bytes + of_terms), 16))
    parts = list(row_blocks(rows, row_bytes, share(15), tile=config["ROWS"]))
    if not parts:
        return norms, status
    scratch = hidden.new_empty(parts[0].stop, vocabulary, dtype=torch.float32)
    squares = hidden.new_empty(parts[0].stop, slices, dtype=torch.float32)
    for part in parts:
        size = part.stop - part.start
        logits = vocabulary_product([hidden[part]], [head], out=scratch[:size])
        of_part = [cotangent[part] for cotangent in cotangents]
        status[part] = _launch(of_part, tables, logits, nll_coeff, token_maps, squares[:size])
        norms[part] = row_totals(squares[:size], root=True)
    return norms, status
