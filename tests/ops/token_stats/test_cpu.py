"""The C++ token_stats, of logits and of hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nabla_fast import _native
from nabla_fast.ops import token_stats
from nabla_fast.ops.token_stats import token_stats_native

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

    name = "linear_token_stats"

    def fields(self) -> dict[str, Any]:
        return {
            "logsumexp": self.results[0],
            "confidence": self.results[1],
            "entropy": self.results[2],
            "argmax": self.argmax,
        }


def statistics(rows: torch.Tensor, head: torch.Tensor, tau: float) -> list[torch.Tensor]:
    values, status = token_stats_native(rows, head, tau)
    return [*values, status]


class TestPasses(VocabularyPass):
    op, call, native, small = token_stats, StatsCall, staticmethod(statistics), "rows"

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
