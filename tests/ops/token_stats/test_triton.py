"""The Triton token_stats."""

from __future__ import annotations

from ..contract import BackendContract
from .cases import TOKEN_STATS
from .properties import StatisticsOnBackend


class TestContract(BackendContract):
    tested, backend = TOKEN_STATS, "triton"


class TestStatistics(StatisticsOnBackend):
    backend = "triton"
