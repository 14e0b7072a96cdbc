"""The embedding mix over logits; its backward is G by library products, then softmax's Jacobian."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.plans.recording import step

from .common.exponential import exp_base, tempered_exp
from .common.gradient_sums import FIELDS, GRAD, joined_slices, store_slice
from .common.launch import launched
from .common.library_products import add_vocabulary_products, converted_bytes, float32_products
from .common.row_tops import Noise, RowTops
from .common.scratch import row_blocks, share
from .common.sizes import cdiv, next_power_of_2
from .common.soft_mix import SoftMix, scratch_bytes
from .common.vocabulary_chunks import CHUNK_SHARE, SLICE, WARPS, logits_slice, partition


def embedding_mix(
    logits: Tensor, tables: list[Tensor], *, tau: float, hard: bool, noise: Noise
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
    status = logits.new_empty(rows, dtype=torch.int32)
    if rows == 0:
        return mixes, status
    if hard:
        token = logits.new_empty(rows, dtype=torch.int64)
        parts = list(row_blocks(rows, 8 * cdiv(vocabulary, SLICE), share(15)))
        tops = RowTops(logits, parts[0].stop, vocabulary)
        for part in parts:
            tops.measure(logits[part], part_of(noise, part), 0, vocabulary, 0)
            tops.join(token[part], status[part])
        for table, mix in zip(tables, mixes, strict=True):
            step(torch.index_select, table, 0, token, out=mix)
        return mixes, status
    row_bytes, token_bytes = scratch_bytes(tables, vocabulary)
    cut = partition(rows, vocabulary, row_bytes=row_bytes, token_bytes=token_bytes)
    mix = SoftMix(logits, cut.most_rows, vocabulary, tables, tau, cut.tokens)
    with float32_products():
        for part in cut.rows:
            own, key = logits[part], part_of(noise, part)
            beforehand = len(own) * cut.tokens * own.element_size() > share(CHUNK_SHARE)
            if beforehand:
                mix.row_tops.measure(own, key, 0, vocabulary, 0)
            for first, end in cut.chunks(vocabulary):
                mix.add(own, key, first, end, 0, measured=beforehand)
            mix.finish([of_table[part] for of_table in mixes], status[part])
    return mixes, status


def part_of(noise: Noise, part: slice) -> Noise:
    """The noise's keys of some of the rows."""
    return None if noise is None else (noise[0][part], noise[1][part])


# -- backward ----------------------------------------------------------------------------------------


