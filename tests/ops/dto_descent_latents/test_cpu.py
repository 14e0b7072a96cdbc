"""The C++ dto_descent_latents: every instruction set, odd sizes, batches, threads, rows gone wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast import _native
from nabla_fast.errors import RowError
from nabla_fast.ops import AdamState, Descent, cosine_schedule, dto_descent_latents, use_backend
from nabla_fast.ops.descent_loop import descend_native

from ..contract import BackendContract, EveryInstructionSet
from ..harness import check, map_tensors, run, to_float64
from ..inputs import BF16, F32, F64, Case, Draw
from ..shared.descents import DescentOverlaps, descent_arguments
from .cases import DTO_DESCENT_LATENTS

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))

BY_ROW = ("h", "grad", "until", "group")  # beside state and noise


class TestContract(BackendContract):
    tested, backend = DTO_DESCENT_LATENTS, "cpu"


class TestOverlaps(DescentOverlaps):
    op, backend, hidden = dto_descent_latents, "cpu", 5


class TestInstructionSets(EveryInstructionSet):
    tested = DTO_DESCENT_LATENTS


def descended(arguments: dict[str, Any], backend: str = "cpu") -> tuple[Descent, Tensor, AdamState]:
    """The op's results, with the hidden states and moments it leaves, from copies of both."""
    given = arguments | {name: map_tensors(torch.clone, arguments[name]) for name in ("h", "state")}
    with use_backend(backend):
        result = dto_descent_latents(**given)
    return result, given["h"], given["state"]


