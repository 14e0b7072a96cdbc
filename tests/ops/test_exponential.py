"""exp(x/τ) of the Triton kernels against float64."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops import backend_status

from .inputs import Draw

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

import triton
import triton.language as tl

from nabla_fast.triton_kernels.common.exponential import exp_base, tempered_exp

BLOCK = 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMAL = torch.finfo(torch.float32).tiny


@triton.jit
def _exp_kernel(source, result, base, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(result + at, tempered_exp(tl.load(source + at), base))


def exps(differences: torch.Tensor, tau: float) -> torch.Tensor:
    """exp(differences / τ) by the kernels' function: [BLOCK] float32."""
    result = torch.full((BLOCK,), torch.nan, device=DEVICE)
    _exp_kernel[(1,)](differences.to(DEVICE), result, exp_base(tau), BLOCK=BLOCK, enable_fp_fusion=False)
    return result.cpu()


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.7, 2.5, 2.0**-64, 3 * 2.0**-40, 1e9, 2.0**64])
def test_relative_error(draw: Draw, tau: float):
    """2 ulp are what the hardware's own exp2 may err by, and half of one is the last product's rounding."""
    differences = (-draw.uniform(BLOCK) * 95 * tau).float()
    exact = torch.exp(differences.double() / tau)
    error = (exps(differences, tau).double() - exact).abs() / exact
    assert error[exact > 1.01 * NORMAL].max() <= (2.5 if DEVICE == "cuda" else 1.1) * 2**-23


@pytest.mark.parametrize("tau", [1.0, 0.7, 2.0**-64, 2.0**64])
def test_ends(tau: float):
    differences = torch.full((BLOCK,), -88 * tau)
    differences[:8] = torch.tensor(
        [0.0, -0.0, -torch.inf, torch.nan, -3.4e38, -87.5 * tau, -90 * tau, -150 * tau]
    )
    assert exps(differences, tau)[:8].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
