"""draw_tokens: its definition, what a draw depends on, and how draws are distributed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast import SamplingConfig
from nabla_fast.decode.sampling import TokenRows
from nabla_fast.errors import InputError
from nabla_fast.ops import DrawKey, draw_tokens
from nabla_fast.ops.draw_tokens import _kept

from .. import reference
from ..contract import BackendContract, LibraryContract
from ..inputs import F32, F64, Draw
from .cases import DRAW_TOKENS, draw_key, kinds_of_rows


class TestContract(BackendContract):
    tested, backend = DRAW_TOKENS, "torch"


class TestLibrary(LibraryContract):
    tested = DRAW_TOKENS


SETTINGS = [
    SamplingConfig(temperature, top_k, top_p)
    for temperature in (-1.0, 0.5, 1.7)
    for top_k in (0, 1, 7, 100)
    for top_p in (0.1, 0.8, 0.999, 1.0)
]


def by_definition(logits: list[float], key: list[int], redraw: bool, sampling: SamplingConfig) -> int:
    """The token of one row, by sorting and by the generator's definition."""
    scores = [z / (sampling.temperature if sampling.temperature > 0 else 1.0) for z in logits]
    order = sorted(range(len(scores)), key=lambda v: (scores[v], v))
    if 0 < sampling.top_k < len(scores):
        least = scores[order[-sampling.top_k]]
        order = [v for v in order if scores[v] >= least]
    if sampling.top_p < 1:
        shares = [math.exp(scores[v] - scores[order[-1]]) for v in order]
        total, mass, dropped = sum(shares), 0.0, 0
        limit = float(torch.tensor(1 - sampling.top_p, dtype=F32))
        for share in shares[:-1]:
            mass += share
            if float(torch.tensor(mass / total, dtype=F32)) > limit:
                break
            dropped += 1
        order = order[dropped:]
    return max(order, key=lambda v: (scores[v] + noise_by_definition(key, redraw, v), -v))


def noise_by_definition(key: list[int], redraw: bool, token: int) -> float:
    seed, start, visit, position = key
    counter = [token // 4, position % 2**32, start % 2**32, (4 * visit + (2 if redraw else 1)) % 2**32]
    word = reference.philox_4x32_10(counter, [seed % 2**32, (seed >> 32) % 2**32])[token % 4]
    return -math.log(-math.log((word + 0.5) / 2**32))


@pytest.mark.parametrize("vocabulary", [1, 2, 41])
def test_against_the_definition(vocabulary: int, draw: Draw):
    for number, sampling in enumerate(SETTINGS):
        logits, key = kinds_of_rows(draw, vocabulary, F64), draw_key(draw, 7)
        redraw = number % 2 == 1
        tokens = draw_tokens(logits, key, redraw=redraw, **settings(sampling))
        rows = zip(logits.tolist(), torch.stack(key).T.tolist(), strict=True)
        assert tokens.tolist() == [by_definition(z, k, redraw, sampling) for z, k in rows], sampling


def settings(sampling: SamplingConfig) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


@pytest.mark.parametrize("vocabulary", [2, 41, 997])
def test_tokens_kept_are_those_of_the_samplers(vocabulary: int, draw: Draw):
    for rounded in SETTINGS:
        # No number of equal tokens has just the mass that may be dropped, which the samplers do not round.
        top_p = rounded.top_p - 0.0123 if rounded.top_p < 1 else 1.0
        sampling = replace(rounded, top_p=top_p)
        logits = kinds_of_rows(draw, vocabulary, F64)
        rows = TokenRows(logits, sampling)
        expected = torch.stack([rows.probabilities(row) for row in range(len(logits))])
        scores = logits / (sampling.temperature if sampling.temperature > 0 else 1.0)
        kept = _kept(scores, sampling.top_k, sampling.top_p)
        # The samplers know tokens by a probability above 0.
        possible = (scores - scores.amax(dim=1, keepdim=True)).exp() > 0
        assert torch.equal(kept & possible, expected > 0), sampling


def draws(logits: Tensor, count: int, redraw: bool = False, **fields: Any) -> Tensor:
    """``count`` draws from one row of logits at positions 0, 1, ..., or as ``fields`` say."""
    zero = torch.zeros(count, dtype=torch.int64)
    given = {"seed": zero + 42, "start": zero, "visit": zero, "position": torch.arange(count)} | fields
    key = DrawKey(*(zero + torch.as_tensor(given[name]) for name in DrawKey._fields))
    return draw_tokens(logits.expand(count, -1), key, redraw=redraw)


COUNT = 20_000
ODDS = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])


