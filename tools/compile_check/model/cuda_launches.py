"""What a mix of csrc/cuda launches, in order: as embedding_mix.cu and embedding_mix_backward.cu have it.

Tensors hold nothing; they stand for the memory that a launch reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SLICE = 4096  # tokens of a block, kSliceTokens
WARPS = 8  # of a block, kWarps
_COLUMNS = 1024  # of a block that writes columns, kColumns
_DTYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Launch:
    """A kernel, or a product by the vendor's library.

    Attributes:
        kernel: name as of :func:`~.cuda_code.kernels`; "" for a product.
        programs: blocks of the grid; 0 for a product.
        flops: of a product.
    """

    kernel: str
    programs: int
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]
    flops: float = 0.0


@dataclass(frozen=True)
class Mix:
    """A call, with the constants that ``call.h`` is compiled with.

    Attributes:
        rows, vocabulary: N and V.
        widths: of the tables.
        dtype: of the tables, mixes and cotangents, of the head and the hidden states.
        logits: dtype of the logits; of hidden states they are float32.
        hidden: width of the hidden states; 0 where logits are given.
        chunk_bytes, most_rows: kChunkBytes and kMostRows.
    """

    rows: int
    vocabulary: int
    widths: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    logits: torch.dtype = torch.float32
    hidden: int = 0
    chunk_bytes: int = 32 << 20
    most_rows: int = 1024
    tables: list[Tensor] = field(init=False)
    head: Tensor = field(init=False)

    def __post_init__(self) -> None:
        tables = [_empty(self.vocabulary, width, self.dtype) for width in self.widths]
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "head", _empty(self.vocabulary, self.hidden, self.dtype))

    @property
    def slices(self) -> int:
        return -(-self.vocabulary // SLICE)

    def chunks(self, rows: int, token_bytes: int) -> Iterator[tuple[int, int, int]]:
        """(slices, first token, end) of each, as slices_of_chunk() and for_each_chunk() cut them."""
        most = max(self.chunk_bytes // max(rows * token_bytes * SLICE, 1), 1)
        each = -(-self.slices // -(-self.slices // most))
        for first in range(0, self.slices, each):
            count = min(each, self.slices - first)
            yield count, first * SLICE, min((first + count) * SLICE, self.vocabulary)


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _product(
    rows: int, inner: int, columns: int, factors: tuple[Tensor, Tensor], out: Tensor, keep: bool
) -> Launch:
    reads = (*factors, out) if keep else factors
    return Launch("", 0, reads, (out,), 2.0 * rows * inner * columns)


def forward(mix: Mix) -> Iterator[Launch]:
    """Launches of soft mixes."""
    most = min(mix.rows, mix.most_rows)
    for first in range(0, mix.rows, most):
        yield from _forward_part(mix, most, min(most, mix.rows - first))


def _forward_part(mix: Mix, most: int, rows: int) -> Iterator[Launch]:
    own, kind = _DTYPES[mix.dtype], "float" if mix.hidden else _DTYPES[mix.logits]
    logits = _empty(rows, mix.vocabulary, torch.float32 if mix.hidden else mix.logits)
    hidden = _empty(rows, mix.hidden, mix.dtype)
    tops, sums = _empty(rows, 2 * mix.slices, torch.float32), _empty(rows, 3 * mix.slices, torch.float32)
    mixed = [_empty(rows, width, torch.float32) for width in mix.widths]
    chunks = list(mix.chunks(most, mix.dtype.itemsize + (4 if mix.hidden else 0)))
    width = chunks[0][2]  # the first chunk is the largest
    weights, chunk_logits = _empty(rows, width, mix.dtype), _empty(rows, width, torch.float32)
    beforehand = not mix.hidden and len(chunks) > 1 and rows * width * mix.logits.itemsize > mix.chunk_bytes
    if beforehand:
        yield Launch(f"tops_kernel<{kind}, false>", rows * mix.slices, (logits,), (tops,))
    for count, begin, end in chunks:
        here = logits[:, begin:end]
        if mix.hidden:
            here = chunk_logits[:, : end - begin]
            yield _product(rows, mix.hidden, end - begin, (hidden, mix.head[begin:end]), here, False)
        if not beforehand:
            yield Launch(f"tops_kernel<{kind}, false>", rows * count, (here,), (tops,))
        of_chunk = weights[:, : end - begin]
        yield Launch(f"weights_kernel<{kind}, {own}, false>", rows * count, (here, tops), (of_chunk, sums))
        for table, part in zip(mix.tables, mixed, strict=True):
            factors = of_chunk, table[begin:end]
            yield _product(rows, end - begin, table.shape[1], factors, part, begin > 0)
    yield Launch("rows_kernel", -(-rows // WARPS), (tops, sums), ())
    for part in mixed:
        blocks = rows * -(-part.shape[1] // _COLUMNS)
        yield Launch(f"divide_kernel<{own}>", blocks, (part,), (part.to(mix.dtype),))


def backward(mix: Mix) -> Iterator[Launch]:
    """Launches of the gradient with respect to logits, or hidden states."""
    most = mix.most_rows
    if mix.hidden:
        most, part = min(mix.rows, most), _linear_backward_part
    else:
        if mix.logits != torch.float32:
            most = min(max(2 * mix.chunk_bytes // (-(-mix.vocabulary // 4) * 4), 1), most)
        most, part = -(-mix.rows // -(-mix.rows // most)), _backward_part
    for first in range(0, mix.rows, most):
        yield from part(mix, most, min(most, mix.rows - first))


def _gradient(mix: Mix, rows: int, begin: int, end: int, grad: Tensor) -> Iterator[Launch]:
    cotangents = [_empty(rows, width, mix.dtype) for width in mix.widths]
    for t, table in enumerate(mix.tables):
        yield _product(rows, table.shape[1], end - begin, (cotangents[t], table[begin:end]), grad, t > 0)


def _backward_part(mix: Mix, most: int, rows: int) -> Iterator[Launch]:
    kind = _DTYPES[mix.logits]
    logits, result = (_empty(rows, mix.vocabulary, mix.logits) for _ in range(2))
    sums = _empty(rows, 6 * mix.slices, torch.float32)
    chunks = list(mix.chunks(most, 4))
    cut = mix.logits != torch.float32  # 24 bits of G are kept: 16 in the result
    chunk_grad = _empty(rows, chunks[0][2] if cut else 0, torch.float32)
    following = _empty(rows, mix.vocabulary if cut else 0, torch.uint8)
    for count, begin, end in chunks:
        grad = chunk_grad[:, : end - begin] if cut else result[:, begin:end]
        yield from _gradient(mix, rows, begin, end, grad)
        kept = (result[:, begin:end], following[:, begin:end]) if cut else ()
        reads = (grad, logits[:, begin:end])
        yield Launch(f"survey_kernel<{kind}, false>", rows * count, reads, (sums, *kept))
    yield Launch("join_kernel", -(-rows // WARPS), (sums,), ())
    reads = (logits, result, *([following] if cut else []))
    yield Launch(f"jacobian_kernel<{kind}, false>", rows * mix.slices, reads, (result,))


def _linear_backward_part(mix: Mix, most: int, rows: int) -> Iterator[Launch]:
    own = "bfloat16" if mix.dtype == torch.bfloat16 else "float"
    chunks = list(mix.chunks(most, 8 + 2 * (2 if mix.dtype == torch.bfloat16 else 4)))
    width = chunks[0][2]
    hidden, pulled = _empty(rows, mix.hidden, mix.dtype), _empty(2 * rows, mix.hidden, torch.float32)
    chunk_logits, chunk_grad = (_empty(rows, width, torch.float32) for _ in range(2))
    weights = _empty(2 * rows, width, mix.dtype if own == "bfloat16" else torch.float32)
    sums = _empty(rows, 6 * mix.slices, torch.float32)
    for count, begin, end in chunks:
        z, grad, of_chunk = (part[:, : end - begin] for part in (chunk_logits, chunk_grad, weights))
        yield _product(rows, mix.hidden, end - begin, (hidden, mix.head[begin:end]), z, False)
        yield from _gradient(mix, rows, begin, end, grad)
        yield Launch("survey_kernel<float, false>", rows * count, (grad, z), (sums,))
        moved = [pulled] if begin > 0 else []
        yield Launch(
            f"pull_weights_kernel<{own}, false>", rows * count, (grad, z, sums, *moved), (of_chunk, *moved)
        )
        factors = of_chunk, mix.head[begin:end]
        yield _product(2 * rows, end - begin, mix.hidden, factors, pulled, begin > 0)
    blocks = rows * -(-mix.hidden // _COLUMNS)
    yield Launch("hidden_grad_kernel", blocks, (sums, pulled), (hidden.float(),))


LAUNCHES: dict[str, Callable[[Mix], Iterator[Launch]]] = {"forward": forward, "backward": backward}
