"""Draws from filtered logits on the device where they are, by noise that is a function of a key."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.ops.checks import expect, expect_vocabulary
from nabla_fast.ops.gumbel_noise import philox_words
from nabla_fast.ops.limits import native_backend, triton_backend
from nabla_fast.ops.registry import floats, integers, op

MOST_VISITS = 1 << 30


class DrawKey(NamedTuple):
    """What the noise of N rows' draws is a function of, beside the token: no two draws share all of it.

    Example:
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> DrawKey(seed=zero + 42, start=zero + 9, visit=zero, position=torch.tensor([9, 10])).position
        tensor([ 9, 10])
    """

    seed: Tensor  # [N] int64, of the prompt
    start: Tensor  # [N] int64, tokens before the first of this rollout; its lower 32 bits count
    visit: Tensor  # [N] int64, 0 unless a rollout starts there again; its lower 30 bits count
    position: Tensor  # [N] int64, tokens before the one drawn; its lower 32 bits count


KEY_RULE = {field: integers("N") for field in DrawKey._fields}


@op(arguments={"logits": floats("N", "V"), "key": KEY_RULE}, reads=())
def draw_tokens(
    logits: Tensor,
    key: DrawKey,
    *,
    redraw: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """One token a row from softmax(top_p(top_k(z / T))): argmax of log p + g, g Gumbel noise.

    Top-k keeps every token that ties with the k-th; top-p drops the least likely of what it left whose
    cumulative mass is ≤ 1 − p, of equally likely ones those of lower index first, never the last.

    A token depends on the row's logits, its key and the settings, on nothing else: not on the rows beside
    it, nor on a generator's state. All that decides is computed in double precision, a mass rounded to
    float32 before it is compared with 1 − p, so that backends give the same tokens. Nothing waits for the
    device, no shape depends on the data, and a CUDA graph can capture it.

    g = −log(−log((word + ½) / 2³²)); token v takes word v mod 4 of Philox-4x32-10 at counter (v div 4,
    position, start, 4·visit + domain) under the key (seed low word, seed high word). The domain is 1, or
    2 of redraws; 0 is that of :func:`nabla_fast.ops.gumbel_noise`, whose noise no draw repeats.

    Args:
        logits: z [N, V], floating point.
        key: seed, start, visit and position [N] int64.
        redraw: the token of a position whose logits were optimized, not one of a rollout.
        temperature: T; ≤ 0 counts as 1.
        top_k: tokens kept; 0 keeps all.
        top_p: smallest probability mass kept, in (0, 1]; the token that crosses it stays.
    Returns:
        [N] int64. Of a row that holds NaN or +inf, or nothing but −inf, some token.
    Raises:
        InputError: a shape, dtype or device does not fit, or a setting is out of its range.

    Source: the Gumbel-max trick (Gumbel, 1954; Maddison et al., "A* Sampling", NeurIPS 2014); nucleus
    sampling from Holtzman et al., ICLR 2020; Philox from Salmon et al., SC 2011.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> draw_tokens(torch.tensor([[0.0, 5.0, 1.0]]), DrawKey(zero, zero, zero, zero), top_k=1)
        tensor([1])
    """
    scores = logits.double() / (temperature if temperature > 0 else 1.0)
    kept = _kept(scores, top_k, top_p)
    return torch.where(kept, scores + draw_noise(key, logits.shape[1], redraw), -torch.inf).argmax(dim=1)


def draw_noise(key: DrawKey, vocabulary: int, redraw: bool) -> Tensor:
    """The Gumbel noise of :func:`draw_tokens`, [N, V] float64."""
    words = philox_words(
        key.seed, key.position, vocabulary, start=key.start, last=4 * key.visit + (2 if redraw else 1)
    )
    return -torch.log(-torch.log((words.double() + 0.5) / 2**32))


def _kept(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """[N, V], which tokens of scores [N, V] float64 are drawn from."""
    vocabulary = scores.shape[1]
    k = top_k if 0 < top_k < vocabulary else vocabulary
    if k == vocabulary and top_p == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    descending = scores.topk(k, dim=1).values if k < vocabulary else None
    least = scores.amin(dim=1, keepdim=True) if descending is None else descending[:, -1:]
    kept = scores >= least
    if top_p == 1:
        return kept
    # Mass is added up from the least likely on; of ties with the k-th some are not among the k.
    ascending = (scores.sort(dim=1).values if descending is None else descending.flip(1)).contiguous()
    top = ascending[:, -1:]
    shares = (ascending - top).exp()
    share = shares[:, :1]
    outside = kept.sum(dim=1, keepdim=True) - k
    mass = outside * share + shares.cumsum(dim=1)
    total = mass[:, -1:]
    limit = _float32(1 - top_p)
    first = (~_fits(mass, total, limit)).int().argmax(dim=1, keepdim=True)  # of those that stay
    first = torch.where(_fits(total, total, limit), k - 1, first)
    value = ascending.gather(1, first)
    # Of the tokens that score as the first that stays, the lowest in index whose mass fits as well.
    ties = scores == value
    before = ((ascending < value) * shares).sum(dim=1, keepdim=True)
    before = before + outside * share * (value > least)
    number = ties.cumsum(dim=1)
    mass_with = before + number * (value - top).exp()
    last = (value == top) & (number == number[:, -1:])
    stay = ties & (~_fits(mass_with, total, limit) | last)
    return (scores > value) | stay


def _fits(mass: Tensor, total: Tensor, limit: float) -> Tensor:
    """Whether mass may be dropped."""
    return (mass / total).float() <= limit


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@draw_tokens.check
def check_draw_tokens(
    logits: Tensor, key: DrawKey, *, redraw: bool, temperature: float, top_k: int, top_p: float
) -> None:
    expect_vocabulary("draw_tokens", logits.shape[1])
    expect(not math.isnan(temperature), "draw_tokens: temperature is not a number")
    expect(top_k >= 0, f"draw_tokens: top_k must not be negative, got {top_k}")
    expect(0 < top_p <= 1, f"draw_tokens: top_p must be in (0, 1], got {top_p}")


@draw_tokens.fake
def fake_draw_tokens(logits: Tensor, key: DrawKey, **_: float) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)


def _cpu_refusal(logits: Tensor, key: DrawKey, *, temperature: float, **_: float) -> str | None:
    if temperature > 0 and not 2.0**-64 <= temperature <= 2.0**64:
        return f"temperature is {temperature} (the C++ kernel takes 2^-64 to 2^64)"
    return native_backend.matrix_refusal("logits", logits)


@draw_tokens.backend("cpu", refuses=_cpu_refusal)
def draw_tokens_cpu(
    logits: Tensor, key: DrawKey, *, redraw: bool, temperature: float, top_k: int, top_p: float
) -> Tensor:
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device="cpu")
    extension().draw_tokens(
        num_threads=torch.get_num_threads(),
        rows=rows,
        vocab=vocab,
        logits=logits,
        **{name: part.contiguous() for name, part in key._asdict().items()},
        redraw=int(redraw),
        tau=temperature if temperature > 0 else 1.0,
        top_k=top_k,
        top_p=top_p,
        token=token,
        row_status=torch.empty(rows, dtype=torch.int32, device="cpu"),
    )
    return token


def _triton_refusal(logits: Tensor, key: DrawKey, **_: float) -> str | None:
    return triton_backend.refusal(logits=logits, key=key)


@draw_tokens.backend("triton", refuses=_triton_refusal)
def draw_tokens_triton(
    logits: Tensor, key: DrawKey, *, redraw: bool, temperature: float, top_k: int, top_p: float
) -> Tensor:
    from nabla_fast.triton_kernels import draw_tokens as kernels

    return kernels.draw_tokens(logits, key, redraw, temperature if temperature > 0 else 1.0, top_k, top_p)
