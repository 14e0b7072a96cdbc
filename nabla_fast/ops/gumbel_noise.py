"""Gumbel noise that is a pure function of (seed, absolute position, token)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast.ops.checks import expect_vocabulary
from nabla_fast.ops.limits import triton_backend
from nabla_fast.ops.registry import integers, op

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


class GumbelNoise(NamedTuple):
    """The keys of N rows' noise; the noise itself is recomputed wherever it is needed.

    Example:
        >>> GumbelNoise(seed=torch.tensor([42, 42]), position=torch.tensor([7, 8])).position
        tensor([7, 8])
    """

    seed: Tensor  # [N] int64
    position: Tensor  # [N] int64, the row's absolute position in its sequence


def philox_4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The Philox-4x32-10 generator (Salmon et al., SC'11): four 32-bit words from a counter and a key.

    Args:
        counter: four int64 tensors holding 32-bit words, broadcastable.
        key: two such tensors.
    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, so both 32-bit halves come out right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def philox_words(
    seed: Tensor, position: Tensor, vocabulary: int, *, start: Tensor | None = None, last: Tensor | int = 0
) -> Tensor:
    """A 32-bit word for each token of N rows, [N, V] int64.

    Token v takes word v mod 4 at counter (v div 4, position low word, start low word, last) under the key
    (seed low word, seed high word).

    Args:
        seed, position: [N] int64.
        vocabulary: V.
        start: [N] int64; None: the high words of ``position``.
        last: of the counter's words; a number or [N] int64, of which the lower 32 bits count.
    """
    blocks = torch.arange((vocabulary + 3) // 4, device=seed.device)[None]
    third = position >> 32 if start is None else start
    rest = (position & _LOW, third & _LOW, torch.zeros_like(position) + last & _LOW)
    counter = (blocks, *(word[:, None] for word in rest))
    words = philox_4x32_10(counter, ((seed & _LOW)[:, None], (seed >> 32 & _LOW)[:, None]))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocabulary]


NOISE_RULE = {"seed": integers("N"), "position": integers("N")}


@op(arguments={"noise": NOISE_RULE}, reads=())
def gumbel_noise(noise: GumbelNoise, vocabulary: int) -> Tensor:
    """Standard Gumbel noise, −log(−log u).

    Token v of a row takes word v mod 4 of Philox-4x32-10 at counter (v div 4, position low word,
    position high word, 0) under the key (seed low word, seed high word); u = (word div 2⁹ + ½)/2²³
    is exact in float32, so that backends differ by the rounding of two logarithms at most.

    Args:
        noise: seed [N] int64 and position [N] int64.
        vocabulary: V.
    Returns:
        [N, V] float64.
    Raises:
        InputError: a dtype, a shape or V is wrong.

    Source: Philox from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Example:
        >>> key = GumbelNoise(torch.tensor([42]), torch.tensor([7]))
        >>> gumbel_noise(key, 5).shape
        torch.Size([1, 5])
    """
    word = philox_words(noise.seed, noise.position, vocabulary)
    uniform = ((word >> 9).double() + 0.5) / 2**23
    return -torch.log(-torch.log(uniform))


@gumbel_noise.check
def check_gumbel_noise(noise: GumbelNoise, vocabulary: int) -> None:
    expect_vocabulary("gumbel_noise", vocabulary)


@gumbel_noise.fake
def fake_gumbel_noise(noise: GumbelNoise, vocabulary: int) -> Tensor:
    return noise.seed.new_empty((noise.seed.shape[0], vocabulary), dtype=torch.float64)


@gumbel_noise.backend("triton", refuses=lambda noise, vocabulary: triton_backend.refusal(noise=noise))
def gumbel_noise_triton(noise: GumbelNoise, vocabulary: int) -> Tensor:
    from nabla_fast.triton_kernels.common import gumbel as kernels

    return kernels.gumbel_noise(*noise, vocabulary, torch.float64)


def contiguous(noise: GumbelNoise | None) -> GumbelNoise | None:
    """The key as kernels read it, with unit strides; None stays None."""
    return None if noise is None else GumbelNoise(noise.seed.contiguous(), noise.position.contiguous())


def perturbed(logits: Tensor, noise: GumbelNoise | None) -> Tensor:
    """``logits`` [N, V] plus the rows' noise, if there is any, in the dtype of ``logits``."""
    return logits if noise is None else logits + gumbel_noise(noise, logits.shape[1]).to(logits.dtype)
