"""The embedding mix with its logits recomputed from hidden states, a chunk of the vocabulary at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_fast.plans.recording import step

from .common.exponential import exp_base, tempered_exp
from .common.gradient_sums import FIELDS, joined_slices
from .common.launch import launched
from .common.library_products import add_weighted_rows, float32_products
from .common.powers import power_of_two, power_parts
from .common.row_tops import Noise, RowTops
from .common.sizes import cdiv, next_power_of_2
from .common.soft_mix import SoftMix, scratch_bytes
from .common.vocabulary_chunks import SLICE, WARPS, Partition, logits_slice, partition
from .common.vocabulary_product import chunk_bytes, chunk_product, chunk_states
from .embedding_mix import part_of, survey_kernel


def linear_embedding_mix(
    hidden: Tensor, head: Tensor, tables: list[Tensor], *, tau: float, hard: bool, noise: Noise
) -> tuple[list[Tensor], Tensor]:
    """:func:`~.embedding_mix.embedding_mix` of z = hidden·headᵀ.

    Args:
        hidden: [N, H].
        head: [V, H].
        tables, tau, hard, noise: as there.
    Returns:
        One [N, H_t] a table, in its dtype; the rows' status [N] int32.
    """
    rows, vocabulary = len(hidden), len(head)
    mixes = [table.new_empty(rows, table.shape[1]) for table in tables]
    status = hidden.new_empty(rows, dtype=torch.int32)
    if hard:
        row_bytes, token_bytes = 8 * cdiv(vocabulary, SLICE), 0
    else:
        row_bytes, token_bytes = scratch_bytes(tables, vocabulary)
    row_bytes += chunk_bytes([hidden], [head])
    cut = partition(rows, vocabulary, row_bytes=row_bytes, token_bytes=token_bytes + 4)
    memory = hidden.new_empty(cut.most_rows * min(cut.tokens, vocabulary), dtype=torch.float32)
    token = hidden.new_empty(rows, dtype=torch.int64)
    tops = RowTops(hidden, cut.most_rows, vocabulary) if hard else None
    mix = None if hard else SoftMix(hidden, cut.most_rows, vocabulary, tables, tau, cut.tokens)
    with float32_products():
        for part in cut.rows:
            size = part.stop - part.start
            states = chunk_states([hidden[part]], [head])
            for first, end in cut.chunks(vocabulary):
                logits = memory[: size * (end - first)].view(size, end - first)
                chunk_product(states, [head[first:end]], logits)
                if tops:
                    tops.measure(logits, part_of(noise, part), first, end, first)
                elif mix:
                    mix.add(logits, part_of(noise, part), first, end, first)
            del states  # before the next part's
            if tops:
                tops.join(token[part], status[part])
            elif mix:
                mix.finish([of_table[part] for of_table in mixes], status[part])
    if hard:
        for table, of_table in zip(tables, mixes, strict=True):
            step(torch.index_select, table, 0, token, out=of_table)
    return mixes, status


# -- backward ----------------------------------------------------------------------------------------

_MOVED = 256  # sums at a time
# Factor of e·(G − c): room below 2¹²⁸ for sums over tokens that no longer count when the row is known.
_HEADROOM = tl.constexpr(2.0**-16)


@launched
@triton.jit(do_not_specialize=["first_slice", "chunk_slices", "slices"])
def _pull_weights_kernel(
    logits_ptr,  # [N, C] float32, contiguous
    product_ptr,  # [N, C] float32, contiguous: the tables' part of G
    direct_ptr,  # [N, V] if DIRECT
    direct_row_stride,
    direct_column_stride,
    seed_ptr,  # [N] int64 if NOISE
    position_ptr,  # [N] int64 if NOISE
    slices_ptr,  # [N, FIELDS, slices] float32
    weights,  # [N, 2, C] each, contiguous: the terms of e = exp(z/τ)·2⁻ᵏ and of e·(G − c)·_HEADROOM
    sums_ptr,  # [N, 2, H] float32, contiguous: what they have been summed to with the head's rows
    width,  # H
    origin,  # the chunk's first token
    end,
    first_slice,
    chunk_slices,
    slices,
    base,
    FIRST: tl.constexpr,  # chunk: no sums yet
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
    MOVED: tl.constexpr,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """c is ⟨p, G⟩ over the chunks so far: what has been summed moves to it as c and k change."""
    row = (tl.program_id(0) // chunk_slices).to(tl.int64)
    of_chunk = tl.program_id(0) % chunk_slices
    start = (first_slice + of_chunk) * COLUMNS
    chunk = end - origin
    slices_ptr += row * (FIELDS * slices)
    top, some, hard_grad, _total, mean, _spoiled = joined_slices(
        slices_ptr, slices, first_slice + chunk_slices, base, SLICES
    )
    exponent, fraction = power_parts(top, some, base)
    z = logits_slice(logits_ptr, chunk, 1, seed_ptr, position_ptr, row, start, end, origin, COLUMNS, NOISE)
    token = start + tl.arange(0, COLUMNS)
    there = token < end
    grad = tl.load(product_ptr + row * chunk + (token - origin), mask=there, other=0.0)
    if DIRECT:
        at = direct_ptr + row * direct_row_stride + token.to(tl.int64) * direct_column_stride
        grad += tl.load(at, mask=there, other=0.0).to(tl.float32)
    weight = tempered_exp(z - top, base) * tl.exp2(fraction)
    # G may be infinite where p is 0, or will be when the whole row is known.
    finite = (weight > 0) & (tl.abs(grad) < float("inf"))
    centred = grad * _HEADROOM - hard_grad * _HEADROOM - mean * _HEADROOM
    tilt = tl.where(finite, weight * centred, 0.0)
    at = row * (2 * chunk) + (token - origin)
    for t in tl.static_range(len(weights)):
        dtype = weights[t].dtype.element_ty
        rounded, rounded_tilt = weight.to(dtype), tilt.to(dtype)
        tl.store(weights[t] + at, rounded, mask=there)
        tl.store(weights[t] + at + chunk, rounded_tilt, mask=there)
        weight -= rounded.to(tl.float32)
        tilt -= rounded_tilt.to(tl.float32)
    if not FIRST:
        old_top, old_some, old_grad, _old_total, old_mean, _spoiled = joined_slices(
            slices_ptr, slices, first_slice, base, SLICES
        )
        former, _fraction = power_parts(old_top, old_some, base)
        factor = power_of_two(former - exponent)
        # Nothing has been summed of a row that was masked so far.
        step = (old_grad * _HEADROOM - hard_grad * _HEADROOM) + (old_mean - mean) * _HEADROOM
        step = tl.where(old_some, step, 0.0)
        sums_ptr += row * (2 * width)
        for begin in range(of_chunk * MOVED, width, chunk_slices * MOVED):
            column = begin + tl.arange(0, MOVED)
            known = column < width
            sums = tl.load(sums_ptr + column, mask=known, other=0.0)
            tilts = tl.load(sums_ptr + width + column, mask=known, other=0.0)
            # What no longer counts may have been infinite.
            moved = tl.where(factor > 0, tl.fma(sums, step, tilts) * factor, 0.0)
            tl.store(sums_ptr + column, sums * factor, mask=known)
            tl.store(sums_ptr + width + column, moved, mask=known)


@launched
@triton.jit(do_not_specialize=["slices", "blocks"])
def _hidden_grad_kernel(
    slices_ptr,  # [N, FIELDS, slices] float32
    sums_ptr,  # [N, 2, H] float32
    grad_ptr,  # [N, H], contiguous
    width,  # H
    slices,
    blocks,  # of a row
    base,
    inverse,  # 1/τ
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    top, some, _hard_grad, total, _mean, spoiled = joined_slices(
        slices_ptr + row * (FIELDS * slices), slices, slices, base, SLICES
    )
    _exponent, fraction = power_parts(top, some, base)
    tilts = tl.load(sums_ptr + row * (2 * width) + width + column, mask=column < width, other=0.0)
    scale = inverse / (total * tl.exp2(fraction) * _HEADROOM)
    grad = tl.where(spoiled, float("nan"), tilts * scale)
    tl.store(grad_ptr + row * width + column, grad.to(grad_ptr.dtype.element_ty), mask=column < width)


_COLUMNS = 512  # of a program of _hidden_grad_kernel
# Numbers of 8 bits that a weight is the sum of, for a gradient of each dtype.
_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def linear_embedding_mix_backward(
    cotangents: list[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: list[Tensor],
    *,
    tau: float,
    noise: Noise,
    direct: Tensor | None,
) -> Tensor:
    """∂ℒ/∂h = Wᵀ ∂ℒ/∂z: [N, H] in the dtype of ``hidden``. Arguments as of the two functions above.

    One pass over the vocabulary. ⟨p, G⟩ is known at its end; until then the head's rows are summed twice,
    with weights e = exp(z/τ)·2⁻ᵏ and with e·(G − c), c the ⟨p, G⟩ of the chunks so far, and the second sums
    are moved by the first as c changes: 2·N·V·(3H + ΣH_t) operations, where the least is
    2·N·V·(2H + ΣH_t), a second pass takes 2·N·V·(3H + 2ΣH_t) and rows of logits that are kept take the
    tables through memory for every 50 of them.

    With a bfloat16 head, a gradient takes its weights in as many bfloat16 terms as its own dtype needs.
    """
    rows, vocabulary = len(hidden), len(head)
    result = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    kind, terms = torch.float32, 1
    if head.dtype == torch.bfloat16:
        kind, terms = torch.bfloat16, _TERMS[hidden.dtype]
    row_bytes = 4 * FIELDS.value * cdiv(vocabulary, SLICE) + 8 * hidden.shape[1]
    row_bytes += chunk_bytes([hidden], [head]) + chunk_bytes(cotangents, tables)
    token_bytes = 8 + 2 * terms * kind.itemsize
    cut = partition(rows, vocabulary, row_bytes=row_bytes, token_bytes=token_bytes)
    most, chunk = cut.most_rows, min(cut.tokens, vocabulary)
    memory = _Memory(
        *(hidden.new_empty(most * chunk, dtype=torch.float32) for _ in range(2)),
        [hidden.new_empty(2 * most * chunk, dtype=kind) for _ in range(terms)],
        hidden.new_empty(most, FIELDS.value, cdiv(vocabulary, SLICE), dtype=torch.float32),
        hidden.new_empty(2 * most, hidden.shape[1], dtype=torch.float32),
    )
    with float32_products(), torch.cuda.device_of(hidden):
        for part in cut.rows:
            _backward(
                [cotangent[part] for cotangent in cotangents],
                hidden[part],
                head,
                tables,
                tau,
                part_of(noise, part),
                None if direct is None else direct[part],
                result[part],
                cut,
                memory,
            )
    return result


class _Memory(NamedTuple):
    """Scratch memory of a part of the rows."""

    logits: Tensor  # N·C float32
    products: Tensor  # N·C float32
    weights: list[Tensor]  # 2·N·C, one a term
    slices: Tensor  # [N, FIELDS, slices] float32
    sums: Tensor  # [2·N, H] float32


def _backward(
    cotangents: list[Tensor],
    hidden: Tensor,
    head: Tensor,
    tables: list[Tensor],
    tau: float,
    noise: Noise,
    direct: Tensor | None,
    result: Tensor,
    cut: Partition,
    memory: _Memory,
) -> None:
    (rows, width), vocabulary = hidden.shape, len(head)
    slices = cdiv(vocabulary, SLICE)
    sums = memory.sums[: 2 * rows]
    given = (direct, *direct.stride()) if direct is not None else (sums, 0, 0)
    key = noise or (sums, sums)
    base = exp_base(tau)
    options = {"COLUMNS": SLICE, "NOISE": noise is not None, "DIRECT": direct is not None}
    options["num_warps"] = WARPS
    joined = next_power_of_2(slices)
    states, pulls = chunk_states([hidden], [head]), chunk_states(cotangents, tables)
    for first, end in cut.chunks(vocabulary):
        size = end - first
        logits, product = (
            part[: rows * size].view(rows, size) for part in (memory.logits, memory.products)
        )
        chunk_product(states, [head[first:end]], logits)
        chunk_product(pulls, [table[first:end] for table in tables], product)
        of_chunk = cdiv(size, SLICE)
        place = (end, first // SLICE, of_chunk, slices)
        survey_kernel[(rows * of_chunk,)](
            product,
            size,
            first,
            *given,
            logits,
            size,
            1,
            first,
            *key,
            memory.slices,
            sums,
            sums,
            vocabulary,
            *place,
            base,
            SPLIT=False,
            **options,
        )
        weights = [part[: 2 * rows * size].view(2 * rows, size) for part in memory.weights]
        _pull_weights_kernel[(rows * of_chunk,)](
            logits,
            product,
            *given,
            *key,
            memory.slices,
            tuple(weights),
            sums,
            width,
            first,
            *place,
            base,
            FIRST=first == 0,
            SLICES=joined,
            MOVED=_MOVED,
            **options,
        )
        for index, term in enumerate(weights):
            add_weighted_rows(sums, term, head[first:end], keep=first > 0 or index > 0)
    blocks = cdiv(width, _COLUMNS)
    _hidden_grad_kernel[(rows * blocks,)](
        memory.slices,
        sums,
        result,
        width,
        slices,
        blocks,
        base,
        1 / tau,
        COLUMNS=_COLUMNS,
        SLICES=joined,
        num_warps=4,
    )
