"""The Triton linear_embedding_mix and its backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nabla_fast.ops import backend_status, linear_embedding_mix, use_backend
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward

from ..contract import BackendContract
from ..harness import DEVICES, check, run
from ..inputs import BF16, F16, F32, Case, Draw
from ..shared import scratch
from ..shared.mixes import backward_arguments
from ..shared.mixes_triton import (
    VOCABULARY,
    check_chunks,
    check_parts,
    chunk_cases,
    part_cases,
    short_chunks,
)
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


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, -3.4e38])
@pytest.mark.parametrize("peak", [900.0, 60.0], ids=["at once", "bit by bit"])
def test_a_gradient_that_is_infinite_where_p_becomes_0(
    value: float, peak: float, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    """A token of a first chunk counts there, and no longer when larger logits are known."""
    short_chunks(monkeypatch)
    hidden, head = torch.tensor([[1.0, 0.0]]), draw.normal(VOCABULARY, 2)
    head[:, 0] = peak * (torch.arange(VOCABULARY) // 4096)
    direct = torch.zeros(1, VOCABULARY)
    direct[0, 7] = value
    given = [draw.normal(1, 4)], hidden, head, [draw.normal(VOCABULARY, 4)]
    options = {"tau": 1.0, "noise": None, "direct": direct}
    with use_backend("torch"):
        wanted = linear_embedding_mix_backward(*given, **options)
    with use_backend("triton"):
        grad = linear_embedding_mix_backward(*given, **options)
    # The first column of the head hardly varies where p does not vanish: its gradient cancels.
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[:, 1], wanted[:, 1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hidden", [F16, F32], ids=["fp16", "fp32"])
def test_terms_of_a_bfloat16_head(hidden: torch.dtype, draw: Draw):
    case = Case(
        "terms",
        lambda draw: backward_arguments(
            draw, 8, vocabulary=515, hidden=32, dtype=hidden, tables=((24, BF16),), direct=True
        ),
    )
    backward = linear_embedding_mix_backward
    check(backward, case, draw, DEVICES[-1], lambda arguments: run(backward, "triton", arguments))
