"""The Triton dto_descent: golden numbers, flips, rows far apart and rows gone wrong."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import RowError
from nabla_fast.ops import AdamState, backend_status, cosine_schedule, dto_descent

from ..contract import BackendContract
from ..harness import map_tensors, to_device, to_float64
from ..inputs import F64, Draw
from ..shared.descents import DescentOverlaps, descent_arguments
from ..shared.golden_descents import check_golden_descent
from ..shared.triton_descents import (
    DEVICE,
    ON_DEVICE,
    TritonDescent,
    descend_,
    descended,
    follows,
    same,
)
from .cases import DTO_DESCENT

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

pytestmark = ON_DEVICE


class TestContract(BackendContract):
    tested, backend = DTO_DESCENT, "triton"


class TestOverlaps(DescentOverlaps):
    op, backend = dto_descent, "triton"


class TestDescent(TritonDescent):
    kind = "logits"


# Interpreted, a trajectory of rows that all move takes minutes.
@pytest.mark.skipif(DEVICE == "cuda", reason="the golden models are on the CPU")
@pytest.mark.parametrize(
    "n", [0, pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)]
)
def test_golden_descent(n: int, golden_models, golden_models_64, monkeypatch: pytest.MonkeyPatch):
    check_golden_descent(dto_descent, "triton", n, golden_models, golden_models_64, monkeypatch)


@pytest.mark.parametrize(
    "schedule",
    [
        torch.full((6,), 0.01, dtype=F64),
        cosine_schedule(7, 0.02, warmup_steps=2)[1:],  # the first step of all moves nothing
        cosine_schedule(6, 0.015, min_ratio=0.5),
    ],
    ids=["constant", "warm-up", "floor"],
)
def test_flips_at_the_first_step_at_the_last_and_never(schedule: Tensor):
    # Two equally likely tokens: the gap closes by 2·lr a step.
    closed = 2 * schedule.cumsum(0)
    gap = torch.stack([closed[0] / 2, (closed[-2] + closed[-1]) / 2, closed[-1] * 1.1])
    z = torch.stack([gap, torch.zeros(3)], dim=1).float()
    arguments = {
        "z": z,
        "grad": torch.tensor([[1.0, -1.0]]).expand(3, 2),
        "state": AdamState.zeros(z),
        "schedule": schedule,
    }
    ours = descended(arguments)
    assert ours[0].token.tolist() == [1, 1, 0]
    assert ours[0].flipped.tolist() == [True, True, False]
    assert ours[2].step.tolist() == [1, 6, 6]
    follows(ours, descended(to_float64(arguments), "torch"))


def test_the_first_of_equal_logits_is_the_token():
    # In one slice, and in two.
    z = torch.full((2, 4000), -1.0)
    z[0, [3, 5]], z[1, [20, 2047]] = 2.0, 2.0
    grad = torch.zeros_like(z)
    grad[0, 3], grad[1, 20] = 1.0, 1.0
    arguments = {"z": z, "grad": grad, "state": AdamState.zeros(z), "schedule": cosine_schedule(2, 0.01)}
    (token, flipped), _, state = descended(arguments)
    assert token.tolist() == [5, 2047]
    assert flipped.all()
    assert state.step.tolist() == [1, 1]
    # Without a gradient the first stays ahead of its equal.
    (token, flipped), after, state = descended(arguments | {"grad": torch.zeros_like(z)})
    assert token.tolist() == [3, 20]
    assert not flipped.any()
    assert torch.equal(after, z)


@pytest.mark.slow
def test_a_vocabulary_of_todays_size(draw: Draw):
    arguments = descent_arguments(draw, 1, 151_936, iters=2, gap=0.5, masked=0.1)
    follows(descended(arguments), descended(to_float64(arguments), "torch"))


def test_rows_more_than_2_31_elements_apart(tmp_path: Path, draw: Draw):
    vocabulary, stride = 33, 2**31 + 5
    if DEVICE == "cuda":
        pytest.skip("files back no memory of a GPU")
    arguments = descent_arguments(draw, 2, vocabulary, iters=2, noise=True)
    expected = descended(arguments)

    def spread(name: str, tensor: Tensor) -> Tensor:
        size = 4 * (stride + vocabulary)
        storage = torch.UntypedStorage.from_file(str(tmp_path / name), shared=True, nbytes=size)
        far = torch.empty(0).set_(storage, 0, (2, vocabulary), (stride, 1))
        return far.copy_(tensor)

    given = map_tensors(torch.clone, arguments)
    far = {name: spread(name, given[name]) for name in ("z", "grad")}
    assert same(expected, descend_(given | far))


def test_rows_a_few_at_a_time_have_the_same_bits(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    kernels = importlib.import_module("nabla_fast.triton_kernels.dto_descent")
    arguments = descent_arguments(draw, 3, 300, iters=3, noise=True, until=True, by_row=True)
    together = descended(arguments)
    monkeypatch.setattr(kernels, "rows_at_once", lambda z, arrays: 2)
    assert same(together, descended(arguments))


@pytest.mark.parametrize(
    ("value", "reason"), [(torch.nan, "NaN"), (torch.inf, "[+]inf"), (-torch.inf, "no finite")]
)
def test_a_bad_row_is_named_and_stays(value: float, reason: str, draw: Draw):
    arguments = descent_arguments(draw, 3, 300, iters=1)
    arguments["z"][1, slice(None) if value == -torch.inf else 299] = value
    given = to_device(DEVICE, arguments)
    with pytest.raises(RowError, match=f"row 1 has (a )?{reason}"):
        descend_(given)
    for before, after in (
        (arguments["z"], given["z"]),
        *zip(arguments["state"], given["state"], strict=True),
    ):
        assert torch.equal(before[1].nan_to_num(7.0), after[1].cpu().nan_to_num(7.0))
    # The others have taken their step.
    assert given["state"].step.tolist() == [1, 0, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_spoils_its_row_alone(value: float, draw: Draw):
    arguments = descent_arguments(draw, 3, 300, iters=3)
    arguments["z"][:, 40] = 20.0
    arguments["grad"][1, 77] = value
    ours, theirs = descended(arguments), descended(arguments, "torch")
    assert torch.equal(ours[0].token, theirs[0].token)
    assert torch.equal(ours[0].flipped, theirs[0].flipped)
    assert torch.equal(ours[2].step, theirs[2].step)
    assert torch.equal(ours[1].isnan(), theirs[1].isnan())
    assert ours[1][1].isnan().all()


def test_the_gradient_of_masked_tokens_does_not_matter(draw: Draw):
    arguments = descent_arguments(draw, 2, 300, iters=3, masked=0.5)
    masked = arguments["z"] == -torch.inf
    ours = descended(arguments)
    assert same(ours, descended(arguments | {"grad": arguments["grad"].masked_fill(masked, torch.inf)}))
    assert torch.equal(ours[1] == -torch.inf, masked)
    assert (ours[2].exp_avg[masked] == 0).all()
