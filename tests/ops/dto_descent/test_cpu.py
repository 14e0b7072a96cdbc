"""The C++ dto_descent: every instruction set, odd sizes, threads, groups, and rows gone wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.errors import RowError
from nabla_fast.ops import AdamState, Descent, cosine_schedule, dto_descent, use_backend
from nabla_fast.ops.descent_loop import descend_native

from ..contract import BackendContract, EveryInstructionSet
from ..harness import check, map_tensors, run, run_body, to_float64
from ..inputs import F64, Case, Draw
from ..shared.descents import DescentOverlaps, descent_arguments
from .cases import DTO_DESCENT

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = DTO_DESCENT, "cpu"


class TestOverlaps(DescentOverlaps):
    op, backend = dto_descent, "cpu"


class TestInstructionSets(EveryInstructionSet):
    tested = DTO_DESCENT


def descended(arguments: dict[str, Any], backend: str = "cpu") -> tuple[Descent, Tensor, AdamState]:
    """The op's results, with the logits and the state it leaves, from a copy of the arguments."""
    given = map_tensors(torch.clone, arguments)
    with use_backend(backend):
        result = dto_descent(**given)
    return result, given["z"], given["state"]


def native_descent(arguments: dict[str, Any]) -> Descent:
    """The kernel's result, in any thread."""
    own = dict(arguments)
    return descend_native("dto_descent", own.pop("z"), None, **own)


def same(first: tuple, second: tuple, rows: slice | Tensor = slice(None)) -> bool:
    """Whether rows of two results agree to the bit, NaN for NaN."""
    pairs = zip((*first[0], first[1], *first[2]), (*second[0], second[1], *second[2]), strict=True)
    return all(torch.equal(a[rows].nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 3, "vocabulary": 15},
        {"rows": 3, "vocabulary": 17, "masked": 0.5},
        {"rows": 2, "vocabulary": 1023, "noise": True},
        {"rows": 2, "vocabulary": 1024},
        {"rows": 2, "vocabulary": 1025, "noise": True, "masked": 0.2},
        {"rows": 2, "vocabulary": 4097, "tau": 0.02, "lr": 0.3},
        {"rows": 1, "vocabulary": 300_001, "iters": 3, "noise": True},
        {"rows": 6, "vocabulary": 1025, "group": True, "noise": True, "iters": 30},
    ],
    ids=str,
)
def test_odd_sizes_and_large_moves(isa: str, sizes: dict, draw: Draw):
    case = Case(str(sizes), partial(descent_arguments, **sizes))
    check(dto_descent, case, draw, "cpu", partial(run, dto_descent, "cpu"))


@pytest.mark.parametrize("lead", [25.0, 35.0, 45.0, 50.0, 60.0])
def test_moments_below_the_normal_numbers(isa: str, lead: float, draw: Draw):
    def make(draw: Draw) -> dict[str, Any]:
        arguments = descent_arguments(draw, rows=3, vocabulary=300, iters=4)
        arguments["z"][torch.arange(3), draw.integers(0, 300, 3)] = 10.0 + lead
        return arguments

    check(dto_descent, Case(f"lead {lead}", make), draw, "cpu", partial(run, dto_descent, "cpu"))
    # The processor is left as it was: torch on this thread still has its small numbers.
    assert float(torch.tensor(1e-38) * 0.01) > 0


@pytest.mark.parametrize("rate", [0.01, 1e-12, 10.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e5, 1e12])
def test_moments_and_rates_of_any_size(isa: str, scale: float, rate: float, draw: Draw):
    """Where estimates of roots and quotients hold, where they do not, and at the border."""

    def make(draw: Draw) -> dict[str, Any]:
        arguments = descent_arguments(draw, rows=3, vocabulary=1300, iters=2, lr=rate)
        arguments["grad"] *= scale
        return arguments

    check(dto_descent, Case(f"{scale}", make), draw, "cpu", partial(run, dto_descent, "cpu"))


