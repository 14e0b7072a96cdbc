"""The kernel benchmark: no time without a passed check."""

from __future__ import annotations

import torch

from nabla_fast.bench import kernels
from nabla_fast.bench.kernel_cases import dto_descent, embedding_mix, token_stats
from nabla_fast.bench.measure import Timing, interleaved

CPU = torch.device("cpu")


def small_cases(_: torch.device):
    yield lambda: token_stats(3, 257, torch.float32, CPU)
    yield lambda: embedding_mix(3, 257, 8, 6, torch.bfloat16, CPU, hard=True, backward=True)
    yield lambda: embedding_mix(3, 257, 8, 6, torch.float32, CPU, hard=False, backward=False)
    yield lambda: dto_descent(2, 257, 5, CPU)


def run_small(monkeypatch) -> list[dict]:
    monkeypatch.setattr(kernels, "cases", small_cases)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(kernels, "matmul_rate", lambda dtype, device: 1e11)
    return kernels.run("torch", CPU, compiled=False, seconds=0.01, on_row=lambda row: None)


def test_rows_have_times_and_limits(monkeypatch):
    rows = run_small(monkeypatch)
    assert [row["check"] for row in rows] == ["passed"] * 4
    for row in rows:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["naive_ms"] > 0
        assert row["limit_ms"] > 0
        assert row["limit"] in ("memory", "matmul")
    assert rows[0]["limit_ms"] == 1e3 * 3 * 257 * 4 / 1e10


def test_a_wrong_result_gets_no_time(monkeypatch):
    right = token_stats(3, 257, torch.float32, CPU)
    object.__setattr__(right, "ours", lambda: [value * 1.001 for value in right.naive()])
    monkeypatch.setattr("test_bench.small_cases", lambda _: [lambda: right])
    (row,) = run_small(monkeypatch)
    assert row["check"] == "failed"
    assert "median_ms" not in row


def test_every_function_runs_equally_often():
    counts = {"a": 0, "b": 0}

    def count(name: str):
        counts[name] += 1

    times = interleaved({name: lambda name=name: count(name) for name in counts}, CPU, seconds=0.01)
    assert counts["a"] == counts["b"] >= 5
    assert all(isinstance(timing, Timing) for timing in times.values())
