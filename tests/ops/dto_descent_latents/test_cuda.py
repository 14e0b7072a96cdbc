"""dto_descent_latents by the CUDA kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops import AdamState, cosine_schedule, dto_descent_latents, use_backend

from ..contract import BackendContract
from ..shared.descents import DescentOverlaps
from ..shared.golden_descents import check_golden_descent
from .cases import DTO_DESCENT_LATENTS

pytestmark = pytest.mark.usefixtures("cuda_kernels")


class TestContract(BackendContract):
    # How many tokens share a tile follows the number of rows, and sums follow the tiles.
    tested, backend = replace(DTO_DESCENT_LATENTS, rows_alone=False), "cuda"


class TestOverlaps(DescentOverlaps):
    op, backend, hidden = dto_descent_latents, "cuda", 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the golden models are on the CPU")
@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow), 5])
def test_golden_descent(n: int, golden_models, golden_models_64, monkeypatch: pytest.MonkeyPatch):
    check_golden_descent(dto_descent_latents, "cuda", n, golden_models, golden_models_64, monkeypatch)


def test_wide_states_are_refused():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h, head = torch.zeros(1, 8193, device=device), torch.zeros(3, 8193, device=device)
    given = h, head, torch.zeros(1, 3, device=device), AdamState.zeros(h), cosine_schedule(1, 0.01)
    with (
        use_backend("cuda"),
        pytest.raises(BackendUnavailable, match=r"h has 8193 columns \(the CUDA kernel takes 8192\)"),
    ):
        dto_descent_latents(*given)
