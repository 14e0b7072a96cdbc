"""Σ_v w[v] T_t[v] over a vocabulary, for several tables at once: the products of the mixes.

The vocabulary is split over programs; their partial sums are joined in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import presets
from .exponential import inverse_parts
from .products import aligned, dot, upcast
from .scratch import row_blocks
from .softmax_sums import SoftmaxSums, exp_tile

# Weights of at most 1 reach float16's subnormal numbers early: the small ones of a flat row add up.
_FLOAT16_SCALE = tl.constexpr(32768.0)


@triton.jit(do_not_specialize=["rows", "tiles_of_rows", "tiles_of_width"])
def _weighted_rows_kernel(
    weights_ptr,  # [N, V]: logits if SOFTMAX, else the weights themselves
    row_stride,
    column_stride,
    top_ptr,  # [N] float32
    tables,  # [V, H_t] each
    table_strides,  # (along V, along H_t) each
    widths,  # H_t
    first_tiles,  # of each table among the tiles along ΣH_t, and of what would follow
    first_columns,  # of each table in a row of partial sums
    partial_ptr,  # [splits, N, ΣH_t] float32
    rows,  # N
    vocabulary,  # V
    width,  # ΣH_t
    tiles_of_rows,
    tiles_of_width,
    split_size,  # tokens a split, a multiple of COLUMNS
    inverse,
    inverse_low,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Programs that follow each other read the same weights, for another part of the tables.
    program = tl.program_id(0)
    tile = program % tiles_of_width
    row_tile = program // tiles_of_width % tiles_of_rows
    split = (program // tiles_of_width // tiles_of_rows).to(tl.int64)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    within = tl.minimum(row, rows - 1)
    first = split.to(tl.int32) * split_size
    last = tl.minimum(first + split_size, vocabulary)
    if SOFTMAX:
        top = tl.load(top_ptr + within)
    for t in tl.static_range(len(tables)):
        if (tile >= first_tiles[t]) & (tile < first_tiles[t + 1]):
            table_column = (tile - first_tiles[t]) * WIDTH + tl.arange(0, WIDTH)
            there = table_column < widths[t]
            offset = table_column.to(tl.int64) * table_strides[t][1]
            acc = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
            for start in range(first, last, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                known = column < vocabulary
                at = tables[t] + column.to(tl.int64)[:, None] * table_strides[t][0] + offset[None, :]
                table = tl.load(at, mask=known[:, None] & there[None, :], other=0.0)
                at = (
                    weights_ptr
                    + within[:, None] * row_stride
                    + column.to(tl.int64)[None, :] * column_stride
                )
                other = -float("inf") if SOFTMAX else 0.0
                weights = tl.load(at, mask=known[None, :], other=other).to(tl.float32)
                if SOFTMAX:
                    if UPCAST or table.dtype == tl.float32:
                        weights = exp_tile(weights, top, inverse, inverse_low)
                    else:
                        # The hardware's exponential is exact enough for what is rounded at once.
                        weights = tl.exp2((weights - top[:, None]) * (inverse * 1.44269504))
                    if table.dtype == tl.float16:
                        weights = weights * _FLOAT16_SCALE
                    if not UPCAST:
                        weights = weights.to(table.dtype)
                acc = dot(weights, table, acc, UPCAST)
            if SOFTMAX and tables[t].dtype.element_ty == tl.float16:
                acc = acc * (1.0 / _FLOAT16_SCALE)
            to = (
                partial_ptr
                + (split * rows + row)[:, None] * width
                + (first_columns[t] + table_column)[None, :]
            )
            tl.store(to, acc, mask=(row < rows)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["rows", "splits", "tiles"])
def _join_kernel(
    partial_ptr,  # [splits, N, ΣH_t] float32
    total_ptr,  # [N] float32, what a row's sums are divided by, if DIVIDE
    mix_ptr,  # [N, H_t], contiguous
    rows,
    width,  # ΣH_t
    first_column,  # of the table in a row of partial sums
    table_width,  # H_t
    splits,
    tiles,  # of a row
    DIVIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    there = column < table_width
    total = tl.zeros((COLUMNS,), tl.float32)
    for split in range(splits):
        at = partial_ptr + (split * rows.to(tl.int64) + row) * width + first_column + column
        total += tl.load(at, mask=there, other=0.0)
    if DIVIDE:
        total = total / tl.load(total_ptr + row)
    tl.store(mix_ptr + row * table_width + column, total.to(mix_ptr.dtype.element_ty), mask=there)


_JOINED = 512  # columns a program of _join_kernel


_FULL = 0.9  # of the programs that run at once, in the last wave too: worth no further split


def _splits(vocabulary: int, tiles: int, columns: int, programs: int, most: int) -> tuple[int, int]:
    """Number of splits and tokens of each, such that waves of ``programs`` at once are nearly full.

    At most ``most``, of which there is at least 1.
    """
    steps = triton.cdiv(vocabulary, columns)

    def filled(splits: int) -> float:
        return tiles * splits / (triton.cdiv(tiles * splits, programs) * programs)

    # A split of few steps costs more in partial sums than it gains.
    candidates = range(1, min(triton.cdiv(4 * programs, tiles), max(1, steps // 8), most) + 1)
    best = next((n for n in candidates if filled(n) >= _FULL), max(candidates, key=filled))
    size = triton.cdiv(steps, best)
    return triton.cdiv(steps, size), size * columns


def weighted_rows(
    weights: Tensor,
    tables: list[Tensor],
    *,
    out: list[Tensor],
    scratch: int | Tensor,
    sums: SoftmaxSums | None = None,
    tau: float = 1.0,
) -> None:
    """softmax(weights/τ)·T_t of each table, or weights·T_t without ``sums``.

    The same in every run on a device; another batch may be split otherwise.

    Args:
        weights: [N, V], any strides: logits with ``sums``; else float32 weights.
        tables: [V, H_t] float32, bfloat16 or float16, any strides.
        out: [N, H_t] each, contiguous, for the results in any of these dtypes.
        scratch: bytes that partial sums may take, 4·ΣH_t for some rows at a time; or contiguous
            float32 memory for them, as much for all rows.
        sums: of the rows of logits at this ``tau``.
        tau: τ.
    """
    width = sum(table.shape[1] for table in tables)
    if width == 0:
        return
    kind = _kind(weights, tables, soft=sums is not None)
    config = presets.config("weighted_rows", kind, weights.device)
    budget = scratch if isinstance(scratch, int) else 4 * scratch.numel()
    parts = list(row_blocks(len(weights), 4 * width, budget))
    if isinstance(scratch, int) and len(parts) > 1:
        scratch = weights.new_empty(budget // 4, dtype=torch.float32)  # once for all of them
    for part in parts:
        _weigh(
            weights[part],
            tables,
            [mix[part] for mix in out],
            scratch,
            budget,
            sums.part(part) if sums else None,
            tau,
            config,
        )


def _weigh(
    weights: Tensor,
    tables: list[Tensor],
    mixes: list[Tensor],
    scratch: int | Tensor,
    budget: int,
    sums: SoftmaxSums | None,
    tau: float,
    config: presets.Config,
) -> None:
    config = dict(config)
    rows, vocabulary = weights.shape
    widths = [table.shape[1] for table in tables]
    programs = config.pop("PROGRAMS")
    tiles = [triton.cdiv(width, config["WIDTH"]) for width in widths]
    first_tiles = [sum(tiles[:t]) for t in range(len(tiles) + 1)]
    first_columns = [sum(widths[:t]) for t in range(len(widths))]
    tiles_of_rows = triton.cdiv(rows, config["ROWS"])
    most = max(1, budget // (4 * rows * sum(widths)))
    splits, split_size = _splits(vocabulary, tiles_of_rows * sum(tiles), config["COLUMNS"], programs, most)
    if isinstance(scratch, int):
        partial = weights.new_empty(splits, rows, sum(widths), dtype=torch.float32)
    else:
        partial = scratch.view(-1)[: splits * rows * sum(widths)]
    unused = partial  # for a pointer that is not read
    inverse, inverse_low = inverse_parts(tau)
    with torch.cuda.device_of(weights):
        _weighted_rows_kernel[(splits * tiles_of_rows * sum(tiles),)](
            weights,
            *weights.stride(),
            sums.top if sums else unused,
            tuple(tables),
            tuple(table.stride() for table in tables),
            tuple(widths),
            tuple(first_tiles),
            tuple(first_columns),
            partial,
            rows,
            vocabulary,
            sum(widths),
            tiles_of_rows,
            sum(tiles),
            split_size,
            inverse,
            inverse_low,
            SOFTMAX=sums is not None,
            UPCAST=upcast(weights),
            **config,
        )
        for mix, column in zip(mixes, first_columns, strict=True):
            if mix.shape[1]:
                joined = triton.cdiv(mix.shape[1], _JOINED)
                _join_kernel[(rows * joined,)](
                    partial,
                    sums.total if sums else unused,
                    mix,
                    rows,
                    sum(widths),
                    column,
                    mix.shape[1],
                    splits,
                    joined,
                    DIVIDE=sums is not None,
                    COLUMNS=_JOINED,
                )


def _kind(weights: Tensor, tables: list[Tensor], *, soft: bool) -> str:
    """The entry of a preset: a softmax's weights take the dtype of the table they meet."""
    dtypes = {table.dtype for table in tables}
    if not all(map(aligned, [weights, *tables])):
        return "unaligned"
    if torch.float32 not in dtypes and soft:
        return "half"
    return "split" if dtypes == {torch.bfloat16} and not soft else "float32"
