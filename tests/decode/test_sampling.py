"""Drawing tokens as transformers' ``generate`` does."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nabla_fast import SamplingConfig, _native
from nabla_fast.decode import sampling as sampling_module
from nabla_fast.decode.draws import TorchDraws
from nabla_fast.decode.sampling import Generator, TokenRows, filtered_probabilities, seeded

SETTINGS = [
    SamplingConfig(temperature, top_k, top_p)
    for temperature in (0.5, 1.0, 1.7)
    for top_k in (0, 1, 7, 100)
    for top_p in (0.1, 0.8, 1.0)
]


def theirs(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(dim=-1)[0]


def draw(logits: torch.Tensor, sampling: SamplingConfig, generator: Generator) -> int:
    """The token of an optimized position."""
    return TorchDraws().redraw(logits[None], sampling, [generator], [0])(0)


def next_token(logits: torch.Tensor, sampling: SamplingConfig, generator: Generator) -> int:
    """A rollout's next token."""
    return TorchDraws().rollout(logits[None], sampling, [generator], [0])(0)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters_and_draws(dtype, sampling):
    for scale in (0.3, 3.0, 30.0):
        logits = scale * torch.randn(50, dtype=dtype)
        expected = theirs(logits, sampling)
        ours = filtered_probabilities(logits, sampling)
        torch.testing.assert_close(ours, expected)
        assert torch.equal(ours == 0, expected == 0)
        for seed in range(5):
            torch.manual_seed(seed)
            token = int(torch.multinomial(expected, 1))
            assert draw(logits, sampling, seeded(seed)) == token
            assert next_token(logits, sampling, seeded(seed)) == token


def test_all_that_tie_with_the_last_kept_token_are_kept():
    logits = torch.tensor([2.0, 1.0, 3.0, 1.0, 0.0, 1.0])
    sampling = SamplingConfig(1.0, 3)
    assert filtered_probabilities(logits, sampling).nonzero().flatten().tolist() == [0, 1, 2, 3, 5]
    torch.testing.assert_close(filtered_probabilities(logits, sampling), theirs(logits, sampling))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_no_temperature_is_greedy_in_rollouts_and_one_in_resampling(temperature):
    logits = torch.randn(50)
    cold, plain = SamplingConfig(temperature, 7, 0.9), SamplingConfig(1.0, 7, 0.9)
    generator = seeded(0)
    before = generator._words.clone()
    assert next_token(logits, cold, generator) == int(logits.argmax())
    assert torch.equal(generator._words, before)
    assert torch.equal(filtered_probabilities(logits, cold), filtered_probabilities(logits, plain))
    assert [draw(logits, cold, seeded(s)) for s in range(9)] == [
        draw(logits, plain, seeded(s)) for s in range(9)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("native", [True, False])
def test_draws_are_those_of_multinomial_and_leave_the_generator_where_it_does(dtype, native, monkeypatch):
    if native and not sampling_module._races():
        pytest.skip("no C++ extension")
    monkeypatch.setattr(sampling_module, "_races", lambda: native)
    for seed in range(40):
        chance = torch.Generator().manual_seed(seed)
        ours, theirs = seeded(seed), torch.Generator().manual_seed(seed)
        for _ in range(8):
            vocabulary = int(torch.randint(1, 3000, (1,), generator=chance))
            count = min(vocabulary, int(torch.randint(1, 40, (1,), generator=chance)))
            tokens = torch.randperm(vocabulary, generator=chance)[:count].sort().values
            probabilities = torch.rand(count, dtype=dtype, generator=chance).softmax(dim=0)
            dense = torch.zeros(vocabulary, dtype=dtype).scatter_(0, tokens, probabilities)
            expected = int(torch.multinomial(dense, 1, generator=theirs))
            assert ours.draw(tokens, probabilities, vocabulary) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rows_draws_do_not_depend_on_other_rows(dtype):
    for sampling in SETTINGS:
        logits = torch.randn(9, 60, dtype=dtype)
        logits[4] = logits[4].round()  # ties
        logits[5, 3:] = -torch.inf
        together = TokenRows(logits, sampling)
        for row in range(len(logits)):
            alone = TokenRows(logits[row : row + 1], sampling)
            assert torch.equal(together.probabilities(row), alone.probabilities(0))
            if row != 4:  # which of equal tokens top-p drops, transformers leaves to an unstable sort
                torch.testing.assert_close(alone.probabilities(0), theirs(logits[row], sampling))
            assert together.draw(row, seeded(row)) == alone.draw(0, seeded(row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [2, 63, 64, 65, 1000, 4097])
def test_the_extensions_filter_is_torchs(dtype, vocabulary):
    if not _native.available():
        pytest.skip("no C++ extension")
    for sampling in SETTINGS:
        if not 0 < sampling.top_k < vocabulary:
            continue
        logits = 3 * torch.randn(6, vocabulary, dtype=dtype)
        logits[1] = logits[1].round()  # ties, more than there is room for in a long row
        logits[2, vocabulary // 2 :] = -torch.inf
        logits[3] = 0
        logits[4, :2] = torch.tensor([400.0, -400.0])
        for row, (tokens, probabilities) in zip(
            logits, sampling_module._filtered_rows(logits, sampling), strict=True
        ):
            found, shares = sampling_module._filtered_row(row, sampling)
            assert torch.equal(found, tokens)
            torch.testing.assert_close(shares, probabilities)
            assert torch.equal(shares == 0, probabilities == 0)