@triton.jit
def _gradient_slice(
    product_ptr,  # [N, ..] float32: the tables' part of G
    product_stride,
    product_origin,  # token of the product's first column
    direct_ptr,  # [N, V] if DIRECT
    direct_row_stride,
    direct_column_stride,
    row,  # int64
    start,
    end,
    COLUMNS: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """G of a slice; 0 past the chunk: [COLUMNS]."""
    token = start + tl.arange(0, COLUMNS)
    at = product_ptr + row * product_stride + (token - product_origin)
    grad = tl.load(at, mask=token < end, other=0.0)
    if DIRECT:
        at = direct_ptr + row * direct_row_stride + token.to(tl.int64) * direct_column_stride
        grad += tl.load(at, mask=token < end, other=0.0).to(tl.float32)
    return grad


@launched
@triton.jit(do_not_specialize=["first_slice", "chunk_slices", "slices"])
def survey_kernel(
    product_ptr,
    product_stride,
    product_origin,
    direct_ptr,
    direct_row_stride,
    direct_column_stride,
    logits_ptr,
    row_stride,
    column_stride,
    origin,  # token of the logits' first column
    seed_ptr,
    position_ptr,
    sums_ptr,  # [N, FIELDS, slices] float32
    high_ptr,  # [N, V] int16 if SPLIT: the upper 16 bits of G − G[token of the slice]
    rest_ptr,  # [N, V] uint8 if SPLIT: the next 8
    vocabulary,
    end,
    first_slice,
    chunk_slices,
    slices,
    base,
    COLUMNS: tl.constexpr,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The sums of a chunk's slices, while the product is still in the L2 cache."""
    row = (tl.program_id(0) // chunk_slices).to(tl.int64)
    slice = first_slice + tl.program_id(0) % chunk_slices
    start = slice * COLUMNS
    grad = _gradient_slice(
        product_ptr,
        product_stride,
        product_origin,
        direct_ptr,
        direct_row_stride,
        direct_column_stride,
        row,
        start,
        end,
        COLUMNS,
        DIRECT,
    )
    z = logits_slice(
        logits_ptr,
        row_stride,
        column_stride,
        seed_ptr,
        position_ptr,
        row,
        start,
        end,
        origin,
        COLUMNS,
        NOISE,
    )
    bits = store_slice(sums_ptr + row * (FIELDS * slices), slices, slice, z, grad, start, base, SPLIT)
    if SPLIT:
        token = start + tl.arange(0, COLUMNS)
        at = row * vocabulary + token
        tl.store(high_ptr + at, (bits >> 16).to(tl.int16), mask=token < end)
        tl.store(rest_ptr + at, ((bits >> 8) & 0xFF).to(tl.uint8), mask=token < end)


@launched
@triton.jit(do_not_specialize=["slices"])
def _join_kernel(
    sums_ptr,  # [N, FIELDS, slices] float32
    joined_ptr,  # [N, 4] float32: max z, G[ŷ], 1/(S τ), ⟨p, G⟩ − G[ŷ]
    slices,
    base,
    inverse,  # 1/τ
    SLICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top, _some, grad, total, mean, spoiled = joined_slices(
        sums_ptr + row * (FIELDS * slices), slices, slices, base, SLICES
    )
    tl.store(joined_ptr + 4 * row, top)
    tl.store(joined_ptr + 4 * row + 1, grad)
    tl.store(joined_ptr + 4 * row + 2, inverse / total)
    tl.store(joined_ptr + 4 * row + 3, tl.where(spoiled, float("nan"), mean))


@launched
@triton.jit(do_not_specialize=["first_slice", "chunk_slices", "slices"])
def jacobian_kernel(
    product_ptr,  # unless SPLIT: the tables' part of G; may be result_ptr
    product_stride,
    product_origin,
    direct_ptr,
    direct_row_stride,
    direct_column_stride,
    logits_ptr,
    row_stride,
    column_stride,
    origin,  # token of the logits' first column
    seed_ptr,
    position_ptr,
    sums_ptr,  # [N, FIELDS, slices] float32
    joined_ptr,  # [N, 4] float32
    high_ptr,  # [N, V] int16 if SPLIT, the memory of result_ptr
    rest_ptr,  # [N, V] uint8 if SPLIT
    result_ptr,  # [N, V], contiguous
    vocabulary,
    end,
    first_slice,
    chunk_slices,
    slices,
    base,
    COLUMNS: tl.constexpr,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """∂ℒ/∂z of a chunk's slices."""
    row = (tl.program_id(0) // chunk_slices).to(tl.int64)
    slice = first_slice + tl.program_id(0) % chunk_slices
    start = slice * COLUMNS
    hard_grad = tl.load(joined_ptr + 4 * row + 1)
    token = start + tl.arange(0, COLUMNS)
    there = token < end
    at = row * vocabulary + token
    if SPLIT:
        high = tl.load(high_ptr + at, mask=there, other=0).to(tl.int32)
        rest = tl.load(rest_ptr + at, mask=there, other=0).to(tl.int32)
        here = tl.load(sums_ptr + (row * FIELDS + GRAD) * slices + slice)
        centred = ((high << 16) | (rest << 8)).to(tl.float32, bitcast=True) + (here - hard_grad)
    else:
        grad = _gradient_slice(
            product_ptr,
            product_stride,
            product_origin,
            direct_ptr,
            direct_row_stride,
            direct_column_stride,
            row,
            start,
            end,
            COLUMNS,
            DIRECT,
        )
        centred = grad - hard_grad
    z = logits_slice(
        logits_ptr,
        row_stride,
        column_stride,
        seed_ptr,
        position_ptr,
        row,
        start,
        end,
        origin,
        COLUMNS,
        NOISE,
    )
    top = tl.load(joined_ptr + 4 * row)
    weight, mean = tl.load(joined_ptr + 4 * row + 2), tl.load(joined_ptr + 4 * row + 3)
    e = tempered_exp(z - top, base)
    # G may be infinite where p is 0.
    result = tl.where(e > 0, e * weight * (centred - mean), 0.0)
    tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=there)


def embedding_mix_backward(
    cotangents: list[Tensor],
    logits: Tensor,
    tables: list[Tensor],
    *,
    tau: float,
    noise: Noise,
    direct: Tensor | None,
) -> Tensor:
    """∂ℒ/∂z = (1/τ) p ⊙ (G − ⟨p, G⟩), G = Σ_t ⟨T_t, ∂ℒ/∂e_t⟩ + direct.

    ⟨p, G⟩ is known when all of G has been seen. Where the soft mix ē is at hand it is Σ_t ⟨∂ℒ/∂e_t, ē_t⟩;
    here it is not, and ē costs another 2·N·V·ΣH_t operations, as many as G itself: 1.2 ms for 512 rows of
    V = 151,936 and ΣH_t = 6,144 at 790 TFLOP/s, where to keep G and to read it once more moves
    2·4·N·V bytes, 0.15 ms at 4.3 TB/s.

    A float32 result holds G itself until the last pass. Of a half-precision one the memory holds 16 bits of
    G − c, with c the G of the slice's largest logit, and 8 more lie in scratch for as many rows as fit: 24
    bits, an error of 2⁻¹⁷ (G − c).

    Args:
        cotangents: ∂ℒ/∂e_t [N, H_t] each.
        logits: [N, V].
        tables: [V, H_t] each.
        tau, noise: as of :func:`embedding_mix`.
        direct: [N, V] or None.
    Returns:
        [N, V] in the dtype of ``logits``.
    """
    rows, vocabulary = logits.shape
    out = torch.empty(rows, vocabulary, dtype=logits.dtype, device=logits.device)
    split = out.dtype != torch.float32
    row_bytes = 4 * FIELDS.value * cdiv(vocabulary, SLICE) + 16 + (vocabulary if split else 0)
    row_bytes += converted_bytes(cotangents, tables)
    cut = partition(rows, vocabulary, row_bytes=row_bytes, token_bytes=4)
    slices = cdiv(vocabulary, SLICE)
    sums = logits.new_empty(cut.most_rows, FIELDS.value, slices, dtype=torch.float32)
    joined = logits.new_empty(cut.most_rows, 4, dtype=torch.float32)
    products, rest = out, out
    if split:
        products = logits.new_empty(cut.most_rows * min(cut.tokens, vocabulary), dtype=torch.float32)
        rest = logits.new_empty(cut.most_rows, vocabulary, dtype=torch.uint8)
    base = exp_base(tau)
    options = {"COLUMNS": SLICE, "NOISE": noise is not None, "SPLIT": split, "num_warps": WARPS}
    options["DIRECT"] = direct is not None
    with float32_products(), torch.cuda.device_of(logits):
        for part in cut.rows:
            of_part, size = out[part], part.stop - part.start
            high = of_part.view(torch.int16) if split else of_part
            given = (joined, 0, 0) if direct is None else (direct[part], *direct.stride())
            read = (logits[part], *logits.stride())
            key = part_of(noise, part) or (joined, joined)
            states = [cotangent[part] for cotangent in cotangents]
            for first, end in cut.chunks(vocabulary):
                if split:
                    product = products[: size * (end - first)].view(size, end - first)
                else:
                    product = of_part[:, first:end]
                add_vocabulary_products(product, states, [table[first:end] for table in tables])
                of_chunk = cdiv(end - first, SLICE)
                survey_kernel[(size * of_chunk,)](
                    product,
                    product.stride(0),
                    first,
                    *given,
                    *read,
                    0,
                    *key,
                    sums,
                    high,
                    rest,
                    vocabulary,
                    end,
                    first // SLICE,
                    of_chunk,
                    slices,
                    base,
                    **options,
                )
            width = next_power_of_2(slices)
            _join_kernel[(size,)](sums, joined, slices, base, 1 / tau, SLICES=width, num_warps=4)
            jacobian_kernel[(size * slices,)](
                of_part,
                vocabulary,
                0,
                *given,
                *read,
                0,
                *key,
                sums,
                joined,
                high,
                rest,
                of_part,
                vocabulary,
                vocabulary,
                0,
                slices,
                slices,
                base,
                **options,
            )
    return out
