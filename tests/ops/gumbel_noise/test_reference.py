"""Gumbel noise: the generator's words, what the noise depends on, and how it is distributed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_fast.ops import GumbelNoise, gumbel_noise
from nabla_fast.ops.gumbel_noise import philox_4x32_10

from .. import reference
from ..contract import BackendContract, LibraryContract
from ..inputs import Draw
from ..shared.arguments import ArgumentContract
from .cases import GUMBEL_NOISE, good

INT64 = st.integers(-(2**63), 2**63 - 1)


class TestContract(BackendContract):
    tested, backend = GUMBEL_NOISE, "torch"


class TestLibrary(LibraryContract):
    tested = GUMBEL_NOISE


class TestArguments(ArgumentContract):
    op, good = gumbel_noise, staticmethod(good)


def keyed(*keys: tuple[int, int]) -> GumbelNoise:
    """The noise of (seed, position) pairs."""
    seeds, positions = zip(*keys, strict=True)
    return GumbelNoise(torch.tensor(seeds), torch.tensor(positions))


# Known-answer vectors of the Random123 distribution.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, words: str):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    ours = philox_4x32_10(*(tuple(torch.tensor(word) for word in numbers) for numbers in (counter, key)))
    assert [int(word) for word in ours] == words
    assert reference.philox_4x32_10(counter, key) == words


def noise_by_definition(seed: int, position: int, token: int) -> float:
    counter = [token // 4, position % 2**32, (position >> 32) % 2**32, 0]
    word = reference.philox_4x32_10(counter, [seed % 2**32, (seed >> 32) % 2**32])[token % 4]
    return -math.log(-math.log((word // 2**9 + 0.5) / 2**23))


@given(seed=INT64, position=INT64, vocabulary=st.integers(1, 13))
@settings(deadline=None, max_examples=50)
def test_against_the_definition(seed: int, position: int, vocabulary: int):
    (ours,) = gumbel_noise(keyed((seed, position)), vocabulary).tolist()
    assert ours == pytest.approx(
        [noise_by_definition(seed, position, v) for v in range(vocabulary)], rel=1e-12
    )


@given(keys=st.lists(st.tuples(INT64, INT64), min_size=1, max_size=5), vocabulary=st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_depends_on_nothing_but_seed_position_and_token(keys: list[tuple[int, int]], vocabulary: int):
    together = gumbel_noise(keyed(*keys), vocabulary)
    assert together.shape == (len(keys), vocabulary)
    for row, key in enumerate(keys):
        # Alone, and in a larger vocabulary.
        assert torch.equal(gumbel_noise(keyed(key), vocabulary + 9)[0, :vocabulary], together[row])


@given(seed=INT64, position=INT64, bit=st.integers(0, 63))
@settings(deadline=None, max_examples=50)
def test_every_bit_of_the_key_counts(seed: int, position: int, bit: int):
    flip = (1 << bit) - (1 << 64 if bit == 63 else 0)
    noise = gumbel_noise(keyed((seed, position), (seed ^ flip, position), (seed, position ^ flip)), 257)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (noise[a] == noise[b]).sum() <= 2


def test_float32_holds_the_uniform_and_every_value_is_finite():
    words = torch.tensor([0, 1, 2**23 - 1])
    uniform = (words.double() + 0.5) / 2**23
    assert torch.equal(uniform.float().double(), uniform)
    noise = gumbel_noise(keyed((0, 0)), 2**20)
    assert noise.isfinite().all()


def test_distribution(draw: Draw):
    # Bounds six standard deviations wide; a Gumbel variable has variance π²/6 and kurtosis 5.4.
    rows, vocabulary = 8, 2**17
    noise = gumbel_noise(draw.noise(rows), vocabulary).flatten()
    n, variance = noise.numel(), math.pi**2 / 6
    assert abs(float(noise.mean()) - 0.5772156649) < 6 * math.sqrt(variance / n)
    assert abs(float(noise.var()) - variance) < 6 * variance * math.sqrt(4.4 / n)
    # Kolmogorov-Smirnov: exceeded with probability 2·exp(−2·3.5²) < 5e-11.
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert float((uniform - grid).abs().max()) < 3.5 / math.sqrt(n)


@pytest.mark.parametrize("neighbour", ["token", "position", "seed"])
def test_neighbours_are_independent(neighbour: str, draw: Draw):
    rows, vocabulary = 64, 4096
    start, other = int(draw.integers(0, 2**62, 1)), int(draw.integers(0, 2**62, 1))
    count = [(start + i, other) if neighbour == "seed" else (other, start + i) for i in range(rows)]
    noise = gumbel_noise(keyed(*count), vocabulary)
    pairs = (noise[:, :-1], noise[:, 1:]) if neighbour == "token" else (noise[:-1], noise[1:])
    correlation = torch.corrcoef(torch.stack([half.flatten() for half in pairs]))[0, 1]
    assert abs(float(correlation)) < 6 / math.sqrt(pairs[0].numel())


def test_seeds_and_positions_past_32_bits():
    keys = [
        (seed, position) for seed in (7, 7 + 2**32, 7 + 2**62) for position in (3, 3 + 2**32, 3 + 2**62)
    ]
    noise = gumbel_noise(keyed(*keys), 5)
    assert len({tuple(row) for row in noise.tolist()}) == len(keys)
    for row, (seed, position) in zip(noise.tolist(), keys, strict=True):
        assert row == pytest.approx([noise_by_definition(seed, position, v) for v in range(5)], rel=1e-12)
