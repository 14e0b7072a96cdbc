"""The C++ token_stats, of logits and of hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nabla_fast import _native
from nabla_fast.ops import token_stats

from ..contract import BackendContract, EveryInstructionSet
from ..inputs import F32, Draw
from ..shared.passes import Call, VocabularyPass
from .cases import TOKEN_STATS, stats_arguments
from .properties import StatisticsOnBackend

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = TOKEN_STATS, "cpu"


class TestInstructionSets(EveryInstructionSet):
    tested = TOKEN_STATS


class TestStatistics(StatisticsOnBackend):
    backend = "cpu"


class StatsCall(Call):
    """A raw call of linear_token_stats."""

    results_of_a_row = 3
    small = "rows"

    def workspace(self) -> int:
        given = self.hidden, self.rows, self.head, self.vocabulary
        return self.native.linear_token_stats_workspace(*given)

    def run(self, result: int, tail: tuple[int, ...], tau: float) -> int:
        more = (tensor.data_ptr() for tensor in (*self.results[1:], self.argmax))
        given = self.hidden, self.rows, self.head, self.vocabulary
        return self.native.linear_token_stats(*given, tau, result, *more, *tail)


class TestPasses(VocabularyPass):
    op, call, native, small = token_stats, StatsCall, staticmethod(_native.linear_token_stats), "rows"

    @staticmethod
    def made(
        draw: Draw,
        rows: int,
        vocabulary: int,
        hidden: int = 20,
        widths: tuple[int, ...] = (),
        small: torch.dtype = F32,
        dtype: torch.dtype = F32,
        **options: Any,
    ) -> dict[str, Any]:
        return stats_arguments(draw, rows, vocabulary, dtype=small, hidden=hidden, head=dtype, **options)

    def test_what_the_interface_refuses_of_tau(self, draw: Draw):
        for tau in (0.0, float("nan")):
            assert "tau" in self.refused(draw, tau=tau)
