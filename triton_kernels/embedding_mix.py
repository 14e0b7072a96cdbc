"""The embedding mix over logits; its backward is G by one product over all tables, then the Jacobian."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.exponential import inverse_parts
from .common.gumbel import add_gumbel_noise
from .common.products import tile_arguments
from .common.row_totals import row_totals
from .common.scratch import row_blocks, share
from .common.softmax_sums import SoftmaxSums, exp_tile, perturbed_tile, softmax_sums
from .common.vocabulary_product import vocabulary_product
from .common.weighted_rows import weighted_rows


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
def _centred_tile(
    product_ptr,  # [N, V], contiguous: the tables' part of G, less G[ŷ]
    rest_ptr,  # [N, V] bfloat16, contiguous, if SPLIT: its low bits
    logits_ptr,  # [N, V]
    row_stride,
    column_stride,
    seed_ptr,  # [N] int64 if NOISE
    position_ptr,  # [N] int64 if NOISE
    top_ptr,  # [N] float32
    token_ptr,  # [N] int64
    direct_ptr,  # [N, V] if DIRECT
    direct_row_stride,
    direct_column_stride,
    row,  # [1] int64
    start,
    vocabulary,
    inverse,
    inverse_low,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """exp((z − top)/τ) and G − G[ŷ], 0 where the former is and at ŷ: [1, COLUMNS] each."""
    column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
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
    at = row[:, None] * vocabulary + column
    grad = tl.load(product_ptr + at, mask=there, other=0.0).to(tl.float32)
    if SPLIT:
        grad += tl.load(rest_ptr + at, mask=there, other=0.0).to(tl.float32)
    if DIRECT:
        at = direct_ptr + row[:, None] * direct_row_stride + column * direct_column_stride
        grad += tl.load(at, mask=there, other=0.0).to(tl.float32)
    other = (e > 0) & (column != tl.load(token_ptr + row)[:, None])
    return e, tl.where(other, grad, 0.0)


@triton.jit(do_not_specialize=["slices"])
def _tilt_kernel(
    product_ptr,
    rest_ptr,
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,
    position_ptr,
    top_ptr,
    token_ptr,
    direct_ptr,
    direct_row_stride,
    direct_column_stride,
    tilt_ptr,  # [N, slices] float32: Σ exp((z − top)/τ) (G − G[ŷ]) over a slice
    vocabulary,
    slices,
    inverse,
    inverse_low,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    e, centred = _centred_tile(
        product_ptr,
        rest_ptr,
        logits_ptr,
        row_stride,
        column_stride,
        seed_ptr,
        position_ptr,
        top_ptr,
        token_ptr,
        direct_ptr,
        direct_row_stride,
        direct_column_stride,
        program // slices + tl.zeros((1,), tl.int64),
        (program % slices).to(tl.int32) * COLUMNS,
        vocabulary,
        inverse,
        inverse_low,
        NOISE,
        DIRECT,
        SPLIT,
        COLUMNS,
    )
    tl.store(tilt_ptr + program + tl.zeros((1,), tl.int64), tl.sum(e * centred, axis=1))


@triton.jit(do_not_specialize=["slices"])
def _jacobian_kernel(
    product_ptr,
    rest_ptr,
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,
    position_ptr,
    top_ptr,
    token_ptr,
    direct_ptr,
    direct_row_stride,
    direct_column_stride,
    total_ptr,  # [N] float32: Σ exp((z − top)/τ)
    tilt_ptr,  # [N] float32: Σ exp((z − top)/τ) (G − G[ŷ])
    result_ptr,  # [N, V], contiguous; may be product_ptr
    vocabulary,
    slices,
    inverse,
    inverse_low,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // slices + tl.zeros((1,), tl.int64)
    start = (program % slices).to(tl.int32) * COLUMNS
    e, centred = _centred_tile(
        product_ptr,
        rest_ptr,
        logits_ptr,
        row_stride,
        column_stride,
        seed_ptr,
        position_ptr,
        top_ptr,
        token_ptr,
        direct_ptr,
        direct_row_stride,
        direct_column_stride,
        row,
        start,
        vocabulary,
        inverse,
        inverse_low,
        NOISE,
        DIRECT,
        SPLIT,
        COLUMNS,
    )
    total = tl.load(total_ptr + row)[:, None]
    mean = tl.load(tilt_ptr + row)[:, None] / total
    result = tl.where(e > 0, e * (inverse / total) * (centred - mean), 0.0)
    column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    at = result_ptr + row[:, None] * vocabulary + column
    tl.store(at, result.to(result_ptr.dtype.element_ty), mask=column < vocabulary)


_COLUMNS = 2048  # of a slice
_WARPS = 8  # of a slice's program: with 4, some spill
_HARD_DEPTH = 1024


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
    rows, vocabulary = logits.shape
    mixes = [table.new_empty(rows, table.shape[1]) for table in tables]
    sums = softmax_sums(logits, tau, noise)
    if hard or noise is None:
        mix_rows(logits, tables, sums, tau, hard, mixes, scratch=share(15))
        return mixes, sums.status
    # Every program that reads a logit would draw its noise again.
    parts = list(row_blocks(rows, 4 * vocabulary, share(11)))
    scratch = logits.new_empty(parts[0].stop if parts else 0, vocabulary, dtype=torch.float32)
    for part in parts:
        perturbed = scratch[: part.stop - part.start].copy_(logits[part])
        add_gumbel_noise(perturbed, noise[0][part], noise[1][part])
        of_part = [mix[part] for mix in mixes]
        mix_rows(perturbed, tables, sums.part(part), tau, hard, of_part, scratch=share(4))
    return mixes, sums.status


def mix_rows(
    logits: Tensor,
    tables: list[Tensor],
    sums: SoftmaxSums,
    tau: float,
    hard: bool,
    out: list[Tensor],
    *,
    scratch: int,
) -> None:
    """The mixes of logits [N, V], into ``out`` [N, H_t] each; ``scratch``: bytes beside."""
    if not hard:
        weighted_rows(logits, tables, out=out, scratch=scratch, sums=sums, tau=tau)
        return
    for table, mix in zip(tables, out, strict=True):
        torch.index_select(table, 0, sums.token, out=mix)


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

    ⟨p, G⟩ is not known while G is made. The product writes G − G[ŷ] where the result will be; one pass
    over it adds up ⟨p, G⟩, a second applies the Jacobian. They move some 24 bytes a logit, where a
    second product would take 2·ΣH_t operations; in the product's own epilogue a softmax made tiles of
    this size spill.

    A half-precision result holds the high bits of G − G[ŷ]; the rest, which rounding would lose, is in
    bfloat16 scratch for some of the rows at a time. For each of these parts the tables are read again.

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
    sums = softmax_sums(logits, tau, noise)
    split = out.dtype != torch.float32
    row_bytes = 4 * triton.cdiv(vocabulary, _COLUMNS) + (2 * vocabulary if split else 0)
    parts = list(row_blocks(rows, row_bytes, share(15)))
    rest = None
    if split and parts:
        rest = torch.empty(parts[0].stop, vocabulary, dtype=torch.bfloat16, device=logits.device)
    for part in parts:
        _backward(
            [cotangent[part] for cotangent in cotangents],
            logits[part],
            tables,
            sums.part(part),
            tau,
            (noise[0][part], noise[1][part]) if noise else None,
            None if direct is None else direct[part],
            None if rest is None else rest[: part.stop - part.start],
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
    rest: Tensor | None,  # [N, V] bfloat16, contiguous: scratch
    out: Tensor,  # [N, V], contiguous; float32 if there is no rest
) -> None:
    rows, vocabulary = logits.shape
    hard_grad = logits.new_empty(rows, dtype=torch.float32)
    slices = triton.cdiv(vocabulary, _COLUMNS)
    tilt = logits.new_empty(rows, slices, dtype=torch.float32)
    directs = (hard_grad, 0, 0) if direct is None else (direct, *direct.stride())
    with torch.cuda.device_of(logits):
        _hard_grad_kernel[(rows,)](
            *tile_arguments(cotangents, tables),
            *directs,
            sums.token,
            hard_grad,
            DIRECT=direct is not None,
            DEPTH=_HARD_DEPTH,
        )
        vocabulary_product(cotangents, tables, shift=hard_grad, out=out, rest=rest)
        read = (
            out,
            out if rest is None else rest,
            logits,
            *logits.stride(),
            *(noise or (sums.token, sums.token)),
            sums.top,
            sums.token,
        )
        sizes = (vocabulary, slices, *inverse_parts(tau))
        options = {
            "NOISE": noise is not None,
            "DIRECT": direct is not None,
            "SPLIT": rest is not None,
            "COLUMNS": _COLUMNS,
            "num_warps": _WARPS,
        }
        _tilt_kernel[(rows * slices,)](*read, *directs, tilt, *sizes, **options)
        _jacobian_kernel[(rows * slices,)](
            *read, *directs, sums.total, row_totals(tilt), out, *sizes, **options
        )