def test_sums_round_no_more_than_torchs(isa: str, draw: Draw):
    """A chain of additions through a whole chunk had twice torch's error."""
    arguments = descent_arguments(draw, rows=128, vocabulary=1300, iters=2, lr=10.0)
    exact = run_body(dto_descent, to_float64(arguments))["state_exp_avg"]
    ours = run(dto_descent, "cpu", arguments)["state_exp_avg"]
    torchs = run_body(dto_descent, arguments)["state_exp_avg"]
    assert (ours - exact).norm() <= 1.5 * (torchs - exact).norm()


def test_flips_when_float64_does(draw: Draw):
    # Two tokens pushed apart by 2·lr a step; no gap is near a multiple of it.
    rows, lr, vocabulary = 400, 0.01, 1500
    gap = (torch.arange(rows) / 10 + 0.05) * 2 * lr
    z = torch.full((rows, vocabulary), -8.0)
    left, right = draw.integers(0, 700, rows), draw.integers(700, vocabulary, rows)
    z[torch.arange(rows), left], z[torch.arange(rows), right] = gap, 0.0
    grad = torch.zeros(rows, vocabulary)
    grad[torch.arange(rows), left], grad[torch.arange(rows), right] = 1.0, -1.0
    arguments = {
        "z": z,
        "grad": grad,
        "state": AdamState.zeros(z),
        "schedule": torch.full((30,), lr, dtype=F64),
    }
    (token, flipped), _, state = descended(arguments)
    exact, _, exact_state = descended(to_float64(arguments), "torch")
    assert flipped.any()
    assert not flipped.all()
    assert torch.equal(token, exact.token)
    assert torch.equal(flipped, exact.flipped)
    assert torch.equal(state.step, exact_state.step)


def test_the_first_of_equal_logits_is_the_token(isa: str):
    for places in ((3, 5), (1000, 1030), (20, 2047), (0, 2999)):
        z = torch.full((1, 3000), -1.0)
        z[0, list(places)] = 2.0
        grad = torch.zeros(1, 3000)
        arguments = {
            "z": z,
            "grad": grad,
            "state": AdamState.zeros(z),
            "schedule": cosine_schedule(4, 0.01),
        }
        (token, flipped), _, state = descended(arguments)
        assert (int(token), bool(flipped), int(state.step)) == (places[0], False, 4)
        # The first is pushed down: the second takes over, in a later chunk or in the same.
        grad[0, places[0]] = 1.0
        (token, flipped), _, state = descended(arguments)
        assert (int(token), bool(flipped), int(state.step)) == (places[1], True, 1)
        # The second is pushed down, then up to the very same height: no flip until it is above.
        z[0, places[1]] = 2.0 - 1e-3
        grad[0, places[0]], grad[0, places[1]] = 1.0, -1.0
        (token, flipped), _, _ = descended(arguments)
        assert (int(token), bool(flipped)) == (places[1], True)


@pytest.mark.parametrize("group", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "iters"), [(1, 151_937, 4), (2, 131_072, 5), (7, 40_001, 6), (40, 700, 20)]
)
def test_same_bits_on_any_number_of_threads(
    threads, rows: int, vocabulary: int, iters: int, noise: bool, group: bool, draw: Draw
):
    arguments = descent_arguments(
        draw, rows, vocabulary, iters=iters, noise=noise, group=group, gap=0.1, masked=0.1
    )
    threads(1)
    expected = descended(arguments)
    for count in (2, 3, 5):
        threads(count)
        assert same(expected, descended(arguments))


def test_a_group_of_one_is_a_row_by_itself(draw: Draw):
    arguments = descent_arguments(draw, 5, 2049, noise=True)
    alone = descended(arguments)
    assert same(alone, descended(arguments | {"group": torch.tensor([7, 3, 2**40, 0, 5])}))


def test_groups_stop_together_with_the_bits_of_fewer_steps(draw: Draw):
    # A row's two largest logits are far above the others, and close by 2·lr a step.
    arguments = descent_arguments(draw, 12, 1500, iters=40)
    top = arguments["z"].topk(2, dim=1)
    arguments["z"].clamp_(max=top.values[:, 1:] - 1)
    pair = torch.stack([top.values[:, 1] + torch.linspace(0.01, 0.3, 12), top.values[:, 1]], dim=1)
    arguments["z"].scatter_(1, top.indices, pair)
    _, _, alone = descended(arguments)
    group = torch.arange(12) % 4
    together = descended(arguments | {"group": group})
    steps = torch.stack([alone.step[group == g].amin() for g in group])
    assert len(set(steps.tolist())) > 1
    assert torch.equal(together[2].step, steps)
    assert same(together, descended(arguments | {"until": steps}))


