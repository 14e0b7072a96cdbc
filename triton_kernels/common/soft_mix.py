"""softmax(z/τ)·T_t of all tables, a chunk of the vocabulary at a time.

A kernel writes a chunk's weights exp(z/τ)·2⁻ᵏ once, in the tables' dtypes and times a constant power of
two, and a library product with float32 sums takes them to the tables' rows. k = ⌈max z/(τ ln 2)⌉ over the
chunks so far: a weight is at most that constant, and when k grows, what has been summed is multiplied by a
power of two, which is exact. The mix is divided by the sum of the weights as they were rounded: rounding
then shifts a mix inside the span of the table's rows and does not scale it. (The form of quack's cross
entropy with scaled exponentials.)

Before a chunk's weights come the maxima of its slices: where logits are made chunk by chunk, or a chunk of
them lies in the L2 cache, the second reading finds them there. Where they lie in memory, too many for the
cache, one launch takes the maxima of all chunks beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponential import exp_base, tempered_exp
from .launch import launched
from .library_products import add_weighted_rows
from .powers import NO_EXPONENT, power_of_two, power_parts
from .row_tops import Noise, RowTops, row_status
from .sizes import cdiv, next_power_of_2
from .vocabulary_chunks import SLICE, WARPS, logits_slice

_RESCALED = 256  # sums at a time
# Weights of at most 1 reach float16's subnormal numbers early, and the small ones of a flat row add up:
# they are scaled by 2¹⁵. Sums of up to 2²⁰ others stay as finite as the tables are: by 2⁻²⁰.
_FLOAT16_SCALE, _SCALE = tl.constexpr(15.0), tl.constexpr(-20.0)


@launched
@triton.jit(do_not_specialize=["rows", "first_slice", "chunk_slices", "slices"])
def _weights_kernel(
    logits_ptr,
    row_stride,
    column_stride,
    seed_ptr,
    position_ptr,
    tops_ptr,  # [N, slices] float32
    weights,  # [N, C] each, contiguous: one a dtype of the tables
    totals_ptr,  # [dtypes, rows, slices] float32: the sum of a slice's weights
    exponents_ptr,  # [N, slices] float64: their k
    sums_ptr,  # [N, ΣH_t] float32, contiguous: multiplied by a power of two where k grows
    rows,
    width,  # ΣH_t
    end,
    origin,
    chunk_width,  # C
    first_slice,
    chunk_slices,
    slices,
    base,
    FIRST: tl.constexpr,  # chunk: no sums yet
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,  # a power of two ≥ slices
    RESCALED: tl.constexpr,
    NOISE: tl.constexpr,
):
    row = (tl.program_id(0) // chunk_slices).to(tl.int64)
    of_chunk = tl.program_id(0) % chunk_slices
    slice = first_slice + of_chunk
    start = slice * COLUMNS
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
    other = tl.arange(0, SLICES)
    tops = tl.load(
        tops_ptr + row * slices + other, mask=other < first_slice + chunk_slices, other=-float("inf")
    )
    tops = tl.where(tops == tops, tops, -float("inf"))
    top = tl.max(tops, axis=0)
    some = tl.abs(top) < float("inf")
    top = tl.where(some, top, 0.0)
    exponent, fraction = power_parts(top, some, base)
    tl.store(exponents_ptr + row * slices + slice, exponent)
    if not FIRST:
        before = tl.max(tl.where(other < first_slice, tops, -float("inf")), axis=0)
        had = tl.abs(before) < float("inf")
        former, _fraction = power_parts(tl.where(had, before, 0.0), had, base)
        factor = power_of_two(former - exponent)
        if factor != 1.0:
            for begin in range(of_chunk * RESCALED, width, chunk_slices * RESCALED):
                place = begin + tl.arange(0, RESCALED)
                sums = tl.load(sums_ptr + row * width + place, mask=place < width, other=0.0)
                tl.store(sums_ptr + row * width + place, sums * factor, mask=place < width)
    difference = z - top
    column = of_chunk * COLUMNS + tl.arange(0, COLUMNS)
    there = column < chunk_width
    for t in tl.static_range(len(weights)):
        dtype = weights[t].dtype.element_ty
        if dtype == tl.float32:
            weight = tempered_exp(difference, base) * tl.exp2(fraction + _SCALE)
        else:
            # The hardware's exponential is exact enough for what is rounded at once.
            scale = _FLOAT16_SCALE if dtype == tl.float16 else _SCALE
            weight = tl.exp2(tl.fma(difference, base[0], fraction + scale))
        rounded = weight.to(dtype)
        tl.store(weights[t] + row * chunk_width + column, rounded, mask=there)
        at = totals_ptr + (t * rows + row) * slices + slice
        tl.store(at, tl.sum(tl.where(there, rounded.to(tl.float32), 0.0), axis=0))


@launched
@triton.jit(do_not_specialize=["rows", "slices", "blocks"])
def _divide_kernel(
    tops_ptr,  # [N, slices] float32
    totals_ptr,  # [N, slices] float32, of the table's dtype
    exponents_ptr,  # [N, slices] float64
    sums_ptr,  # [N, ..] float32: the table's columns
    mix_ptr,  # [N, H_t], contiguous
    status_ptr,  # [N] int32
    sums_stride,
    table_width,  # H_t
    slices,
    blocks,  # of a row
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    slice = tl.arange(0, SLICES)
    there = slice < slices
    exponents = tl.load(exponents_ptr + row * slices + slice, mask=there, other=NO_EXPONENT)
    totals = tl.load(totals_ptr + row * slices + slice, mask=there, other=0.0)
    factors = power_of_two(exponents - tl.max(exponents, axis=0))
    total = tl.sum(totals.to(tl.float64) * factors.to(tl.float64), axis=0).to(tl.float32)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    known = column < table_width
    mix = tl.load(sums_ptr + row * sums_stride + column, mask=known, other=0.0) / total
    tl.store(mix_ptr + row * table_width + column, mix.to(mix_ptr.dtype.element_ty), mask=known)
    if block == 0:
        tops = tl.load(tops_ptr + row * slices + slice, mask=there, other=-float("inf"))
        top = tl.max(tl.where(tops == tops, tops, -float("inf")), axis=0)
        tl.store(status_ptr + row, row_status(tops, top))


_DIVIDED = 1024  # sums of a program


def scratch_bytes(tables: list[Tensor], vocabulary: int) -> tuple[int, int]:
    """Bytes that a row takes, and each token of a chunk for each row."""
    kinds = {table.dtype for table in tables}
    slices = cdiv(vocabulary, SLICE)
    row = 4 * sum(table.shape[1] for table in tables) + slices * (
        16 + 4 * len(kinds)
    )  # tops, tokens, exponents; totals
    return row, sum(kind.itemsize for kind in kinds)


class SoftMix:
    """The mixes of some rows, to which chunks are added in the order of the vocabulary.

    Its memory serves one part of the rows after another, of at most ``rows``.
    """

    def __init__(
        self, like: Tensor, rows: int, vocabulary: int, tables: list[Tensor], tau: float, chunk: int
    ):
        self.tables = tables
        self.base = exp_base(tau)
        self.row_tops = RowTops(like, rows, vocabulary)
        self.rows = rows
        self.kinds = list(dict.fromkeys(table.dtype for table in tables))
        self.memory = [like.new_empty(rows * min(chunk, vocabulary), dtype=kind) for kind in self.kinds]
        slices = self.row_tops.slices
        self.totals = like.new_empty(len(self.kinds), rows, slices, dtype=torch.float32)
        self.exponents = like.new_empty(rows, slices, dtype=torch.float64)
        self.widths = [table.shape[1] for table in tables]
        self.sums = like.new_empty(rows, sum(self.widths), dtype=torch.float32)

    def add(
        self, logits: Tensor, noise: Noise, first: int, end: int, origin: int, *, measured: bool = False
    ) -> None:
        """The tokens first..end − 1; arguments as of :meth:`RowTops.measure`.

        Args:
            measured: whether ``row_tops`` has these rows' slices already.
        """
        rows, size, tops = len(logits), end - first, self.row_tops
        if not measured:
            tops.measure(logits, noise, first, end, origin)
        weights = [memory[: rows * size].view(rows, size) for memory in self.memory]
        of_chunk = cdiv(size, SLICE)
        with torch.cuda.device_of(logits):
            _weights_kernel[(rows * of_chunk,)](
                logits,
                *logits.stride(),
                *(noise or (tops.tokens, tops.tokens)),
                tops.tops,
                tuple(weights),
                self.totals,
                self.exponents,
                self.sums,
                self.rows,
                self.sums.shape[1],
                end,
                origin,
                size,
                first // SLICE,
                of_chunk,
                tops.slices,
                self.base,
                FIRST=first == 0,
                COLUMNS=SLICE,
                SLICES=next_power_of_2(tops.slices),
                RESCALED=_RESCALED,
                NOISE=noise is not None,
                # Noise in double precision takes registers.
                num_warps=WARPS if noise is None else 2 * WARPS,
            )
        for table, sums in zip(self.tables, self._columns(rows), strict=True):
            of_kind = weights[self.kinds.index(table.dtype)]
            add_weighted_rows(sums, of_kind, table[first:end], keep=first > 0)

    def finish(self, mixes: list[Tensor], status: Tensor) -> None:
        """The mixes [N, H_t] and the rows' status [N] int32, into these, contiguous."""
        rows, tops = len(status), self.row_tops
        with torch.cuda.device_of(status):
            for table, sums, mix in zip(self.tables, self._columns(rows), mixes, strict=True):
                blocks = max(1, cdiv(table.shape[1], _DIVIDED))
                _divide_kernel[(rows * blocks,)](
                    tops.tops,
                    self.totals[self.kinds.index(table.dtype)],
                    self.exponents,
                    sums,
                    mix,
                    status,
                    sums.stride(0),
                    table.shape[1],
                    tops.slices,
                    blocks,
                    COLUMNS=_DIVIDED,
                    SLICES=next_power_of_2(tops.slices),
                    num_warps=4,
                )

    def _columns(self, rows: int) -> tuple[Tensor, ...]:
        """The sums of each table."""
        return torch.split_with_sizes(self.sums[:rows], self.widths, 1)
