"""The meaning of token_stats' numbers, whatever the backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops import TokenStats, token_stats, use_backend

from ..contract import OnBackend
from ..harness import home
from ..inputs import Draw


class StatisticsOnBackend(OnBackend):
    """Statistics of logits whose values are known."""

    def stats(self, logits: Tensor, tau: float = 1.0) -> TokenStats:
        """The statistics, on the CPU; skips where the backend does not take the input."""
        try:
            with use_backend(self.backend):
                found = token_stats(logits.to(home(self.backend)), tau=tau)
            return TokenStats(*(tensor.cpu() for tensor in found))
        except BackendUnavailable as error:
            pytest.skip(str(error))

    @pytest.mark.parametrize("vocabulary", [1, 2, 257, 4099])
    def test_equal_logits(self, vocabulary: int):
        stats = self.stats(torch.full((2, vocabulary), 3.0), tau=0.5)
        assert stats.argmax.tolist() == [0, 0]
        assert stats.entropy.tolist() == pytest.approx([math.log(vocabulary)] * 2, rel=1e-6, abs=1e-6)
        assert stats.confidence.tolist() == pytest.approx([1 / vocabulary] * 2, rel=1e-5)
        assert stats.logsumexp.tolist() == pytest.approx([6 + math.log(vocabulary)] * 2, rel=1e-6)

    def test_the_first_of_equal_logits_is_the_argmax(self, draw: Draw):
        logits = draw.integers(-3, 4, 6, 4099).float()
        first = [row.index(max(row)) for row in logits.tolist()]
        assert self.stats(logits).argmax.tolist() == first

    def test_the_only_token_left_is_certain(self):
        logits = torch.full((2, 33), -torch.inf)
        logits[0, 7], logits[1, 32] = 2.5, -1e30
        stats = self.stats(logits)
        assert stats.argmax.tolist() == [7, 32]
        assert stats.confidence.tolist() == [1, 1]
        assert stats.entropy.tolist() == [0, 0]
        assert stats.logsumexp.tolist() == [2.5, torch.tensor(-1e30).item()]

    def test_masked_tokens_do_not_count(self, draw: Draw):
        logits = draw.logits(1, 1021, masked=0.7)
        kept = logits[0] > -torch.inf
        with_masks, without = self.stats(logits), self.stats(logits[:, kept])
        for name in ("logsumexp", "confidence", "entropy"):
            torch.testing.assert_close(getattr(with_masks, name), getattr(without, name))
        assert int(with_masks.argmax) == int(kept.nonzero()[int(without.argmax)])

    def test_a_shift_moves_the_logsumexp_alone(self, draw: Draw):
        # Powers of two, so that the shifted logits are exact.
        logits = draw.integers(-64, 64, 4, 517).float() / 8
        stats, shifted = self.stats(logits), self.stats(logits + 1024)
        torch.testing.assert_close(shifted.logsumexp, stats.logsumexp + 1024)
        torch.testing.assert_close(shifted.entropy, stats.entropy, rtol=1e-4, atol=1e-4)
        assert torch.equal(shifted.argmax, stats.argmax)

    def test_no_rows(self):
        assert all(tensor.shape == (0,) for tensor in self.stats(torch.empty(0, 5)))
