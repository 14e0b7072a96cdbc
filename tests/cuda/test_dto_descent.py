"""The CUDA kernel of dto_descent, on the host that runs device code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bad_logits import BAD_STATUS, bad_logits
from cuda_kernels import OK, Kernels, Refused
from descents import CLUSTERS, GRID, ONE_BLOCK, Device, descend
from ops.harness import Arguments, Results, check, to_float64
from ops.inputs import F32, Case, Draw
from ops.shared.descents import descent_arguments, descent_cases

from nabla_fast.ops import AdamState, cosine_schedule, dto_descent, use_backend

ORDERS = 20
WHOLE = 151_936

DEVICES = {"clusters": CLUSTERS, "grid": GRID, "one block": ONE_BLOCK}
# Of several tiles, in registers, in shared memory and in a workspace.
TILES: dict[str, tuple[Device, dict[str, Any]]] = {
    "registers": (Device(1, 0, 1), {"rows": 1, "vocabulary": 8_189}),
    "shared": (Device(1, 0, 1), {"rows": 1, "vocabulary": 14_339, "masked": 0.5}),
    "spilled": (Device(1, 50_000, 1), {"rows": 2, "vocabulary": 12_293, "group": True}),
    "spilled noise": (Device(1, 90_000, 1), {"rows": 2, "vocabulary": 12_293, "noise": True}),
    "grid of 3 rows": (Device(7, 0, 1), {"rows": 3, "vocabulary": 5003, "until": True}),
    "more rows than a grid holds": (Device(3, 50_000, 1), {"rows": 5, "vocabulary": 4099, "group": True}),
    **{
        f"cluster of {size}": (Device(1 if size == 1 else 64, 0, size), {"rows": 4, "vocabulary": 16_411})
        for size in (2, 4, 8, 16)
    },
}


@pytest.fixture(scope="session")
def kernels(built) -> Kernels:
    return Kernels(built("kernels.so"))


def compute(kernels: Kernels, device: Device, arguments: Arguments) -> Results:
    results, status = descend(kernels, arguments, device)
    assert (status == OK).all()
    return results


def cases() -> list[Any]:
    """Those of all backends, but for float64, which devices have no kernel for."""
    made = []
    for case in descent_cases():
        if case.large or case.name == "float64":
            continue
        marks = pytest.mark.slow if case.slow else ()
        made.append(pytest.param(case, id=case.name, marks=marks))
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases())
def test_it_is_as_exact_as_pytorch(case: Case, device: str, kernels: Kernels, draw: Draw):
    check(dto_descent, case, draw, "cpu", partial(compute, kernels, DEVICES[device]))


@pytest.mark.parametrize("name", TILES)
def test_wherever_tokens_are_kept(name: str, kernels: Kernels, draw: Draw):
    device, sizes = TILES[name]
    case = Case(name, partial(descent_arguments, iters=6, gap=0.1, **sizes))
    check(dto_descent, case, draw, "cpu", partial(compute, kernels, device))


@pytest.mark.parametrize("device", [GRID, CLUSTERS], ids=["grid", "clusters"])
def test_a_whole_vocabulary(device: Device, kernels: Kernels, draw: Draw):
    rows = 1 if device is GRID else 4
    case = Case("whole", partial(descent_arguments, rows=rows, vocabulary=WHOLE, iters=3, gap=0.05))
    wide = Device(16, 0, device.most_cluster)
    check(dto_descent, case, draw, "cpu", partial(compute, kernels, wide))


@pytest.mark.parametrize("device", [GRID, CLUSTERS], ids=["grid", "clusters"])
def test_every_order_of_threads_gives_the_same_bits(device: Device, kernels: Kernels, draw: Draw):
    options = {"iters": 3, "noise": True, "group": True, "until": True}
    arguments = descent_arguments(draw, 4, 4099, **options)
    runs = [descend(Kernels(kernels.path, seed), arguments, device)[0] for seed in range(ORDERS)]
    for results in runs[1:]:
        assert all(torch.equal(value, runs[0][name]) for name, value in results.items())


@pytest.mark.parametrize("device", DEVICES)
def test_flips_at_the_first_step_at_the_last_and_never(device: str, kernels: Kernels):
    schedule = torch.full((6,), 0.01, dtype=torch.float64)
    # Two equally likely tokens: the gap closes by 2·lr a step.
    closed = 2 * schedule.cumsum(0)
    gap = torch.stack([closed[0] / 2, (closed[-2] + closed[-1]) / 2, closed[-1] * 1.1])
    z = torch.stack([gap, torch.zeros(3)], dim=1).float()
    arguments = {
        "z": z,
        "grad": torch.tensor([[1.0, -1.0]]).repeat(3, 1),
        "state": AdamState.zeros(z),
        "schedule": schedule,
    }
    results = compute(kernels, DEVICES[device], arguments)
    assert results["token"].tolist() == [1, 1, 0]
    assert results["flipped"].tolist() == [True, True, False]
    assert results["state_step"].tolist() == [1, 6, 6]


def test_more_steps_than_rates_are_prepared_at_a_time(kernels: Kernels, draw: Draw):
    make = partial(descent_arguments, rows=4, vocabulary=40, iters=140, lr=1e-3, gap=4.0, taken=30)
    for device in (GRID, CLUSTERS):
        check(dto_descent, Case("many steps", make), draw, "cpu", partial(compute, kernels, device))


def test_the_first_of_equal_logits_is_the_token(kernels: Kernels):
    z = torch.full((4, 4500), -1.0)
    z[:2, [3, 5]], z[2:, [20, 4097]] = 2.0, 2.0
    grad = torch.zeros_like(z)
    grad[0, 3], grad[2, 20] = 1.0, 1.0
    arguments = {"z": z, "grad": grad, "state": AdamState.zeros(z), "schedule": cosine_schedule(2, 0.01)}
    for device in DEVICES.values():
        results = compute(kernels, device, arguments)
        assert results["token"].tolist() == [5, 3, 4097, 20]
        assert results["flipped"].tolist() == [True, False, True, False]
        assert torch.equal(results["z"][1], z[1])


def test_a_bad_row_stays_as_it_is(kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 7, 4500, iters=2, taken=1, group=True)
    arguments["z"] = bad_logits(draw)
    for device in DEVICES.values():
        results, status = descend(kernels, arguments, device)
        assert status.tolist() == BAD_STATUS
        for row in range(1, 6):
            assert torch.equal(results["z"][row].nan_to_num(7.0), arguments["z"][row].nan_to_num(7.0))
            assert torch.equal(results["state_exp_avg"][row], arguments["state"].exp_avg[row])
            assert results["state_step"][row] == arguments["state"].step[row]
            assert results["token"][row] == -1
            assert not results["flipped"][row]
        assert (results["state_step"][[0, 6]] > arguments["state"].step[[0, 6]]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_spoils_its_row_alone(value: float, kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 5, 4500, iters=3)
    arguments["z"][:, 40], arguments["z"][1, 0] = 20.0, 20.0
    arguments["grad"][1, 4477] = arguments["grad"][2, 40] = value
    with use_backend("torch"):
        given = to_float64(arguments)
        token, flipped = dto_descent(**given)
    for device in DEVICES.values():
        results = compute(kernels, device, arguments)
        assert torch.equal(results["token"], token)
        assert torch.equal(results["flipped"], flipped)
        assert torch.equal(results["state_step"], given["state"].step)
        for name, exact in (("z", given["z"]), ("state_exp_avg", given["state"].exp_avg)):
            assert torch.equal(results[name].isnan(), exact.isnan())
        assert results["z"][1].isnan().all()


def test_the_gradient_of_tokens_without_probability_does_not_matter(kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 4, 4500, iters=3, masked=0.5)
    arguments["z"][:, 77] = -500.0
    without = arguments["z"] < -400
    infinite = arguments["grad"].masked_fill(without, torch.inf)
    for device in DEVICES.values():
        results = compute(kernels, device, arguments)
        other = compute(kernels, device, arguments | {"grad": infinite})
        assert all(torch.equal(value, results[name]) for name, value in other.items())
        assert (results["state_exp_avg"][without] == 0).all()


def test_the_largest_gradient_does_not_matter_where_there_is_no_probability(kernels: Kernels):
    z = torch.tensor([[0.0, -1000.0, -1.0, -torch.inf]]).repeat(4, 1)
    grad = torch.tensor([[0.0, torch.finfo(F32).max, 1.0, torch.finfo(F32).max]]).repeat(4, 1)
    arguments = {"z": z, "grad": grad, "state": AdamState.zeros(z), "tau": 0.5}
    for device in DEVICES.values():
        results = compute(kernels, device, arguments | {"schedule": cosine_schedule(2, 0.01)})
        assert torch.equal(results["z"][:, [1, 3]], z[:, [1, 3]])
        assert results["token"].tolist() == [0] * 4
        assert (results["z"][:, 0] > 0).all()


@pytest.mark.parametrize("rate", [torch.inf, torch.nan, 1e30, 300.0])
def test_a_learning_rate_may_move_logits_anywhere(rate: float, kernels: Kernels, draw: Draw):
    """Beyond the reference of the sums, and beyond all numbers."""
    arguments = descent_arguments(draw, 4, 300, iters=4, gap=1.0)
    arguments["schedule"] = torch.tensor([0.01, rate, 0.01, 0.01], dtype=torch.float64)
    with use_backend("torch"):
        given = to_float64(arguments)
        token, flipped = dto_descent(**given)
    for device in DEVICES.values():
        results = compute(kernels, device, arguments)
        assert torch.equal(results["token"], token)
        assert torch.equal(results["flipped"], flipped)
        assert torch.equal(results["state_step"], given["state"].step)


def test_rows_with_gaps(kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 4, 131, iters=3, noise=True)
    expected = compute(kernels, CLUSTERS, arguments)
    wide = {"z": arguments["z"], "grad": arguments["grad"], "exp_avg": arguments["state"].exp_avg}
    for name, tensor in wide.items():
        memory = torch.full((4, 140), torch.nan, dtype=F32)
        memory[:, 3:134] = tensor
        wide[name] = memory[:, 3:134]
    state = arguments["state"]._replace(exp_avg=wide.pop("exp_avg"))
    found = compute(kernels, CLUSTERS, arguments | wide | {"state": state})
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


# -- refusals ----------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 2, 9, iters=2)
    for changes, status in (
        ({"tau": 0.0}, 17),  # NABLA_FAST_INVALID_TAU
        ({"state": arguments["state"]._replace(exp_avg=arguments["z"])}, 29),  # NABLA_FAST_OVERLAP
    ):
        with pytest.raises(Refused) as refused:
            descend(kernels, arguments | changes, copy=False)
        assert refused.value.status == status


def test_no_rows_are_fine(kernels: Kernels, draw: Draw):
    results, status = descend(kernels, descent_arguments(draw, 0, 9))
    assert results["z"].shape == (0, 9)
    assert len(status) == 0
