"""The Triton linear_embedding_mix and its backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from nabla_fast.ops import backend_status, linear_embedding_mix
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward

from ..contract import BackendContract
from ..harness import DEVICES
from ..inputs import Case, Draw
from ..shared import scratch
from ..shared.mixes_triton import check_chunks, check_parts, chunk_cases, part_cases
from .cases import LINEAR_EMBEDDING_MIX, LINEAR_EMBEDDING_MIX_BACKWARD

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels import linear_embedding_mix as kernels


class TestContract(BackendContract):
    tested, backend = LINEAR_EMBEDDING_MIX, "triton"


class TestBackwardContract(BackendContract):
    tested, backend = LINEAR_EMBEDDING_MIX_BACKWARD, "triton"


def scratch_calls(draw: Draw, rows: int, vocabulary: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Calls of the launchers by name; each returns its results."""
    problem = scratch.Problem(draw, rows, vocabulary)
    given = problem.hidden, problem.head, problem.tables

    def mixed(key: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        mixes, tokens = kernels.linear_embedding_mix(*given, tau=0.7, hard=False, noise=key)
        return [*mixes, tokens]

    def backward() -> list[Tensor]:
        options = {"tau": 0.7, "direct": None, "noise": problem.noise}
        return [kernels.linear_embedding_mix_backward(problem.cotangents, *given, **options)]

    return {
        "linear": lambda: mixed(None),
        "linear, noise": lambda: mixed(problem.noise),
        "linear backward": backward,
    }


@scratch.SIZES
@pytest.mark.parametrize("name", scratch_calls(Draw(0), 1, 2))
def test_scratch_is_bounded(
    name: str, rows: int, vocabulary: int, limit: int, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    scratch.is_bounded(scratch_calls(draw, rows, vocabulary)[name], rows, limit, monkeypatch)


@pytest.mark.parametrize("case", part_cases(backward=False, hidden=12), ids=lambda case: case.name)
def test_parts_of_rows(case: Case, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    check_parts(linear_embedding_mix, case, draw, DEVICES[-1], monkeypatch)


@pytest.mark.parametrize("case", part_cases(backward=True, hidden=12), ids=lambda case: case.name)
def test_parts_of_rows_backward(case: Case, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    check_parts(linear_embedding_mix_backward, case, draw, DEVICES[-1], monkeypatch)


@pytest.mark.parametrize("case", chunk_cases(backward=False, hidden=12), ids=lambda case: case.name)
def test_chunks(case: Case, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    check_chunks(linear_embedding_mix, case, draw, DEVICES[-1], monkeypatch)


@pytest.mark.parametrize("case", chunk_cases(backward=True, hidden=12), ids=lambda case: case.name)
def test_chunks_backward(case: Case, draw: Draw, monkeypatch: pytest.MonkeyPatch):
    check_chunks(linear_embedding_mix_backward, case, draw, DEVICES[-1], monkeypatch)