def p_value(counts: Tensor, expected: Tensor, freedom: int) -> float:
    """Of Pearson's test: how likely counts are that differ more from what is expected."""
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    return torch.special.gammaincc(torch.tensor(freedom / 2, dtype=F64), statistic / 2).item()


@pytest.mark.parametrize("walked", ["seed", "start", "visit", "position"])
@pytest.mark.parametrize("redraw", [False, True])
def test_frequencies_are_the_probabilities(walked: str, redraw: bool):
    tokens = draws(ODDS.log(), COUNT, redraw, **{"position": 7, walked: torch.arange(COUNT)})
    counts = tokens.bincount(minlength=len(ODDS))
    expected = COUNT * ODDS.double() / ODDS.double().sum()
    assert p_value(counts, expected, freedom=len(ODDS) - 1) > 1e-4


@pytest.mark.parametrize(
    "other",
    [
        {"start": 1},  # a rollout that starts at the next position, at the same positions
        {"visit": 1},
        {"seed": 43},
        {"redraw": True},
        {"position": torch.arange(COUNT) + 1},
        {"start": 1, "redraw": True},
    ],
    ids=str,
)
def test_two_draws_whose_keys_differ_are_independent(other: dict[str, Any]):
    first, second = draws(ODDS.log(), COUNT), draws(ODDS.log(), COUNT, **other)
    table = torch.zeros(len(ODDS), len(ODDS), dtype=torch.int64)
    table.index_put_((first, second), torch.ones_like(first), accumulate=True)
    # Rare pairs are counted together, so that the statistic has its distribution.
    table = torch.cat([table[:4], table[4:].sum(dim=0, keepdim=True)])
    table = torch.cat([table[:, :4], table[:, 4:].sum(dim=1, keepdim=True)], dim=1)
    expected = table.sum(dim=1, keepdim=True) * table.sum(dim=0) / COUNT
    assert p_value(table, expected, freedom=16) > 1e-4


def test_no_draw_repeats_the_noise_of_a_relaxation():
    from nabla_fast.ops.draw_tokens import draw_noise
    from nabla_fast.ops.gumbel_noise import philox_words

    zero = torch.zeros(1, dtype=torch.int64)
    relaxed = set(philox_words(zero + 42, zero + 7, 4000)[0].tolist())
    for redraw in (False, True):
        noise = draw_noise(DrawKey(zero + 42, zero, zero, zero + 7), 4000, redraw)
        words = ((-(-noise).exp()).exp() * 2**32 - 0.5).round().long()[0].tolist()
        assert len(relaxed.intersection(words)) < 3  # of 4000, 0.004 are expected by chance


def test_a_row_does_not_depend_on_the_others(draw: Draw):
    logits, key = kinds_of_rows(draw, 300, F32), draw_key(draw, 7)
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    together = draw_tokens(logits, key, **options)
    for row in range(7):
        alone = draw_tokens(
            logits[row : row + 1], DrawKey(*(part[row : row + 1] for part in key)), **options
        )
        assert alone.item() == together[row]


def test_masked_tokens_are_not_drawn(draw: Draw):
    logits = torch.full((50, 9), -torch.inf)
    logits[:, 3] = -5.0
    logits[:, 6] = 2.0
    for options in ({}, {"top_k": 5}, {"top_p": 0.9999}):
        assert set(draw_tokens(logits, draw_key(draw, 50), **options).tolist()) <= {3, 6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"temperature": math.nan}, "temperature is not a number"),
    ],
)
def test_settings_out_of_range(options: dict, message: str, draw: Draw):
    with pytest.raises(InputError, match=message):
        draw_tokens(torch.zeros(1, 3), draw_key(draw, 1), **options)


def test_keys_of_other_rows_and_types(draw: Draw):
    key = draw_key(draw, 2)
    with pytest.raises(InputError, match=r"key\.seed must be int64 \[1\]"):
        draw_tokens(torch.zeros(1, 3), key)
    with pytest.raises(InputError, match=r"key\.visit must be int64"):
        draw_tokens(torch.zeros(2, 3), key._replace(visit=key.visit.int()))