def chosen(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments of some rows, in this order."""
    given = {name: arguments[name] if arguments[name] is None else arguments[name][rows] for name in BY_ROW}
    for name in ("state", "noise"):
        given[name] = map_tensors(lambda tensor: tensor[rows], arguments[name])
    return arguments | given


def same(first: tuple, second: tuple, rows: list[int] | slice = slice(None)) -> bool:
    """Whether rows of the first agree with the second to the bit, NaN for NaN."""
    pairs = zip((*first[0], first[1], *first[2]), (*second[0], second[1], *second[2]), strict=True)
    return all(torch.equal(a[rows].nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def holds(draw: Draw, **sizes: Any) -> None:
    case = Case(str(sizes), partial(descent_arguments, **sizes))
    check(dto_descent_latents, case, draw, "cpu", partial(run, dto_descent_latents, "cpu"))


@pytest.mark.parametrize(
    "sizes",
    # Rows are many steps under way: from moments of 0, Adam makes of a gradient's sign a whole step,
    # and of the rounding of a gradient near 0 as much.
    [
        {"rows": 1, "vocabulary": 1, "hidden": 2},
        {"rows": 3, "vocabulary": 15, "hidden": 2},
        {"rows": 2, "vocabulary": 63, "hidden": 17, "noise": True},
        {"rows": 9, "vocabulary": 65, "hidden": 3, "head": BF16},
        {"rows": 17, "vocabulary": 1023, "hidden": 33, "noise": True, "tau": 0.3},
        {"rows": 4, "vocabulary": 1025, "hidden": 129, "head": BF16, "group": True, "taken": 10},
        {"rows": 32, "vocabulary": 2049, "hidden": 8, "taken": 10, "until": True},
        {
            "rows": 33,
            "vocabulary": 1100,
            "hidden": 65,
            "noise": True,
            "group": True,
            "taken": 10,
            "iters": 30,
        },
        {"rows": 130, "vocabulary": 700, "hidden": 31, "by_row": True, "taken": 10, "iters": 16},
        # So large moves make of some rows' rounding a hundred times that of others: the worst of many.
        {"rows": 16, "vocabulary": 4097, "hidden": 50, "tau": 0.02, "lr": 0.3, "taken": 10, "iters": 18},
        {"rows": 1, "vocabulary": 300_001, "hidden": 5, "iters": 3, "noise": True},
    ],
    ids=str,
)
def test_odd_sizes_and_large_moves(isa: str, sizes: dict, draw: Draw):
    holds(draw, **sizes)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("head", [torch.float32, BF16], ids=str)
def test_one_step_from_any_state(isa: str, rows: int, head: torch.dtype, draw: Draw):
    def make(draw: Draw) -> dict[str, Any]:
        arguments = descent_arguments(draw, rows, 5003, hidden=100, head=head, taken=10, iters=11)
        return arguments | {"until": arguments["state"].step + 1}

    case = Case("one step", make)
    check(dto_descent_latents, case, draw, "cpu", partial(run, dto_descent_latents, "cpu"))


@pytest.mark.parametrize("lead", [10.0, 25.0, 45.0, 60.0, 80.0, 100.0])
def test_peaked_rows_keep_their_small_gradient(isa: str, lead: float, draw: Draw):
    # One token leads by so much that 1 − p is far below float32's rounding of p.
    def make(draw: Draw) -> dict[str, Any]:
        arguments = descent_arguments(draw, rows=3, vocabulary=3000, hidden=20, iters=4)
        arguments["head"] = arguments["head"] / 20
        arguments["head"][:, 0] = 0
        arguments["head"][draw.integers(0, 3000, 1), 0] = lead
        arguments["h"][:, 0] = 1
        return arguments

    case = Case(f"lead {lead}", make)
    check(dto_descent_latents, case, draw, "cpu", partial(run, dto_descent_latents, "cpu"))


def separated(rows: int, vocabulary: int, draw: Draw) -> dict[str, Any]:
    """Two tokens pushed apart by about 2·lr a step, from gaps far from any multiple of it."""
    lr = 0.01
    head = torch.zeros(vocabulary, 2)
    h = torch.full((rows, 2), 8.0)
    left, right = (int(draw.integers(low, high, 1)) for low, high in ((0, 700), (700, vocabulary)))
    head[left, 0], head[right, 1] = 1.0, 1.0
    h[:, 0] += (torch.arange(rows) % 40 + 0.5) * 2 * lr
    grad = torch.zeros(rows, vocabulary)
    grad[:, left], grad[:, right] = 1.0, -1.0
    schedule = torch.full((30,), lr, dtype=F64)
    return {"h": h, "head": head, "grad": grad, "state": AdamState.zeros(h), "schedule": schedule}


@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
def test_flips_when_float64_does(isa: str, grouped: bool, draw: Draw):
    arguments = separated(120, 1500, draw)
    if grouped:
        arguments["group"] = draw.integers(0, 50, 120)
    (token, flipped), _, state = descended(arguments)
    exact, _, exact_state = descended(to_float64(arguments), "torch")
    assert flipped.any()
    assert not flipped.all()
    assert len(set(state.step.tolist())) > 10
    assert torch.equal(token, exact.token)
    assert torch.equal(flipped, exact.flipped)
    assert torch.equal(state.step, exact_state.step)


def test_the_first_of_equal_logits_is_the_token(isa: str):
    for places in ((3, 5), (1000, 1030), (20, 2047), (0, 2999), (1023, 1024)):
        head = torch.full((3000, 1), -1.0)
        head[list(places), 0] = 2.0
        h = torch.ones(1, 1)
        arguments = {
            "h": h,
            "head": head,
            "grad": torch.zeros(1, 3000),
            "state": AdamState.zeros(h),
            "schedule": cosine_schedule(3, 0.01),
        }
        (token, flipped), _, state = descended(arguments)
        assert (int(token), bool(flipped), int(state.step)) == (places[0], False, 3)


@pytest.mark.parametrize("head", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
def test_same_bits_in_any_batch(isa: str, noise: bool, head: torch.dtype, draw: Draw):
    arguments = descent_arguments(
        draw, 70, 2500, hidden=150, head=head, noise=noise, iters=5, taken=2, until=True, tau=0.5
    )
    whole = descended(arguments)
    assert len(set(whole[2].step.tolist())) > 1
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64):
        some = torch.randperm(70)[:rows].tolist()
        assert same(whole, descended(chosen(arguments, some)), some)


@pytest.mark.parametrize("group", [False, True], ids=["", "groups"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "iters"), [(1, 151_937, 3), (2, 131_072, 4), (7, 40_001, 5), (40, 3000, 9)]
)
def test_same_bits_on_any_number_of_threads(
    threads, rows: int, vocabulary: int, iters: int, group: bool, draw: Draw
):
    arguments = descent_arguments(draw, rows, vocabulary, hidden=24, iters=iters, noise=True, group=group)
    threads(1)
    expected = descended(arguments)
    for count in (2, 3, 5):
        threads(count)
        assert same(descended(arguments), expected)


def test_a_descent_goes_on_where_it_stopped(draw: Draw):
    arguments = descent_arguments(draw, 6, 1500, hidden=30, iters=12)
    whole = descended(arguments)
    middle = descended(arguments | {"until": draw.integers(0, 12, 6)})
    going = ~middle[0].flipped
    rest = descended(arguments | {"h": middle[1], "state": middle[2], "until": torch.where(going, 12, 0)})
    assert torch.equal(rest[2].step, whole[2].step)
    assert torch.equal(rest[0].token, whole[0].token)
    torch.testing.assert_close(rest[1], whole[1], rtol=1e-5, atol=1e-5)


def test_a_group_of_one_is_a_row_by_itself(draw: Draw):
    arguments = descent_arguments(draw, 5, 2049, hidden=24, noise=True)
    alone = descended(arguments)
    assert same(descended(arguments | {"group": torch.tensor([7, 3, 2**40, 0, 5])}), alone)


def test_groups_stop_together_with_the_bits_of_fewer_steps(draw: Draw):
    # More rows than share a pass: a group's rows lie in several.
    arguments = separated(80, 1500, draw)
    _, _, alone = descended(arguments)
    group = draw.integers(0, 20, 80)
    together = descended(arguments | {"group": group})
    steps = torch.stack([alone.step[group == g].amin() for g in group])
    assert len(set(steps.tolist())) > 1
    assert torch.equal(together[2].step, steps)
    assert same(together, descended(arguments | {"until": steps}))


@pytest.mark.parametrize("head", [torch.float32, BF16], ids=str)
def test_rows_with_any_stride_and_alignment(isa: str, head: torch.dtype, draw: Draw):
    arguments = descent_arguments(draw, 5, 1531, hidden=37, head=head, noise=True, iters=6)
    expected = descended(arguments)
    for offset, gap in ((1, 7), (3, 0), (5, 21)):

        def shifted(tensor: Tensor, offset: int = offset, gap: int = gap) -> Tensor:
            if tensor.ndim < 2:
                return tensor.clone()
            rows, columns = tensor.shape
            wide = torch.full((rows, offset + columns + gap), torch.nan, dtype=tensor.dtype)
            wide[:, offset : offset + columns] = tensor
            return wide[:, offset : offset + columns]

        given = map_tensors(shifted, arguments)
        with use_backend("cpu"):
            result = dto_descent_latents(**given)
        assert same(expected, (result, given["h"], given["state"]))


def test_one_gradient_and_one_schedule_for_all_rows(draw: Draw):
    arguments = descent_arguments(draw, 4, 300, hidden=24, by_row=True)
    shared = arguments | {
        "grad": arguments["grad"][:1].expand(4, -1),
        "schedule": arguments["schedule"][:1].expand(4, -1),
    }
    copied = map_tensors(lambda tensor: tensor.contiguous(), shared)
    assert same(descended(copied), descended(shared))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_is_named_and_nothing_changes(isa: str, value: float, draw: Draw):
    # The head is finite: infinite logits come from overflow.
    arguments = descent_arguments(draw, 40, 2000, hidden=24)
    arguments["head"][:, 0] = arguments["head"][:, 0].abs() + 2
    arguments["h"][33] = 0
    arguments["h"][33, 0] = {torch.inf: 3e38, -torch.inf: -3e38}.get(value, value)
    given = map_tensors(torch.clone, arguments)
    with use_backend("cpu"), pytest.raises(RowError, match="row 33") as ours:
        dto_descent_latents(**given)
    for name in ("h", "state"):
        for before, after in zip([*arguments[name]], [*given[name]], strict=True):
            assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))
    with use_backend("torch"), pytest.raises(RowError) as theirs:
        dto_descent_latents(**given)
    assert str(ours.value) == str(theirs.value)


def test_masked_tokens_take_no_part(isa: str, draw: Draw):
    # Logits of −inf by overflow; their G does not matter.
    arguments = descent_arguments(draw, 3, 1200, hidden=12, iters=5)
    masked = torch.arange(1200) % 7 == 3
    arguments["head"][:, 0] = torch.where(masked, -3e38, 0.0)
    arguments["h"][:, 0] = 2.0
    arguments["grad"][:, masked] = torch.inf
    ours, h, state = descended(arguments)
    exact, exact_h, exact_state = descended(to_float64(arguments), "torch")
    assert torch.equal(ours.token, exact.token)
    assert torch.equal(state.step, exact_state.step)
    assert h.isfinite().all()
    torch.testing.assert_close(h.double(), exact_h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("token", [0, 1200])
def test_a_gradient_that_is_no_number_spoils_its_row_alone(value: float, token: int, draw: Draw):
    arguments = descent_arguments(draw, 4, 1500, hidden=12, iters=6)
    arguments["head"][token] = 0
    arguments["head"][token, 0], arguments["h"][:, 0] = 5.0, 5.0
    arguments["grad"][2, 77] = value
    ours, h, state = descended(arguments)
    theirs, their_h, their_state = descended(arguments, "torch")
    assert torch.equal(ours.token, theirs.token)
    assert torch.equal(ours.flipped, theirs.flipped)
    assert torch.equal(state.step, their_state.step)
    assert torch.equal(h.isnan(), their_h.isnan())
    assert h[2].isnan().all()


def test_a_learning_rate_that_is_no_number(draw: Draw):
    for value in (torch.nan, torch.inf):
        arguments = descent_arguments(draw, 3, 1500, hidden=12, iters=6)
        arguments["schedule"][2] = value
        ours, h, state = descended(arguments)
        theirs, their_h, their_state = descended(arguments, "torch")
        assert torch.equal(ours.flipped, theirs.flipped)
        assert torch.equal(state.step, their_state.step)
        assert torch.equal(h.isfinite(), their_h.isfinite())


def test_what_the_interface_refuses(draw: Draw):
    native = _native.extension()
    arguments = descent_arguments(draw, 3, 50, hidden=8)
    h, head, grad, state = (arguments[name] for name in ("h", "head", "grad", "state"))
    token, flipped = torch.full((3,), -7), torch.zeros(3, dtype=torch.bool)
    matrices = {
        "parameter": h,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "head": head,
        "grad": grad,
    }
    fields = {
        "num_threads": 1,
        "rows": 3,
        "vocab": 50,
        **matrices,
        "step": state.step,
        "schedule": arguments["schedule"],
        "iters": 20,
        "tau": 1.0,
        "token": token,
        "flipped": flipped,
        "row_status": torch.zeros(3, dtype=torch.int32),
    }
    size = native.dto_descent_latents_workspace(**fields)

    def refused(match: str, **changed: Any) -> None:
        before = h.clone()
        with pytest.raises(ValueError, match=match):
            native.dto_descent_latents(**(fields | changed))
        assert (token == -7).all()
        assert torch.equal(before, h)

    def changed(name: str, index: int, value: Any) -> tuple[Any, ...]:
        tensor = matrices[name]
        of = [tensor.data_ptr(), tensor.shape[1], tensor.stride(0), 0]
        of[index] = value
        return tuple(of)

    for name in ("rows", "iters"):
        refused("negative", **{name: -1})
    refused("empty", vocab=0)
    refused("tau", tau=0.0)
    refused("tau", tau=float("nan"))
    for name in matrices:
        refused("widths differ", **{name: changed(name, 1, 7)})
        refused("dtype", **{name: changed(name, 3, 7)})
        refused("null", **{name: changed(name, 0, None)})
        refused("address space", **{name: changed(name, 2, 2**60)})
    for name in ("parameter", "exp_avg", "exp_avg_sq"):
        refused("overlaps", **{name: changed(name, 2, 7)})
    refused("overlaps", exp_avg=h)
    refused("overlaps", step=arguments["schedule"])
    for name in ("step", "schedule", "token", "flipped", "row_status"):
        refused("null", **{name: None})
    refused("null", noise_seed=state.step)
    workspace = torch.empty(size, dtype=torch.uint8)
    refused("workspace", workspace=workspace, workspace_bytes=size - 1)
    refused("null", workspace=None, workspace_bytes=size)
    refused("overlaps", workspace=h, workspace_bytes=size)
    refused("negative", vocab=2**60)
    assert native.dto_descent_latents_workspace(**(fields | {"rows": 2**60})) == 0
    nothing = {"rows": 0, "parameter": None, "head": None, "workspace": None}
    assert native.dto_descent_latents(**(fields | nothing))
    refused("schedule", until=torch.tensor([1, 21, 2]))
    state.step[1] = -1
    refused("schedule")
    state.step[1] = 0
    assert native.dto_descent_latents(**fields)


@pytest.mark.parametrize("head", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [1e30, 1e38])
def test_gradients_near_the_largest(size: float, head: torch.dtype, isa: str, draw: Draw):
    arguments = descent_arguments(draw, 5, 1100, hidden=33, head=head, iters=1)
    arguments["h"] *= torch.tensor([[0.0], [0.01], [0.1], [0.3], [1.0]])
    arguments["grad"] = size * arguments["grad"].clamp(-1.5, 1.5)
    _, h, state = descended(arguments)
    _, _, exact = descended(to_float64(arguments), "torch")
    error = (state.exp_avg - exact.exp_avg).abs().amax(dim=1)
    assert (error <= 1e-5 * exact.exp_avg.abs().amax(dim=1)).all()
    assert h.isfinite().all()


def test_calls_from_several_threads(draw: Draw):
    arguments = descent_arguments(draw, 4, 3000, hidden=20, noise=True, group=True)
    expected = descended(arguments)
    given = [map_tensors(torch.clone, arguments) for _ in range(12)]

    def work(own: dict[str, Any]) -> tuple:
        own = dict(own)
        h, state = own.pop("h"), own["state"]
        return descend_native("dto_descent_latents", h, own.pop("head"), **own), h, state

    with ThreadPoolExecutor(3) as pool:
        assert all(same(result, expected) for result in pool.map(work, given))
