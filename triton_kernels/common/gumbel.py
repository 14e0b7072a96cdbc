"""Gumbel noise, a pure function of (seed, absolute position, token), and its matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched
from .sizes import cdiv

_COLUMNS = 1024


@triton.jit
def _from_word(word):
    """−log(−log u) of 32 random bits.

    In double precision: near its zero at u = 1/e the outer logarithm magnifies the rounding of the
    inner one, and the approximate float32 logarithm has no correct digit left where u is near 1.
    """
    uniform = ((word >> 9).to(tl.float64) + 0.5) * (1.0 / (1 << 23))
    return -tl.log(-tl.log(uniform))


@triton.jit
def _words(seed, position, block):
    """The four words of a block of four tokens; arguments broadcast."""
    block = block.to(tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32) + block * 0
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32) + block * 0
    return tl.philox(seed, block, low, high, block * 0)


@triton.jit
def gumbel(seed, position, token):
    """Noise of any tokens: float32 of the shape that the arguments broadcast to.

    For neighbours :func:`gumbel_row` draws a quarter of the words.

    Args:
        seed, position: int64.
        token: int32 or int64, at least 0.
    """
    w0, w1, w2, w3 = _words(seed, position, token // 4)
    word = token % 4
    even = tl.where(word == 0, w0, w2)
    odd = tl.where(word == 1, w1, w3)
    return _from_word(tl.where(word % 2 == 0, even, odd)).to(tl.float32)


@triton.jit
def gumbel_row(seed, position, start, COLUMNS: tl.constexpr):
    """Noise of the tokens start..start + COLUMNS − 1 of one row: [COLUMNS] float32.

    Args:
        seed, position: int64 scalars.
        start: a multiple of 4.
        COLUMNS: a power of two ≥ 4.
    """
    return _row(seed, position, start, COLUMNS).to(tl.float32)


@triton.jit
def _row(seed, position, start, COLUMNS: tl.constexpr):
    w0, w1, w2, w3 = _words(seed, position, start // 4 + tl.arange(0, COLUMNS // 4))
    return _from_word(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def draw_noise(seed, start, last, position, token):
    """Noise of the draws of one row, float64 [T], of tokens [T] int32.

    Args:
        seed, start, last, position: int64 scalars, of which the lower 32 bits count but for the seed.
    """
    block = (token // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        block,
        (position & 0xFFFFFFFF).to(tl.uint32) + block * 0,
        (start & 0xFFFFFFFF).to(tl.uint32) + block * 0,
        (last & 0xFFFFFFFF).to(tl.uint32) + block * 0,
    )
    word = tl.where(token % 2 == 0, tl.where(token % 4 == 0, w0, w2), tl.where(token % 4 == 1, w1, w3))
    return -tl.log(-tl.log((word.to(tl.float64) + 0.5) * (1.0 / (1 << 32))))


@launched
@triton.jit
def _gumbel_noise_kernel(
    seed_ptr,  # [N] int64
    position_ptr,  # [N] int64
    noise_ptr,  # [N, V]
    vocabulary,
    tiles,  # of a row
    first,  # token of the first column
    ADD: tl.constexpr,  # to what is there
    ALIGNED: tl.constexpr,  # first is a multiple of 4
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * COLUMNS
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    columns = start + tl.arange(0, COLUMNS)
    if ALIGNED:
        noise = _row(seed, position, first + start, COLUMNS)
    else:
        noise = gumbel(seed, position, first + columns)
    noise = noise.to(noise_ptr.dtype.element_ty)
    at = noise_ptr + row * vocabulary + columns
    if ADD:
        noise += tl.load(at, mask=columns < vocabulary, other=0.0)
    tl.store(at, noise, mask=columns < vocabulary)


def gumbel_noise(seed: Tensor, position: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """The noise of N rows.

    Args:
        seed, position: [N] int64.
        vocabulary: V.
        dtype: of the result, float32 or float64.
    Returns:
        [N, V].
    """
    noise = torch.empty(len(seed), vocabulary, dtype=dtype, device=seed.device)
    _launch(seed, position, noise, first=0, add=False)
    return noise


def add_gumbel_noise(logits: Tensor, seed: Tensor, position: Tensor, first: int) -> None:
    """z + g in place of z.

    Args:
        logits: z [N, C] float32, contiguous.
        seed, position: [N] int64.
        first: token of the first column.
    """
    _launch(seed, position, logits, first=first, add=True)


def _launch(seed: Tensor, position: Tensor, onto: Tensor, *, first: int, add: bool) -> None:
    rows, vocabulary = onto.shape
    if rows:
        tiles = cdiv(vocabulary, _COLUMNS)
        seed, position = seed.contiguous(), position.contiguous()
        with torch.cuda.device_of(onto):
            _gumbel_noise_kernel[(rows * tiles,)](
                seed,
                position,
                onto,
                vocabulary,
                tiles,
                first,
                ADD=add,
                ALIGNED=first % 4 == 0,
                COLUMNS=_COLUMNS,
            )
