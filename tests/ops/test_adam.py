"""Adam's state, its learning rates, and its step beside torch.optim's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_fast.errors import InputError
from nabla_fast.ops import AdamState, cosine_schedule
from nabla_fast.ops.adam import adam_step_

from .inputs import F32, F64, Draw


def test_cosine():
    rates = cosine_schedule(20, 0.01, min_ratio=0.1)
    wanted = [0.01 * max(0.1, 0.5 * (1 + math.cos(math.pi * k / 20))) for k in range(20)]
    assert rates.dtype == F64
    assert rates.tolist() == pytest.approx(wanted, rel=1e-15)
    assert float(rates[0]) == 0.01
    assert float(rates[-1]) == pytest.approx(0.001)


def test_warm_up():
    rates = cosine_schedule(10, 0.5, min_ratio=0.2, warmup_steps=4).tolist()
    assert rates[:4] == pytest.approx([0.0, 0.125, 0.25, 0.375])
    assert rates[4:] == pytest.approx(cosine_schedule(6, 0.5, min_ratio=0.2).tolist())


@given(
    iters=st.integers(0, 100),
    lr=st.floats(1e-6, 10),
    min_ratio=st.floats(0, 1),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_schedule_properties(iters: int, lr: float, min_ratio: float, share: float):
    warmup = int(share * iters)
    rates = cosine_schedule(iters, lr, min_ratio=min_ratio, warmup_steps=warmup).tolist()
    assert len(rates) == iters
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(rate >= lr * min_ratio * (1 - 1e-12) for rate in rates[warmup:])


def test_warm_up_all_the_way():
    assert cosine_schedule(3, 3.0, warmup_steps=3).tolist() == pytest.approx([0.0, 1.0, 2.0])


@pytest.mark.parametrize("warmup", [-1, 4])
def test_warm_up_longer_than_the_schedule(warmup: int):
    with pytest.raises(InputError, match="warmup_steps must be between 0 and iters=3"):
        cosine_schedule(3, 0.01, warmup_steps=warmup)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iters", -1),
        ("iters", 2.5),
        ("iters", "3"),
        ("iters", True),
        ("iters", 2**70),
        ("lr", "x"),
        ("lr", None),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("min_ratio", math.nan),
        ("min_ratio", 1.5),
        ("warmup_steps", 1.5),
    ],
)
def test_settings_out_of_range(name: str, value: object):
    with pytest.raises(InputError, match=f"^cosine_schedule: {name} (must|is)"):
        cosine_schedule(**{"iters": 3, "lr": 0.1, name: value})


@pytest.mark.parametrize(
    "parameter", [None, torch.tensor(1.0), torch.ones(3), torch.ones(2, 2, dtype=torch.int64)]
)
def test_state_of_no_matrix(parameter: object):
    with pytest.raises(InputError, match=r"^AdamState.zeros: parameter must be"):
        AdamState.zeros(parameter)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_state_of_zeros(dtype: torch.dtype):
    parameter = torch.ones(3, 5, dtype=dtype)
    state = AdamState.zeros(parameter)
    assert state.exp_avg.dtype == state.exp_avg_sq.dtype == dtype
    assert state.step.dtype == torch.int64
    assert all(not tensor.any() for tensor in state)
    assert state.step.shape == (3,)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_step_against_torch_optim(dtype: torch.dtype, draw: Draw):
    ours = draw.normal(4, 9, dtype=dtype)
    theirs, state = ours.clone().requires_grad_(), AdamState.zeros(ours)
    optimizer = torch.optim.Adam([theirs], lr=0.0)
    tolerance = 1e-6 if dtype == F32 else 1e-14
    for lr in cosine_schedule(100, 0.02, min_ratio=0.1, warmup_steps=3):
        # Gradients of very different sizes, the smallest far below ε.
        theirs.grad = draw.normal(4, 9, dtype=dtype) * 10.0 ** draw.integers(-12, 4, 4, 9)
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.step()
        adam_step_(ours, theirs.grad.clone(), state, lr.expand(4))
        torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=10 * tolerance)
    assert state.step.tolist() == [100] * 4