def test_rows_with_any_stride_and_alignment(isa: str, draw: Draw):
    arguments = descent_arguments(draw, 4, 1531, noise=True, iters=10)
    expected = descended(arguments)
    for offset, gap in ((1, 7), (3, 0), (5, 21)):

        def shifted(tensor: Tensor, offset: int = offset, gap: int = gap) -> Tensor:
            if tensor.ndim < 2:
                return tensor.clone()
            wide = torch.full((4, offset + 1531 + gap), torch.nan)
            wide[:, offset : offset + 1531] = tensor
            return wide[:, offset : offset + 1531]

        given = map_tensors(shifted, arguments)
        with use_backend("cpu"):
            result = dto_descent(**given)
        assert same(expected, (result, given["z"], given["state"]))


def test_one_gradient_and_one_schedule_for_all_rows(draw: Draw):
    arguments = descent_arguments(draw, 4, 300, by_row=True)
    shared = arguments | {
        "grad": arguments["grad"][:1].expand(4, -1),
        "schedule": arguments["schedule"][:1].expand(4, -1),
    }
    given = {name: map_tensors(torch.clone, shared[name]) for name in ("z", "state")}
    with use_backend("cpu"):
        result = dto_descent(**(shared | given))
    copied = map_tensors(lambda tensor: tensor.contiguous(), shared)
    assert same(descended(copied), (result, given["z"], given["state"]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_is_named_and_nothing_changes(isa: str, value: float, draw: Draw):
    arguments = descent_arguments(draw, 5, 2000)
    if value == -torch.inf:
        arguments["z"][3] = value
    else:
        arguments["z"][3, 1999] = value
    given = map_tensors(torch.clone, arguments)
    with use_backend("cpu"), pytest.raises(RowError, match="row 3") as ours:
        dto_descent(**given)
    for name in ("z", "state"):
        for before, after in zip([*arguments[name]], [*given[name]], strict=True):
            assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))
    with use_backend("torch"), pytest.raises(RowError) as theirs:
        dto_descent(**given)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("token", [0, 1200])
def test_a_gradient_that_is_no_number_spoils_its_row_alone(value: float, token: int, draw: Draw):
    arguments = descent_arguments(draw, 4, 1500, iters=6)
    arguments["z"][:, token] = 20.0
    arguments["grad"][2, 77] = value
    ours, z, state = descended(arguments)
    theirs, their_z, their_state = descended(arguments, "torch")
    assert torch.equal(ours.token, theirs.token)
    assert torch.equal(ours.flipped, theirs.flipped)
    assert torch.equal(state.step, their_state.step)
    assert torch.equal(z.isnan(), their_z.isnan())
    assert z[2].isnan().all()


def test_a_learning_rate_that_is_no_number(draw: Draw):
    for value in (torch.nan, torch.inf):
        arguments = descent_arguments(draw, 3, 1500, iters=6)
        arguments["schedule"][2] = value
        ours, z, state = descended(arguments)
        theirs, their_z, their_state = descended(arguments, "torch")
        assert torch.equal(ours.flipped, theirs.flipped)
        assert torch.equal(state.step, their_state.step)
        assert torch.equal(z.isfinite(), their_z.isfinite())


def test_steps_outside_the_schedule_are_refused(draw: Draw):
    arguments = descent_arguments(draw, 3, 50)
    arguments["state"].step[1] = -1
    with pytest.raises(ValueError, match="negative or beyond the schedule"):
        native_descent(arguments)


def test_calls_from_several_threads(draw: Draw):
    arguments = descent_arguments(draw, 4, 3000, noise=True, group=True)
    expected = descended(arguments)
    given = [map_tensors(torch.clone, arguments) for _ in range(12)]

    def work(own: dict[str, Any]) -> tuple:
        return native_descent(own), own["z"], own["state"]

    with ThreadPoolExecutor(3) as pool:
        assert all(same(expected, result) for result in pool.map(work, given))
