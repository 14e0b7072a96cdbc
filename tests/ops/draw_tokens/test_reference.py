"""Draws on the device are those of the samplers on the CPU, given the same exponentials."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nabla_fast import SamplingConfig
from nabla_fast.decode.sampling import TokenRows, seeded
from nabla_fast.errors import InputError
from nabla_fast.ops import draw_tokens

from ..contract import BackendContract, LibraryContract
from ..harness import DEVICES, device_parameter
from ..inputs import F32, F64, Draw
from .cases import DRAW_TOKENS


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


def exponentials(rows: int, vocabulary: int, dtype: torch.dtype, seed: int) -> Tensor:
    """The draws of ``torch.multinomial`` for each row, from a generator seeded with ``seed`` + row."""
    q = torch.empty(rows, vocabulary, dtype=dtype)
    for row in range(rows):
        q[row].exponential_(generator=torch.Generator().manual_seed(seed + row))
    return q


def kinds_of_rows(draw: Draw, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Peaked, flat, tied, masked, all equal."""
    logits = draw.normal(7, vocabulary, dtype=dtype, scale=3.0)
    logits[1] *= 10
    logits[2] *= 0.1
    logits[3] = logits[3].round()
    logits[4, vocabulary // 2 :] = -torch.inf
    logits[5] = 0.5
    logits[6] = (logits[6] / 3).round() * 3
    return logits


@pytest.mark.parametrize("device", [device_parameter(device) for device in DEVICES])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("vocabulary", [1, 2, 65, 997])
def test_the_tokens_of_the_samplers(device: str, dtype: torch.dtype, vocabulary: int, draw: Draw):
    drawn = set()
    for number, sampling in enumerate(SETTINGS):
        logits = kinds_of_rows(draw, vocabulary, dtype)
        rows = TokenRows(logits, sampling)
        expected = [rows.draw(row, seeded(99 * number + row)) for row in range(len(logits))]
        q = exponentials(len(logits), vocabulary, dtype, 99 * number)
        tokens = draw_tokens(
            logits.to(device),
            q.to(device),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        assert tokens.tolist() == expected, sampling
        drawn |= set(expected)
    assert len(drawn) > 1 or vocabulary == 1


@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_kept_token_and_no_other_is_drawn(dtype: torch.dtype, draw: Draw):
    # An exponential near 0 for one token makes it the draw, if it can be drawn at all.
    vocabulary = 41  # a prime: no number of equal tokens has just the mass that top-p may drop
    for sampling in SETTINGS:
        logits = kinds_of_rows(draw, vocabulary, dtype)
        logits[1] /= 10  # a kept token must have a probability to speak of
        rows = TokenRows(logits, sampling)
        kept = torch.stack([rows.probabilities(row) > 0 for row in range(len(logits))])
        for token in range(vocabulary):
            q = torch.ones_like(logits)
            q[:, token] = 1e-30
            tokens = draw_tokens(
                logits, q, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
            )
            assert torch.equal(tokens == token, kept[:, token]), sampling


def test_a_row_does_not_depend_on_the_others(draw: Draw):
    logits, q = kinds_of_rows(draw, 300, F32), exponentials(7, 300, F32, 5)
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    together = draw_tokens(logits, q, **options)
    for row in range(7):
        assert draw_tokens(logits[row : row + 1], q[row : row + 1], **options).item() == together[row]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"temperature": math.nan}, "temperature is not a number"),
    ],
)
def test_settings_out_of_range(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        draw_tokens(torch.zeros(1, 3), torch.ones(1, 3), **options)


def test_dtypes_must_agree():
    with pytest.raises(InputError, match=r"exponentials must be float32 \(as logits\)"):
        draw_tokens(torch.zeros(1, 3), torch.ones(1, 3, dtype=F64))
