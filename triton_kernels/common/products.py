"""Products over tiles, to float32's accuracy whatever the operands are, and what their launches need.

Two half-precision matrices of one dtype multiply exactly. Float32 states meet a bfloat16 table as three
bfloat16 terms, which are written once before the kernel (``terms``): a tensor [3, N, W] stands for them,
and each of the three is multiplied with the same tile of the table. The rest is float32 arithmetic, nothing
rounded to tf32.

Terms have tiles of 64 rows, in programs of one warp group, of which a multiprocessor holds two: Triton
waits for each of the three products that follow each other in one accumulator, and while one program waits
the other multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import presets, scratch, terms

# The compiler takes (a·b) + acc back into one accumulator unless the product is said to be imprecise, which
# only 8-bit operands heed.
APART = tl.constexpr(1 << 30)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a·b in float32, to be added to others outside.

    Hopper's tensor cores truncate what they add up, by 2⁻²³ of the sum so far at every step, which over a
    depth of thousands is 30 times float32's error.

    Args:
        a: [M, K].
        b: [K, N].
        UPCAST: multiply in float32 anyhow, for the interpreter, whose bfloat16 arithmetic is wrong.
    """
    if a.dtype == b.dtype and b.dtype != tl.float32 and not UPCAST:
        result = tl.dot(a, b, max_num_imprecise_acc=APART)
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return result


@triton.jit
def product_of_terms(high, middle, low, b, UPCAST: tl.constexpr):
    """(high + middle + low)·b, as :func:`product`: the smallest first, in one accumulator."""
    if UPCAST:
        a = low.to(tl.float32) + middle.to(tl.float32) + high.to(tl.float32)
        result = tl.dot(a, b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(low, b, max_num_imprecise_acc=APART)
        result = tl.dot(middle, b, result, max_num_imprecise_acc=APART)
        result = tl.dot(high, b, result, max_num_imprecise_acc=APART)
    return result


@triton.jit
def vocabulary_tile(
    states,  # [N, H_t] each, or their terms [3, N, W_t]
    tables,  # [V, H_t] each
    state_strides,  # (along N, along H_t) each; of terms also between them
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
    far = depth.to(tl.int64)  # columns may lie far apart
    step = tl.full((), DEPTH, tl.int64)
    for t in tl.static_range(len(states)):
        state = states[t] + rows[:, None] * state_strides[t][0] + far[None, :] * state_strides[t][1]
        table_row = columns
        if (MAPPED >> t) & 1:
            # Nobody has waited for the device to check a map: what it names must not be a wrong address.
            table_row = tl.minimum(tl.maximum(tl.load(maps[t] + columns), 0), last_rows[t])
        table = tables[t] + table_row[None, :] * table_strides[t][0] + far[:, None] * table_strides[t][1]
        for start in range(0, widths[t], DEPTH):
            there = depth < widths[t] - start
            b = tl.load(table, mask=there[:, None], other=0.0)
            if len(state_strides[t]) == 3:
                # Rows of terms go on as zeros to the end of the step.
                high = tl.load(state)
                middle = tl.load(state + state_strides[t][2])
                low = tl.load(state + 2 * state_strides[t][2])
                acc += product_of_terms(high, middle, low, b, UPCAST)
            else:
                a = tl.load(state, mask=there[None, :], other=0.0)
                acc += product(a, b, UPCAST)
            state += step * state_strides[t][1]
            table += step * table_strides[t][1]
    return acc


@triton.jit
def tile_of(tiles_of_rows, vocabulary, state_strides, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of a program's tile, and its number along the vocabulary.

    Programs that follow each other share a tile of the tables, which is then read once from memory. Where
    the states are terms, their tile is more than the tables': pairs of programs share it, and pairs that
    follow each other share two tiles of the tables.
    """
    if len(state_strides[0]) == 3:
        first = tl.program_id(0) // (2 * tiles_of_rows) * 2
        within = tl.program_id(0) % (2 * tiles_of_rows)
        # The last tile of the tables may have none beside it.
        wide = tl.minimum(tl.cdiv(vocabulary, COLUMNS) - first, 2)
        slice = first + within % wide
        tile = within // wide
    else:
        slice = tl.program_id(0) // tiles_of_rows
        tile = tl.program_id(0) % tiles_of_rows
    row = tile * ROWS + tl.arange(0, ROWS)
    column = slice * COLUMNS + tl.arange(0, COLUMNS)
    return row.to(tl.int64), column.to(tl.int64), slice


def _split(state: Tensor, table: Tensor) -> bool:
    """Whether these multiply as terms: those of ``state``, or it is them."""
    return state.ndim == 3 or (state.dtype == torch.float32 and table.dtype == torch.bfloat16)


def operands(states: list[Tensor], tables: list[Tensor]) -> str:
    """Which kind of products these tensors need, before or after :func:`in_terms`."""
    pairs = list(zip(states, tables, strict=True))
    exact = [_split(a, b) or a.dtype == b.dtype != torch.float32 for a, b in pairs]
    if all(exact) and not any(_split(a, b) for a, b in pairs):
        return "half"
    if all(exact) and all(table.dtype == torch.bfloat16 for table in tables):
        return "split"
    return "float32"


def in_terms(states: list[Tensor], tables: list[Tensor]) -> list[Tensor]:
    """The states as :func:`vocabulary_tile` takes them: those in terms that are multiplied so."""
    return [
        terms.terms_of(state) if state.ndim == 2 and _split(state, table) else state
        for state, table in zip(states, tables, strict=True)
    ]


def terms_bytes(states: list[Tensor], tables: list[Tensor]) -> int:
    """That :func:`in_terms` takes for a row."""
    pairs = zip(states, tables, strict=True)
    return sum(terms.row_bytes(s.shape[1]) for s, table in pairs if s.ndim == 2 and _split(s, table))


def parts_in_terms(states: list[Tensor], tables: list[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Parts of the rows whose terms fit the scratch memory, and their states by :func:`in_terms`.

    A part's are still there when the next one's are made.
    """
    size = terms_bytes(states, tables)
    if size == 0:
        yield slice(0, states[0].shape[-2]), states
        return
    for part in scratch.row_blocks(len(states[0]), size, scratch.share(8)):
        yield part, in_terms([state[part] for state in states], tables)


def aligned(matrix: Tensor) -> bool:
    """Whether rows are contiguous and begin at multiples of 16 bytes."""
    size = matrix.element_size()
    return matrix.stride(1) == 1 and matrix.stride(0) * size % 16 == 0 and matrix.data_ptr() % 16 == 0


def tile_config(kernel: str, states: list[Tensor], tables: list[Tensor]) -> presets.Config:
    """The preset of a kernel that takes :func:`vocabulary_tile`'s products of these tensors.

    What vector loads do not fit takes registers for addresses, and so has smaller tiles.
    """
    pairs = zip(states, tables, strict=True)
    fits = all(aligned(b) and (_split(a, b) or aligned(a)) for a, b in pairs)
    return presets.config(kernel, operands(states, tables) if fits else "unaligned", tables[0].device)


def tile_arguments(states: list[Tensor], tables: list[Tensor]) -> tuple[tuple, ...]:
    """The first five arguments of :func:`vocabulary_tile`; the states are those of :func:`in_terms`."""
    strides = (state.stride() for state in states)
    return (
        tuple(states),
        tuple(tables),
        tuple(own if len(own) == 2 else (*own[1:], own[0]) for own in strides),
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
    return tensor.is_cpu
