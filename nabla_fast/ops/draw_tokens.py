"""Draws from filtered logits on the device where they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nabla_fast.ops.checks import expect, expect_vocabulary
from nabla_fast.ops.registry import floats, op, tensors


@op(
    arguments={
        "logits": tensors(("N", "V"), dtypes=(torch.float32, torch.float64)),
        "exponentials": floats("N", "V", like="logits"),
    },
    reads=(),
)
def draw_tokens(
    logits: Tensor, exponentials: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """One token a row from softmax(top_p(top_k(z / T))): argmax of p / q, as ``torch.multinomial`` has it.

    Top-k keeps every token that ties with the k-th; top-p drops the least likely of what it left whose
    cumulative mass is ≤ 1 − p, of equally likely ones those of lower index first, never the last. Given
    the exponentials that a generator draws for a row, the token is the one that
    ``nabla_fast.decode.sampling.draw`` gives with that generator, but where rounding decides.

    The tokens dropped are known from the k largest values and from how many tokens tie with the least of
    them: shapes do not depend on the data, nothing waits for the device, and a CUDA graph can capture it.

    Args:
        logits: z [N, V] float32 or float64.
        exponentials: q [N, V] > 0, of the same dtype: one draw of a standard exponential variable for
            every token.
        temperature: T; ≤ 0 counts as 1.
        top_k: tokens kept; 0 keeps all.
        top_p: smallest probability mass kept, in (0, 1]; the token that crosses it stays.
    Returns:
        [N] int64. Of a row that holds NaN or +inf, or nothing but −inf, some token.
    Raises:
        InputError: a shape, dtype or device does not fit, or a setting is out of its range.

    Source: the exponential race of ``torch.multinomial``; nucleus sampling from Holtzman et al., ICLR 2020.

    Example:
        >>> logits = torch.tensor([[0.0, 5.0, 1.0]])
        >>> draw_tokens(logits, torch.empty_like(logits).exponential_(), top_k=1)
        tensor([1])
    """
    scores = logits / temperature if temperature > 0 else logits
    vocabulary = scores.shape[1]
    k = top_k if 0 < top_k < vocabulary else vocabulary
    ascending = scores.topk(k, dim=1).values.flip(1) if k < vocabulary else scores.sort(dim=1).values
    least, top = ascending[:, :1], ascending[:, -1:]
    equal_least = scores == least
    if top_p < 1:
        first, dropped = _first_kept(ascending, equal_least, 1 - top_p)
    else:
        first, dropped = least, torch.zeros_like(least, dtype=torch.int64)
    tied = scores == first
    kept = (scores > first) | (tied & (tied.cumsum(dim=1) > dropped))
    shares = torch.where(kept, (scores - top).exp(), 0.0)
    return (shares / shares.sum(dim=1, keepdim=True) / exponentials).argmax(dim=1)


def _first_kept(ascending: Tensor, equal_least: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The first score that top-p keeps.

    Args:
        ascending: the k largest scores of each row [N, k].
        equal_least: [N, V], which tokens have the least of these; those that are not among the k
            precede them.
        limit: mass that may be dropped.
    Returns:
        The least score kept [N, 1], and how many tokens of that score are dropped [N, 1] int64.
    """
    k = ascending.shape[1]
    outside = equal_least.sum(dim=1, keepdim=True) - (ascending == ascending[:, :1]).sum(
        dim=1, keepdim=True
    )
    shares = (ascending - ascending[:, -1:]).exp()
    shares = shares / (shares.sum(dim=1, keepdim=True) + outside * shares[:, :1])
    # Masses are added up in double precision and compared in the scores' own.
    share = shares[:, :1].double()
    dtype, bound = ascending.dtype, torch.tensor(limit, dtype=ascending.dtype).item()
    fitting = torch.where(share > 0, bound / share, torch.inf).clamp(max=2.0**24).floor()
    fitting = fitting + (((fitting + 1) * share).to(dtype) <= bound)
    dropped_outside = torch.minimum(fitting.long(), outside)
    mass = (outside * share + shares.double().cumsum(dim=1)).to(dtype)
    dropped = (mass <= bound).sum(dim=1, keepdim=True).clamp(max=k - 1)
    dropped = torch.where(dropped_outside < outside, 0, dropped)
    first = ascending.gather(1, dropped)
    place = torch.arange(k, device=ascending.device)
    before = ((ascending == first) & (place < dropped)).sum(dim=1, keepdim=True)
    return first, before + torch.where(first == ascending[:, :1], dropped_outside, 0)


@draw_tokens.check
def check_draw_tokens(
    logits: Tensor, exponentials: Tensor, *, temperature: float, top_k: int, top_p: float
) -> None:
    expect_vocabulary("draw_tokens", logits.shape[1])
    expect(not math.isnan(temperature), "draw_tokens: temperature is not a number")
    expect(top_k >= 0, f"draw_tokens: top_k must not be negative, got {top_k}")
    expect(0 < top_p <= 1, f"draw_tokens: top_p must be in (0, 1], got {top_p}")


@draw_tokens.fake
def fake_draw_tokens(logits: Tensor, exponentials: Tensor, **_: float) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)
