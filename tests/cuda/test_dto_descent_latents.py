"""The CUDA kernel of dto_descent_latents, on the host that runs device code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cuda_kernels import ALL_MASKED, INFINITE, NAN, OK, Kernels, Refused
from descents import CLUSTERS, GRID, ONE_BLOCK, Device, descend
from ops.harness import Arguments, Results, check, map_tensors, to_float64
from ops.inputs import BF16, F16, F32, Case, Draw
from ops.shared.descents import descent_arguments
from torch import Tensor

from nabla_fast.ops import AdamState, cosine_schedule, dto_descent_latents, use_backend

ORDERS = 20
WHOLE = 151_936

# How tiles come: by bulk copies, or without them by copies of each thread. Where rows of the head do not
# lie for either, threads load them.
DEVICES = {"bulk copies": CLUSTERS, "own copies": GRID, "one block": ONE_BLOCK}
# Few stages, and tiles of fewer tokens than 16, down to one of which one has room.
SHARED = {"tiles of 16": 0, "tiles of 8": 18_000, "tiles of 2": 7_400, "one token": 5_600}

VOCABULARIES: list[dict[str, Any]] = [
    {"rows": 1, "vocabulary": 1},
    {"rows": 2, "vocabulary": 31, "noise": True},
    {"rows": 3, "vocabulary": 257, "until": True, "taken": 3},
    {"rows": 1, "vocabulary": 4099, "iters": 3, "noise": True},
    {"rows": 4, "vocabulary": 4099, "iters": 2, "by_row": True},
]


@pytest.fixture(scope="session")
def kernels(built) -> Kernels:
    return Kernels(built("kernels.so"))


def compute(kernels: Kernels, device: Device, arguments: Arguments) -> Results:
    results, status = descend(kernels, arguments, device)
    assert (status == OK).all()
    return results


def holds(kernels: Kernels, device: Device, draw: Draw, **sizes: Any) -> None:
    case = Case(str(sizes), partial(descent_arguments, **{"iters": 5, "hidden": 24} | sizes))
    check(dto_descent_latents, case, draw, "cpu", partial(compute, kernels, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", [F32, BF16], ids=str)
@pytest.mark.parametrize("sizes", VOCABULARIES, ids=str)
def test_it_is_as_exact_as_pytorch(
    sizes: dict, head: torch.dtype, device: str, kernels: Kernels, draw: Draw
):
    if device == "one block" and sizes["vocabulary"] > 1000:
        pytest.skip("as exact as with eight blocks")
    holds(kernels, DEVICES[device], draw, head=head, **sizes)


@pytest.mark.parametrize("head", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("hidden", [1, 17, 40, 257])
def test_heads_of_any_width(hidden: int, head: torch.dtype, kernels: Kernels, draw: Draw):
    for device in (CLUSTERS, GRID):
        holds(kernels, device, draw, rows=2, vocabulary=131, hidden=hidden, head=head, iters=3)


# Several units of columns a thread, and widths that only one row has registers for.
@pytest.mark.parametrize(
    ("hidden", "head", "rows"),
    [(2056, F32, 2), (4096, BF16, 4), (4104, F16, 2), (6001, F32, 1), (8192, BF16, 1)],
    ids=str,
)
def test_wide_heads(hidden: int, head: torch.dtype, rows: int, kernels: Kernels, draw: Draw):
    holds(kernels, CLUSTERS, draw, rows=rows, vocabulary=37, hidden=hidden, head=head, iters=2)


@pytest.mark.parametrize("copies", ["bulk", "own"])
@pytest.mark.parametrize("room", SHARED)
def test_tiles_of_any_size(room: str, copies: str, kernels: Kernels, draw: Draw):
    device = Device(3, SHARED[room], 16 if copies == "bulk" else 1)
    holds(kernels, device, draw, rows=1, vocabulary=131, hidden=256, head=F32, iters=3)


def test_without_room_for_a_token_the_device_is_refused(kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 1, 20, hidden=2048, iters=2)
    with pytest.raises(Refused) as refused:
        descend(kernels, arguments, Device(2, 8_000, 1))
    assert refused.value.status == 64  # NABLA_FAST_DEVICE_REFUSED


@pytest.mark.slow
def test_a_whole_vocabulary(kernels: Kernels, draw: Draw):
    # A step under way: from moments of 0, Adam makes a whole step of the rounding of a gradient near 0.
    def make(draw: Draw) -> dict[str, Any]:
        arguments = descent_arguments(draw, 1, WHOLE, hidden=8, head=BF16, taken=10, iters=11)
        return arguments | {"until": arguments["state"].step + 1}

    case = Case("whole", make)
    check(dto_descent_latents, case, draw, "cpu", partial(compute, kernels, Device(16, 0, 16)))


@pytest.mark.parametrize(
    ("hidden", "device"), [(24, "bulk copies"), (24, "own copies"), (25, "bulk copies")]
)
def test_every_order_of_threads_gives_the_same_bits(hidden: int, device: str, kernels: Kernels, draw: Draw):
    options = {"iters": 2, "noise": True, "group": True, "until": True, "hidden": hidden}
    arguments = descent_arguments(draw, 4, 131, **options)
    runs = [descend(Kernels(kernels.path, seed), arguments, DEVICES[device])[0] for seed in range(ORDERS)]
    for results in runs[1:]:
        assert all(torch.equal(value, runs[0][name]) for name, value in results.items())


@pytest.mark.parametrize("head", [F32, BF16], ids=str)
def test_flips_at_the_first_step_at_the_last_and_never(head: torch.dtype, kernels: Kernels):
    schedule = torch.full((6,), 0.01, dtype=torch.float64)
    # Two equally likely tokens: the gap closes by 2·lr a step.
    closed = 2 * schedule.cumsum(0)
    gap = torch.stack([closed[0] / 2, (closed[-2] + closed[-1]) / 2, closed[-1] * 1.1])
    h = torch.zeros(3, 8)
    h[:, 0] = gap.float()
    arguments = {
        "h": h,
        "head": torch.eye(2, 8, dtype=head),
        "grad": torch.tensor([[1.0, -1.0]]).repeat(3, 1),
        "state": AdamState.zeros(h),
        "schedule": schedule,
    }
    for device in DEVICES.values():
        results = compute(kernels, device, arguments)
        assert results["token"].tolist() == [1, 1, 0]
        assert results["flipped"].tolist() == [True, True, False]
        assert results["state_step"].tolist() == [1, 6, 6]


def separated(rows: int, vocabulary: int) -> dict[str, Any]:
    """Two tokens pushed apart by about 2·lr a step; rows 3 n flip first, rows 3 n + 1 a step later."""
    lr, left, right = 0.01, 3, vocabulary - 2
    head, h = torch.zeros(vocabulary, 4), torch.full((rows, 4), 8.0)
    number = torch.arange(rows)
    h[:, 0] += (number % 3 + (1 - number // 3) % 2 + 0.5) * 2 * lr
    head[left, 0], head[right, 1] = 1.0, 1.0
    grad = torch.zeros(rows, vocabulary)
    grad[:, left], grad[:, right] = 1.0, -1.0
    schedule = torch.full((4,), lr, dtype=torch.float64)
    return {"h": h, "head": head, "grad": grad, "state": AdamState.zeros(h), "schedule": schedule}


@pytest.mark.parametrize("rows", [4, 11])
def test_rows_of_a_group_stop_with_the_first_of_them(rows: int, kernels: Kernels):
    """In one launch, and in several."""
    arguments = separated(rows, 300) | {"group": torch.arange(rows) % 3}
    with use_backend("torch"):
        given = to_float64(arguments)
        token, flipped = dto_descent_latents(**given)
    results = compute(kernels, CLUSTERS, arguments)
    assert len(set(given["state"].step.tolist())) > 1
    assert torch.equal(results["token"], token)
    assert torch.equal(results["flipped"], flipped)
    assert torch.equal(results["state_step"], given["state"].step)
    torch.testing.assert_close(results["h"].double(), given["h"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lead", [10.0, 45.0, 80.0])
def test_peaked_rows_keep_their_small_gradient(lead: float, kernels: Kernels, draw: Draw):
    # One token leads by so much that 1 − p is far below float32's rounding of p.
    def make(draw: Draw) -> dict[str, Any]:
        arguments = descent_arguments(draw, rows=3, vocabulary=600, hidden=20, iters=4)
        arguments["head"] = arguments["head"] / 20
        arguments["head"][:, 0] = 0
        arguments["head"][draw.integers(0, 600, 1), 0] = lead
        arguments["h"][:, 0] = 1
        return arguments

    check(dto_descent_latents, Case("lead", make), draw, "cpu", partial(compute, kernels, CLUSTERS))


def test_the_first_of_equal_logits_is_the_token(kernels: Kernels):
    for places in ((3, 5), (20, 133), (0, 299), (15, 16)):
        head, h = torch.full((300, 1), -1.0), torch.ones(1, 1)
        head[list(places), 0] = 2.0
        state = AdamState.zeros(h)
        arguments = {"h": h, "head": head, "grad": torch.zeros(1, 300), "state": state}
        results = compute(kernels, CLUSTERS, arguments | {"schedule": cosine_schedule(2, 0.01)})
        assert results["token"].tolist() == [places[0]]
        assert not results["flipped"].any()


# -- rows gone wrong ---------------------------------------------------------------------------------


def test_a_bad_row_stays_as_it_is(kernels: Kernels, draw: Draw):
    # The head is finite: infinite logits come from overflow.
    arguments = descent_arguments(draw, 6, 300, hidden=24, iters=2, taken=1, group=True)
    arguments["head"][:, 0] = arguments["head"][:, 0].abs() + 2
    arguments["h"][1:5] = 0
    arguments["h"][1:5, 0] = torch.tensor([torch.nan, 3e38, -3e38, torch.inf])
    for device in DEVICES.values():
        results, status = descend(kernels, arguments, device)
        assert status.tolist() == [OK, NAN, INFINITE, ALL_MASKED, INFINITE, OK]
        for row in range(1, 5):
            assert torch.equal(results["h"][row].nan_to_num(7.0), arguments["h"][row].nan_to_num(7.0))
            assert torch.equal(results["state_exp_avg"][row], arguments["state"].exp_avg[row])
            assert results["state_step"][row] == arguments["state"].step[row]
            assert results["token"][row] == -1
            assert not results["flipped"][row]
        assert (results["state_step"][[0, 5]] > arguments["state"].step[[0, 5]]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_spoils_its_row_alone(value: float, kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 4, 300, hidden=24, iters=3)
    arguments["grad"][1, 277] = arguments["grad"][2] = value
    with use_backend("torch"):
        given = to_float64(arguments)
        token, flipped = dto_descent_latents(**given)
    for device in DEVICES.values():
        results = compute(kernels, device, arguments)
        assert torch.equal(results["token"], token)
        assert torch.equal(results["flipped"], flipped)
        assert torch.equal(results["state_step"], given["state"].step)
        assert torch.equal(results["h"].isnan(), given["h"].isnan())
        assert results["h"][1:3].isnan().all()


@pytest.mark.parametrize("infinite", [False, True], ids=["overflow", "infinite head"])
def test_masked_tokens_take_no_part(infinite: bool, kernels: Kernels, draw: Draw):
    """Logits of −inf: neither their G matters nor their row of the head."""
    arguments = descent_arguments(draw, 3, 300, hidden=12, iters=3)
    masked = torch.arange(300) % 7 == 3
    arguments["h"][:, 0] = 2.0
    arguments["head"][:, 0] = torch.where(masked, -torch.inf if infinite else -3e38, 0.0)
    results = compute(kernels, CLUSTERS, arguments)
    spoiled = arguments["grad"].masked_fill(masked, torch.inf)
    other = compute(kernels, CLUSTERS, arguments | {"grad": spoiled})
    assert all(torch.equal(value, results[name]) for name, value in other.items())
    arguments["head"][:, 0] = torch.where(masked, -3e38, 0.0)
    with use_backend("torch"):
        given = to_float64(arguments)
        token, _ = dto_descent_latents(**given)
    assert torch.equal(results["token"], token)
    assert torch.equal(results["state_step"], given["state"].step)
    torch.testing.assert_close(results["h"].double(), given["h"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [torch.inf, torch.nan, 1e30, 300.0])
def test_a_learning_rate_may_move_states_anywhere(rate: float, kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 4, 130, hidden=8, iters=4)
    arguments["schedule"] = torch.tensor([0.01, rate, 0.01, 0.01], dtype=torch.float64)
    with use_backend("torch"):
        given = to_float64(arguments)
        token, flipped = dto_descent_latents(**given)
    results = compute(kernels, CLUSTERS, arguments)
    assert torch.equal(results["token"], token)
    assert torch.equal(results["flipped"], flipped)
    assert torch.equal(results["state_step"], given["state"].step)


# -- layouts and refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("head", [F32, BF16], ids=str)
def test_rows_with_any_stride_and_alignment(head: torch.dtype, kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 3, 131, hidden=32, head=head, noise=True, iters=3)
    expected = compute(kernels, CLUSTERS, arguments)
    for offset, gap in ((8, 8), (1, 7), (4, 4), (3, 0)):

        def shifted(tensor: Tensor, offset: int = offset, gap: int = gap) -> Tensor:
            if tensor.ndim < 2:
                return tensor.clone()
            rows, columns = tensor.shape
            wide = torch.full((rows, offset + columns + gap), torch.nan, dtype=tensor.dtype)
            wide[:, offset : offset + columns] = tensor
            return wide[:, offset : offset + columns]

        found = compute(kernels, CLUSTERS, map_tensors(shifted, arguments))
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_what_makes_no_sense_is_refused(kernels: Kernels, draw: Draw):
    arguments = descent_arguments(draw, 2, 9, hidden=8, iters=2)
    wide = torch.zeros(9, 8193)
    states = {"h": torch.zeros(2, 8193), "state": AdamState.zeros(torch.zeros(2, 8193)), "head": wide}
    for changes, status in (
        ({"tau": 0.0}, 17),  # NABLA_FAST_INVALID_TAU
        ({"head": arguments["head"][:, :7].contiguous()}, 16),  # NABLA_FAST_INVALID_SHAPE
        (states, 27),  # NABLA_FAST_TOO_LARGE
        ({"state": arguments["state"]._replace(exp_avg=arguments["h"])}, 29),  # NABLA_FAST_OVERLAP
    ):
        with pytest.raises(Refused) as refused:
            descend(kernels, arguments | changes, copy=False)
        assert refused.value.status == status


def test_no_rows_and_no_steps_are_fine(kernels: Kernels, draw: Draw):
    results, status = descend(kernels, descent_arguments(draw, 0, 9, hidden=4))
    assert results["h"].shape == (0, 4)
    assert len(status) == 0
    arguments = descent_arguments(draw, 2, 40, hidden=4, iters=0)
    results = compute(kernels, CLUSTERS, arguments)
    assert torch.equal(results["h"], arguments["h"])
    assert torch.equal(results["token"], (arguments["h"] @ arguments["head"].T).argmax(dim=1))
