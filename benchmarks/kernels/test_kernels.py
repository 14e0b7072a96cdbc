"""The kernel benchmark under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

The cases of ``nabla-fast bench kernels``, each a group of three: ours, eager and naive PyTorch. A case
whose check fails has no times. ``extra_info`` has the limit, its kind and the share reached. Choose cases
with ``-k``: ``-k "dto_descent and ours"``. ``NABLA_FAST_BACKEND`` chooses the backend (``cpu,torch``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from nabla_fast.bench.kernel_cases import Case, Versions, cases
from nabla_fast.bench.kernels import check, limit
from nabla_fast.bench.machine import Machine, measure_machine
from nabla_fast.bench.measure import cache_flush
from nabla_fast.ops import use_backend

DEVICE = torch.device("cpu")
SECONDS = 2.0  # of each version
FEWEST_ROUNDS, MOST_ROUNDS = 3, 200


@pytest.fixture(scope="session")
def limits() -> Machine:
    return measure_machine(DEVICE)


@pytest.fixture(scope="session", autouse=True)
def _backend() -> Iterator[None]:
    if "NABLA_FAST_BACKEND" in os.environ:
        yield
    else:
        with use_backend("cpu", "torch"):
            yield


# The scope is the module's, so that a case's three versions follow each other and share one set of
# inputs, which is gone before the next case's is made.
@pytest.fixture(
    scope="module", params=cases(DEVICE), ids=lambda case: f"{case.op} {case.shape} {case.dtype}"
)
def checked(request: pytest.FixtureRequest) -> tuple[Case, Versions]:
    case: Case = request.param
    torch.manual_seed(0)
    versions = case.prepare()
    result = check(versions)
    if result["check"] != "passed":
        pytest.fail(f"{case.op}: error {result['max_error']:.1e}, naive {result['naive_error']:.1e}")
    return case, versions


@pytest.mark.parametrize("version", ["ours", "eager", "naive"])
def test_kernel(checked: tuple[Case, Versions], version: str, limits: Machine, benchmark) -> None:
    case, versions = checked
    function, flush = getattr(versions, version), cache_flush(DEVICE)
    benchmark.group = f"{case.op} {case.shape} {case.dtype}"

    def setup() -> None:
        versions.reset()
        flush()

    setup()
    function()  # warm: memory, threads, code
    setup()
    start = time.perf_counter()
    function()
    rounds = round(SECONDS / (time.perf_counter() - start))
    rounds = min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)
    benchmark.pedantic(function, setup=setup, rounds=rounds)
    benchmark.extra_info.update(limit(case, limits))
    if benchmark.enabled:
        median_ms = 1e3 * benchmark.stats.stats.median
        benchmark.extra_info["share_of_limit"] = benchmark.extra_info["limit_ms"] / median_ms
