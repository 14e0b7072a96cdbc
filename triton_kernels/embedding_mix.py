"""The embedding mix over logits; its backward is G by one product over all tables, then the Jacobian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import presets
from .exponential import inverse_parts
from .products import operands, tile_arguments, tile_of, upcast, vocabulary_tile
from .row_totals import row_totals
from .softmax_sums import SoftmaxSums, exp_tile, perturbed_tile, softmax_sums
from .weighted_rows import weighted_rows

# A float32 [n, V] that holds part of the rows: 128 of a vocabulary of 151,936 fit, a tile of rows.
SCRATCH_BYTES = 80 << 20


@triton.jit
def _hard_grad_kernel(
    states,  # [N, H_t] each: ∂ℒ/∂e_t
    tables,
    state_strides,
    table_strides,
    widths,
    direct_ptr,  # [N, V] if DIRECT
    direct_row_stride,
    direct_column_stride,
    token_ptr,  # [N] int64
    grad_ptr,  # [N] float32
    DIRECT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row)
    depth = tl.arange(0, DEPTH)
    grad = tl.zeros((DEPTH,), tl.float32)
    for t in tl.static_range(len(states)):
        for start in range(0, widths[t], DEPTH):
            column = (start + depth).to(tl.int64)
            there = column < widths[t]
            state = tl.load(
                states[t] + row * state_strides[t][0] + column * state_strides[t][1], mask=there, other=0.0
            )
            table = tl.load(
                tables[t] + token * table_strides[t][0] + column * table_strides[t][1],
                mask=there,
                other=0.0,
            )
            grad += state.to(tl.float32) * table.to(tl.float32)
    total = tl.sum(grad, axis=0)
    if DIRECT:
        at = direct_ptr + row * direct_row_stride + token * direct_column_stride
        total += tl.load(at).to(tl.float32)
    tl.store(grad_ptr + row, total)


@triton.jit
def _centred_grad_kernel(
    states,
    tables,
    state_strides,
    table_strides,
    widths,
    logits_ptr,  # [N, V]
    row_stride,
    column_stride,
    seed_ptr,
    position_ptr,
    top_ptr,  # [N] float32
    token_ptr,  # [N] int64
    hard_grad_ptr,  # [N] float32: G[ŷ]
    direct_ptr,
    direct_row_stride,
    direct_column_stride,
    centred_ptr,  # [N, V] float32, contiguous: G − G[ŷ], 0 where p is
    tilt_ptr,  # [N, slices] float32: Σ exp((z − top)/τ) (G − G[ŷ]) over a tile
    rows,
    vocabulary,
    tiles_of_rows,
    slices,
    inverse,
    inverse_low,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row, column, slice = tile_of(tiles_of_rows, rows, vocabulary, ROWS, COLUMNS)
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
    )
    if DIRECT:
        at = direct_ptr + within[:, None] * direct_row_stride + column[None, :] * direct_column_stride
        grad += tl.load(at, mask=there, other=0.0).to(tl.float32)
    z = perturbed_tile(
        logits_ptr,
        row_stride,
        column_stride,
        seed_ptr,
        position_ptr,
        within,
        slice * COLUMNS,
        vocabulary,
        COLUMNS,
        NOISE,
    )
    e = exp_tile(z, tl.load(top_ptr + within), inverse, inverse_low)
    hard = column[None, :] == tl.load(token_ptr + within)[:, None]
    centred = grad - tl.load(hard_grad_ptr + within)[:, None]
    centred = tl.where((e > 0) & (~hard), centred, 0.0)
    tl.store(centred_ptr + row[:, None] * vocabulary + column[None, :], centred, mask=there)
    tl.store(tilt_ptr + row * slices + slice, tl.sum(e * centred, axis=1), mask=row < rows)


@triton.jit
def _jacobian_kernel(
    centred_ptr,  # [N, V] float32, contiguous
    logits_ptr,  # [N, V]
    row_stride,
    column_stride,
    seed_ptr,
    position_ptr,
    top_ptr,  # [N] float32
    total_ptr,  # [N] float32
    tilt_ptr,  # [N] float32
    result_ptr,  # [N, V], contiguous; may be centred_ptr
    vocabulary,
    slices,
    inverse,
    inverse_low,
    NOISE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // slices).to(tl.int64) + tl.zeros((1,), tl.int64)
    start = tl.program_id(0) % slices * COLUMNS
    column = start + tl.arange(0, COLUMNS)[None, :]
    there = column < vocabulary
    z = perturbed_tile(
        logits_ptr,
        row_stride,
        column_stride,
        seed_ptr,
        position_ptr,
        row,
        start,
        vocabulary,
        COLUMNS,
        NOISE,
    )
    e = exp_tile(z, tl.load(top_ptr + row), inverse, inverse_low)
    total = tl.load(total_ptr + row)[:, None]
    mean = tl.load(tilt_ptr + row)[:, None] / total
    at = row[:, None] * vocabulary + column
    centred = tl.load(centred_ptr + at, mask=there, other=0.0)
    result = e / total * (centred - mean) * inverse
    tl.store(result_ptr + at, tl.where(e > 0, result, 0.0).to(result_ptr.dtype.element_ty), mask=there)


_JACOBIAN_COLUMNS = 4096
_HARD_DEPTH = 1024


def row_blocks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Parts of N rows whose [n, V] float32 scratch fits in SCRATCH_BYTES."""
    step = max(1, SCRATCH_BYTES // (4 * vocabulary))
    step = step // 64 * 64 or step
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def embedding_mix(
    logits: Tensor,
    tables: list[Tensor],
    *,
    tau: float,
    hard: bool,
    noise: tuple[Tensor, Tensor] | None,
) -> tuple[list[Tensor], Tensor]:
    """Σ_v y[v] T_t[v], y the one-hot of the largest z + g if ``hard``, else softmax((z + g)/τ).

    Args:
        logits: z [N, V].
        tables: [V, H_t] each.
        noise: seed and position [N] int64 of g, contiguous, or None.
    Returns:
        One [N, H_t] a table, in its dtype; the rows' status [N] int32.
    """
    sums = softmax_sums(logits, tau, noise)
    if hard:
        return [table.index_select(0, sums.token) for table in tables], sums.status
    return weighted_rows(logits, tables, sums=sums, tau=tau, noise=noise), sums.status


def embedding_mix_backward(
    cotangents: list[Tensor],
    logits: Tensor,
    tables: list[Tensor],
    *,
    tau: float,
    noise: tuple[Tensor, Tensor] | None,
    direct: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """∂ℒ/∂z = (1/τ) p ⊙ (G − ⟨p, G⟩), G = Σ_t ⟨T_t, ∂ℒ/∂e_t⟩ + direct.

    ⟨p, G⟩ is not known while G is made, so there are two passes. The first writes G − G[ŷ] in float32:
    into the result where that is float32, else into scratch for some of the rows at a time. The second
    reads it back, for a tenth of the time that a second product would take.

    Args:
        cotangents: ∂ℒ/∂e_t [N, H_t] each.
        logits: [N, V].
        tables: [V, H_t] each.
        tau, noise: as of :func:`embedding_mix`.
        direct: [N, V] or None.
        out: [N, V] float32, contiguous, for the result; a new tensor in the logits' dtype if None.
    Returns:
        [N, V].
    """
    rows, vocabulary = logits.shape
    if out is None:
        out = torch.empty(rows, vocabulary, dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return out
    sums = softmax_sums(logits, tau, noise)
    if out.dtype == torch.float32:
        _backward(cotangents, logits, tables, sums, tau, noise, direct, out, out)
        return out
    parts = list(row_blocks(rows, vocabulary))
    scratch = torch.empty(parts[0].stop, vocabulary, dtype=torch.float32, device=logits.device)
    for part in parts:
        _backward(
            [cotangent[part] for cotangent in cotangents],
            logits[part],
            tables,
            SoftmaxSums(*(field[part] for field in sums)),
            tau,
            (noise[0][part], noise[1][part]) if noise else None,
            None if direct is None else direct[part],
            scratch[: part.stop - part.start],
            out[part],
        )
    return out


def _backward(
    cotangents: list[Tensor],
    logits: Tensor,
    tables: list[Tensor],
    sums: SoftmaxSums,
    tau: float,
    noise: tuple[Tensor, Tensor] | None,
    direct: Tensor | None,
    centred: Tensor,  # [N, V] float32, contiguous
    out: Tensor,  # [N, V], contiguous
) -> None:
    rows, vocabulary = logits.shape
    config = presets.config("vocabulary_product", operands(cotangents, tables), logits.device)
    tiles, slices = triton.cdiv(rows, config["ROWS"]), triton.cdiv(vocabulary, config["COLUMNS"])
    hard_grad = logits.new_empty(rows, dtype=torch.float32)
    tilt = logits.new_empty(rows, slices, dtype=torch.float32)
    products = tile_arguments(cotangents, tables)
    keys = noise or (sums.token, sums.token)
    directs = (hard_grad, 0, 0) if direct is None else (direct, *direct.stride())
    inverse, inverse_low = inverse_parts(tau)
    with torch.cuda.device_of(logits):
        _hard_grad_kernel[(rows,)](
            *products, *directs, sums.token, hard_grad, DIRECT=direct is not None, DEPTH=_HARD_DEPTH
        )
        _centred_grad_kernel[(tiles * slices,)](
            *products,
            logits,
            *logits.stride(),
            *keys,
            sums.top,
            sums.token,
            hard_grad,
            *directs,
            centred,
            tilt,
            rows,
            vocabulary,
            tiles,
            slices,
            inverse,
            inverse_low,
            NOISE=noise is not None,
            DIRECT=direct is not None,
            UPCAST=upcast(logits),
            **config,
        )
        parts = triton.cdiv(vocabulary, _JACOBIAN_COLUMNS)
        _jacobian_kernel[(rows * parts,)](
            centred,
            logits,
            *logits.stride(),
            *keys,
            sums.top,
            sums.total,
            row_totals(tilt),
            out,
            vocabulary,
            parts,
            inverse,
            inverse_low,
            NOISE=noise is not None,
            COLUMNS=_JACOBIAN_COLUMNS,
        )
