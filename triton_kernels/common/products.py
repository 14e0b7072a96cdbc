"""Products over tiles, to float32's accuracy whatever the operands are, and what their launches need."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import presets

# The compiler takes (a·b) + acc back into one accumulator unless the product is said to be imprecise, which
# only 8-bit operands heed.
APART = tl.constexpr(1 << 30)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a·b in float32.

    Two half-precision tiles of one dtype multiply exactly. A float32 ``a`` meets a bfloat16 ``b`` as
    three bfloat16 terms, which hold its 24 bits; the rest is float32 arithmetic, nothing rounded to tf32.
    To be added to others outside: Hopper's tensor cores truncate what they add up, by 2⁻²³ of the sum so
    far at every step, which over a depth of thousands is 30 times float32's error.

    Args:
        a: [M, K].
        b: [K, N].
        UPCAST: multiply in float32 anyhow, for the interpreter, whose bfloat16 arithmetic is wrong.
    """
    if UPCAST:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == b.dtype and b.dtype != tl.float32:
        result = tl.dot(a, b, max_num_imprecise_acc=APART)
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        result = tl.dot(low, b, max_num_imprecise_acc=APART)
        result = tl.dot(middle, b, result, max_num_imprecise_acc=APART)
        result = tl.dot(high, b, result, max_num_imprecise_acc=APART)
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return result


@triton.jit
def vocabulary_tile(
    states,  # [N, H_t] each
    tables,  # [V, H_t] each
    state_strides,  # (along N, along H_t) each
    table_strides,  # (along V, along H_t) each
    widths,  # H_t
    rows,  # [ROWS] int64, in 0..N−1
    columns,  # [COLUMNS] int64, in 0..V−1
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
    maps=None,  # [V] int64 each, the row of tables_t for each column, where MAPPED
    last_rows=None,  # of each table
    MAPPED: tl.constexpr = 0,  # bit t: table t has a map
):
    """A tile of Σ_t states_t·tables_tᵀ: [ROWS, COLUMNS] float32, the sum in the order of the tables."""
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    depth = tl.arange(0, DEPTH)
    for t in tl.static_range(len(states)):
        state = states[t] + rows[:, None] * state_strides[t][0] + depth[None, :] * state_strides[t][1]
        table_row = columns
        if (MAPPED >> t) & 1:
            # Nobody has waited for the device to check a map: what it names must not be a wrong address.
            table_row = tl.minimum(tl.maximum(tl.load(maps[t] + columns), 0), last_rows[t])
        table = tables[t] + table_row[None, :] * table_strides[t][0] + depth[:, None] * table_strides[t][1]
        for start in range(0, widths[t], DEPTH):
            there = depth < widths[t] - start
            a = tl.load(state, mask=there[None, :], other=0.0)
            b = tl.load(table, mask=there[:, None], other=0.0)
            acc += product(a, b, UPCAST)
            state += DEPTH * state_strides[t][1]
            table += DEPTH * table_strides[t][1]
    return acc


@triton.jit
def tile_of(tiles_of_rows, rows, vocabulary, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of a program's tile, and its number along the vocabulary.

    Programs that follow each other share a tile of the tables, which is then read once.
    """
    slice = tl.program_id(0) // tiles_of_rows
    row = (tl.program_id(0) % tiles_of_rows) * ROWS + tl.arange(0, ROWS)
    column = slice * COLUMNS + tl.arange(0, COLUMNS)
    return row.to(tl.int64), column.to(tl.int64), slice


def operands(states: list[Tensor], tables: list[Tensor]) -> str:
    """Which of :func:`product`'s products these tensors need."""
    pairs = {(state.dtype, table.dtype) for state, table in zip(states, tables, strict=True)}
    if all(a == b != torch.float32 for a, b in pairs):
        return "half"
    if all(b == torch.bfloat16 and a in (torch.float32, b) for a, b in pairs):
        return "split"
    return "float32"


def aligned(matrix: Tensor) -> bool:
    """Whether rows are contiguous and begin at multiples of 16 bytes."""
    size = matrix.element_size()
    return matrix.stride(1) == 1 and matrix.stride(0) * size % 16 == 0 and matrix.data_ptr() % 16 == 0


def tile_config(kernel: str, states: list[Tensor], tables: list[Tensor]) -> presets.Config:
    """The preset of a kernel that takes :func:`vocabulary_tile`'s products of these tensors.

    What vector loads do not fit takes registers for addresses, and so has smaller tiles.
    """
    fits = all(map(aligned, states + tables))
    return presets.config(kernel, operands(states, tables) if fits else "unaligned", tables[0].device)


def tile_arguments(states: list[Tensor], tables: list[Tensor]) -> tuple[tuple, ...]:
    """The first five arguments of :func:`vocabulary_tile`."""
    return (
        tuple(states),
        tuple(tables),
        tuple(state.stride() for state in states),
        tuple(table.stride() for table in tables),
        tuple(table.shape[1] for table in tables),
    )


def map_arguments(tables: list[Tensor], token_maps: list[Tensor | None]) -> dict[str, Any]:
    """The last three arguments of :func:`vocabulary_tile`, by name.

    Args:
        tables: [V, H_t] each, or [V_t, H_t] with a map.
        token_maps: none at all, or one a table: None, or [V] int64, contiguous.
    """
    return {
        # The place of a map that is not there is taken by a pointer that is not read.
        "maps": tuple(t if m is None else m for t, m in zip(tables, token_maps, strict=False)),
        "last_rows": tuple(len(table) - 1 for table in tables[: len(token_maps)]),
        "MAPPED": sum(1 << t for t, m in enumerate(token_maps) if m is not None),
    }


def upcast(tensor: Tensor) -> bool:
    """Whether products are taken in float32 because an interpreter runs them."""
    return tensor.device.type == "cpu"
