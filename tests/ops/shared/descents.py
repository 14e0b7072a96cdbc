"""Inputs of dto_descent and dto_descent_latents, and both against torch.optim.Adam, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import InputError
from nabla_fast.ops import (
    AdamState,
    Descent,
    cosine_schedule,
    dto_descent,
    dto_descent_latents,
    gumbel_noise,
    use_backend,
)
from nabla_fast.ops.registry import Op

from ..contract import OnBackend
from ..harness import home, rows_of, to_device
from ..inputs import BF16, F16, F32, F64, WHOLE, Case, Draw
from ..reference import AdamRun

# -- inputs ------------------------------------------------------------------------------------------


def adam_state(draw: Draw, shape: tuple[int, int], taken: int, dtype: torch.dtype = F32) -> AdamState:
    """The state of rows that have taken 0 to ``taken`` steps."""
    step = draw.integers(0, taken + 1, shape[0])
    begun = (step > 0)[:, None].to(dtype)
    first = draw.normal(*shape, dtype=dtype, scale=1e-2) * begun
    return AdamState(first, (first + draw.normal(*shape, dtype=dtype, scale=1e-2) * begun).square(), step)


def tight(draw: Draw, logits: Tensor, gap: float) -> Tensor:
    """``logits`` whose largest two differ by 0 to ``gap``."""
    top = logits.topk(min(2, logits.shape[1]), dim=-1)
    second = top.values[:, -1:]
    return logits.scatter(1, top.indices[:, :1], second + gap * draw.uniform(len(logits), 1))


def against(logits: Tensor, grad: Tensor) -> Tensor:
    """``grad`` with a push from the largest logit to the second."""
    top = logits.topk(min(2, logits.shape[1]), dim=-1).indices
    push = torch.zeros_like(grad).scatter(1, top[:, -1:], -3.0)
    return grad + push.scatter(1, top[:, :1], 3.0)


def descent_arguments(
    draw: Draw,
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = F32,
    grad: torch.dtype = F32,
    iters: int = 20,
    lr: float = 0.01,
    masked: float = 0.0,
    tau: float = 1.0,
    gap: float = 0.4,
    offset: float = 0.0,
    noise: bool = False,
    taken: int = 0,
    until: bool = False,
    group: bool = False,
    by_row: bool = False,
    hidden: int = 0,
    head: torch.dtype = F32,
) -> dict[str, Any]:
    """Arguments of dto_descent, or of dto_descent_latents if ``hidden`` is its width."""
    schedule = cosine_schedule(iters, lr, min_ratio=0.1)
    gradient = draw.normal(rows, vocabulary, dtype=grad) + offset
    arguments: dict[str, Any]
    if hidden:
        arguments = {
            "h": draw.normal(rows, hidden, dtype=dtype, scale=3 * hidden**-0.5),
            "head": draw.normal(vocabulary, hidden, dtype=head),
        }
    else:
        arguments = {"z": tight(draw, draw.logits(rows, vocabulary, dtype, masked), gap)}
        gradient = against(arguments["z"], gradient)
    return arguments | {
        "grad": gradient,
        "state": adam_state(draw, (rows, hidden or vocabulary), taken, dtype),
        "schedule": schedule * (1 + draw.uniform(rows, 1).double()) if by_row else schedule,
        "until": draw.integers(0, iters + 1, rows) if until else None,
        "group": torch.arange(rows) % 3 if group else None,
        "tau": tau,
        "noise": draw.noise(rows) if noise else None,
    }


_DESCENTS: dict[str, dict[str, Any]] = {
    "odd": {"rows": 8, "vocabulary": 257},
    "one token": {"rows": 2, "vocabulary": 1},
    "two tokens": {"rows": 5, "vocabulary": 2},
    "one row": {"rows": 1, "vocabulary": 4099},
    "masked": {"rows": 5, "vocabulary": 515, "masked": 0.9},
    "noise": {"rows": 5, "vocabulary": 257, "noise": True, "tau": 0.7, "lr": 0.1},
    "cold": {"rows": 5, "vocabulary": 257, "tau": 0.1},
    "hot": {"rows": 5, "vocabulary": 257, "tau": 10.0},
    "under way": {"rows": 6, "vocabulary": 257, "taken": 20},
    "until": {"rows": 7, "vocabulary": 257, "until": True},
    "groups": {"rows": 11, "vocabulary": 257, "group": True},
    "a schedule a row": {"rows": 5, "vocabulary": 257, "by_row": True, "taken": 10},
    "a hundred steps": {"rows": 3, "vocabulary": 257, "iters": 100, "gap": 3.0},
    "no step": {"rows": 3, "vocabulary": 257, "iters": 0},
    "far from zero": {"rows": 5, "vocabulary": 257, "offset": 1000.0},
    "bf16 gradient": {"rows": 5, "vocabulary": 257, "grad": BF16},
    "float64": {"rows": 5, "vocabulary": 257, "dtype": F64, "grad": F64},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE, "iters": 5},
}
# Interpreted steps take long: an interpreter makes a few on a few rows, that flip as early.
_FEW_ROWS, _FEW_STEPS = 3, 5


def _few(draw: Draw, **sizes: Any) -> dict[str, Any]:
    """The same kind for an interpreter."""
    few = min(sizes.get("iters", 20), _FEW_STEPS)
    if sizes.get("gap", 0.4) == 0.4:
        sizes["gap"] = 0.4 * few / 20
    arguments = descent_arguments(draw, **sizes | {"iters": few, "taken": min(sizes.get("taken", 0), few)})
    rows = slice(0, _FEW_ROWS)
    if arguments["group"] is not None:
        rows = slice(0, _FEW_ROWS + 1)  # the first group has two of them
        arguments["group"] = arguments["group"][rows]
    return rows_of(arguments, rows)


def descent_cases(**more: Any) -> list[Case]:
    """The cases of logits, or of latents if ``hidden`` is their width."""
    return [_case(name, sizes | more) for name, sizes in _DESCENTS.items()]


def _case(name: str, sizes: dict[str, Any]) -> Case:
    """A hundred steps stay a hundred, and slow."""
    many = sizes.get("iters", 20) > 20
    make = partial(descent_arguments, **sizes)
    return Case(name, make, sizes["vocabulary"] == WHOLE, many, None if many else partial(_few, **sizes))


# -- overlaps ----------------------------------------------------------------------------------------


class DescentOverlaps(OnBackend):
    """Tensors that a descent changes may share memory with nothing, but may be parts of one matrix."""

    op: ClassVar[Op]
    hidden: ClassVar[int] = 0

    def arguments(self, draw: Draw) -> dict[str, Any]:
        arguments = descent_arguments(draw, rows=3, vocabulary=9, iters=2, hidden=self.hidden)
        return to_device(home(self.backend), arguments)

    def refused(self, arguments: dict[str, Any], *parts: str) -> None:
        with use_backend(self.backend), pytest.raises(InputError) as error:
            self.op(**arguments)
        assert all(part in str(error.value) for part in (self.op.name, "changed in place", *parts))

    def test_overlaps_are_refused(self, draw: Draw):
        arguments = self.arguments(draw)
        name = "h" if self.hidden else "z"
        parameter, state = arguments[name], arguments["state"]
        before = parameter.clone()
        self.refused(arguments | {"state": state._replace(exp_avg=parameter)}, name, "state.exp_avg")
        same = state._replace(exp_avg_sq=state.exp_avg)
        self.refused(arguments | {"state": same}, "state.exp_avg", "state.exp_avg_sq")
        self.refused(arguments | {"until": state.step}, "state.step", "until")
        repeated = parameter[:1].expand(3, -1)
        self.refused(arguments | {name: repeated}, name, "elements of it overlap")
        shifted = torch.cat([parameter, parameter]).flatten()
        size = parameter.numel()
        moved = shifted[parameter.shape[1] :][:size].view_as(parameter)
        shared = state._replace(exp_avg=moved)
        self.refused(arguments | {name: shifted[:size].view_as(parameter), "state": shared}, name)
        assert torch.equal(parameter, before)

    def test_parts_of_one_matrix_are_taken(self, draw: Draw):
        arguments = self.arguments(draw)
        name = "h" if self.hidden else "z"
        parameter, state = arguments[name], arguments["state"]
        columns = torch.cat([parameter, state.exp_avg, state.exp_avg_sq], dim=1)
        parts = columns.split(parameter.shape[1], dim=1)
        beside = {name: parts[0], "state": AdamState(parts[1], parts[2], state.step.clone())}
        with use_backend(self.backend):
            found = self.op(**(arguments | beside))
            wanted = self.op(**arguments)
        assert torch.equal(found.token, wanted.token)
        # A library's product may sum in another order where rows lie apart.
        torch.testing.assert_close(parts[0], parameter)


# -- against Adam ------------------------------------------------------------------------------------

VOCABULARY, HIDDEN = 29, 7
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@dataclass
class Problem:
    """Rows to move, under a head or as logits."""

    parameter: Tensor
    grad: Tensor
    schedule: Tensor
    head: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.state = AdamState.zeros(self.parameter)

    def descend(self, grad: Tensor | None = None, rows: slice = slice(None), **options: Any) -> Descent:
        """The op on these rows, in place."""
        grad = self.grad if grad is None else grad
        op, head = (dto_descent, ()) if self.head is None else (dto_descent_latents, (self.head,))
        part = self.parameter[rows], *head, grad[rows], AdamState(*(t[rows] for t in self.state))
        schedule = self.schedule[rows] if self.schedule.ndim == 2 else self.schedule
        return op(*part, schedule, **self.options, **options)

    def run(self) -> AdamRun:
        """The reference from where the parameter is now."""
        options = dict(self.options)
        if key := options.get("noise"):
            options["noise"] = gumbel_noise(key, self.grad.shape[1])
        return AdamRun(self.parameter.clone(), self.schedule, head=self.head, **options)

    def copy(self) -> Problem:
        return Problem(self.parameter.clone(), self.grad, self.schedule, self.head, self.options)


def make(kind: str, draw: Draw, rows: int, iters: int, gap: float = 0.3, lr: float = 0.01, **options: Any):
    """A problem whose rows stand 0 to ``gap`` from a flip that the gradient pushes them to."""
    schedule = cosine_schedule(iters, lr, min_ratio=0.1)
    if kind == "logits":
        z = tight(draw, draw.logits(rows, VOCABULARY), gap).double()
        return Problem(z, against(z, draw.normal(rows, VOCABULARY, dtype=F64)), schedule, None, options)
    head = draw.normal(VOCABULARY, HIDDEN, dtype=F64)
    h = draw.normal(rows, HIDDEN, dtype=F64)
    return Problem(
        h, against(h @ head.T, draw.normal(rows, VOCABULARY, dtype=F64)), schedule, head, options
    )


def stops(problem: Problem, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """By the reference: how many steps each row takes, where it then is, and whether it flipped."""
    run = problem.run()
    first, token = run.parameter, run.tokens
    taken, where, flipped = torch.zeros_like(token), first, torch.zeros_like(token, dtype=torch.bool)
    for _ in range(steps):
        run.step(problem.grad)
        taken = taken + ~flipped
        where = torch.where(flipped[:, None], where, run.parameter)
        flipped = flipped | (run.tokens != token)
    return taken, where, flipped


class DescentAgainstAdam:
    """The descent of logits or of latents."""

    kind: ClassVar[str]

    @pytest.mark.parametrize("options", ["", "noise", "tau", "row schedules"])
    def test_step_by_step_against_adam(self, options: str, draw: Draw):
        problem = make(self.kind, draw, rows=5, iters=12)
        if options == "noise":
            problem.options = {"noise": draw.noise(5), "tau": 0.7}
        elif options == "tau":
            problem.options = {"tau": 3.0}
        elif options == "row schedules":
            problem.schedule = problem.schedule * (1 + draw.uniform(5, 1).double())
        reference = problem.run()
        for step in range(12):
            token = reference.tokens
            reference.step(problem.grad)
            until = torch.full((5,), step + 1)
            descent = problem.descend(until=until)
            torch.testing.assert_close(problem.parameter, reference.parameter, **EXACT)
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(getattr(problem.state, name), reference.moments(name), **EXACT)
            assert torch.equal(problem.state.step, until)
            assert torch.equal(descent.token, reference.tokens)
            assert torch.equal(descent.flipped, reference.tokens != token)

    @pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
    @pytest.mark.parametrize("iters", [1, 20, 100])
    def test_stops_right_after_the_flip(self, noise: bool, iters: int, draw: Draw):
        problem = make(self.kind, draw, rows=40, iters=iters)
        if noise:
            problem.options = {"noise": draw.noise(40), "tau": 1.5}
        before = problem.run().tokens
        taken, where, flipped = stops(problem, iters)
        descent = problem.descend()
        assert torch.equal(problem.state.step, taken)
        assert torch.equal(descent.flipped, flipped)
        torch.testing.assert_close(problem.parameter, where, **EXACT)
        assert torch.equal(descent.token, problem.run().tokens)
        assert torch.equal(descent.token != before, flipped)

    def test_rows_together_equal_rows_by_themselves(self, draw: Draw):
        together = make(self.kind, draw, rows=9, iters=15)
        together.options = {"noise": draw.noise(9)}
        together.schedule = together.schedule * (1 + draw.uniform(9, 1).double())
        together.state = adam_state(draw, tuple(together.parameter.shape), 10, F64)
        until = draw.integers(0, 16, 9)
        alone = together.copy()
        alone.state = AdamState(*(tensor.clone() for tensor in together.state))
        noise = alone.options["noise"]
        descent = together.descend(until=until)
        for row in range(9):
            rows = slice(row, row + 1)
            alone.options = {"noise": type(noise)(noise.seed[rows], noise.position[rows])}
            one = alone.descend(rows=rows, until=until[rows])
            assert int(one.token) == int(descent.token[row])
            assert bool(one.flipped) == bool(descent.flipped[row])
        assert torch.equal(alone.state.step, together.state.step)
        assert len(set(together.state.step.tolist())) > 1
        torch.testing.assert_close(alone.parameter, together.parameter, **EXACT)
        torch.testing.assert_close(alone.state, together.state, **EXACT)

    def test_group_stops_at_its_earliest_flip(self, draw: Draw):
        problem = make(self.kind, draw, rows=12, iters=20)
        group = torch.tensor([0, 3, 1] * 4)  # no group 2
        taken, _, flipped = stops(problem, 20)
        first = torch.stack([taken[group == g].amin() for g in group.tolist()])
        reference, history = problem.run(), []
        for _ in range(20):
            history.append(reference.parameter)
            reference.step(problem.grad)
        history.append(reference.parameter)

        descent = problem.descend(group=group)
        assert torch.equal(problem.state.step, first)
        assert torch.equal(descent.flipped, flipped & (taken == first))
        for row, steps in enumerate(first.tolist()):
            torch.testing.assert_close(problem.parameter[row], history[steps][row], **EXACT)

    def test_until_stops_before_and_goes_on_after(self, draw: Draw):
        problem = make(self.kind, draw, rows=8, iters=20, gap=0.6)
        whole = problem.copy()
        whole_descent = whole.descend()
        until = draw.integers(0, 20, 8)
        first = problem.descend(until=until)
        assert (problem.state.step <= until).all()
        assert torch.equal(problem.state.step, torch.minimum(until, whole.state.step))
        going = ~first.flipped
        # A row that has flipped waits for its new gradient; the others go on as if never interrupted.
        rest = problem.descend(until=torch.where(going, 20, 0))
        assert torch.equal(problem.state.step, whole.state.step)
        assert torch.equal(rest.flipped | first.flipped, whole_descent.flipped)
        torch.testing.assert_close(problem.parameter, whole.parameter, **EXACT)

    def test_a_new_gradient_after_each_flip_equals_one_run(self, draw: Draw):
        rows, iters = 6, 40
        problem = make(self.kind, draw, rows, iters, gap=0.1, lr=0.05)
        towards = draw.normal(VOCABULARY, VOCABULARY, dtype=F64)

        def gradient(tokens: Tensor) -> Tensor:
            # Away from the token that is ahead, so that flips follow each other.
            return towards[tokens] + 3 * torch.nn.functional.one_hot(tokens, VOCABULARY)

        reference, flips = problem.run(), 0
        for _ in range(iters):
            before = reference.tokens
            reference.step(gradient(before))
            flips += int((reference.tokens != before).sum())

        tokens = problem.run().tokens
        while (problem.state.step < iters).any():
            tokens = problem.descend(gradient(tokens)).token
        assert flips > rows
        torch.testing.assert_close(problem.parameter, reference.parameter, rtol=1e-7, atol=1e-9)
        assert torch.equal(tokens, reference.tokens)

    @pytest.mark.parametrize("dtype", [BF16, F16])
    def test_half_precision_parameter_is_refused(self, dtype: torch.dtype, draw: Draw):
        problem = make(self.kind, draw, rows=2, iters=3)
        problem.parameter = problem.parameter.to(dtype)
        problem.state = AdamState.zeros(problem.parameter)
        with pytest.raises(InputError, match="must be float32 or float64") as error:
            problem.descend()
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("field_name", ["exp_avg", "exp_avg_sq"])
    def test_half_precision_state_is_refused(self, field_name: str, draw: Draw):
        problem = make(self.kind, draw, rows=2, iters=3)
        problem.state = problem.state._replace(
            **{field_name: getattr(problem.state, field_name).bfloat16()}
        )
        with pytest.raises(InputError, match=f"state.{field_name} must be float64") as error:
            problem.descend()
        assert "\n" not in str(error.value)

    def test_float32_follows_float64(self, draw: Draw):
        exact = make(self.kind, draw, rows=20, iters=100, gap=2.0)
        exact.parameter = exact.parameter.float().double()
        single = exact.copy()
        single.parameter, single.grad = exact.parameter.float(), exact.grad.float()
        single.state = AdamState.zeros(single.parameter)
        exact.grad = single.grad.double()
        exact.descend()
        single.descend()
        same = single.state.step == exact.state.step
        assert same.sum() >= 19
        torch.testing.assert_close(
            single.parameter[same].double(),
            exact.parameter[same],
            rtol=1e-5,
            atol=2e-5 if self.kind == "logits" else 1e-4,
        )

    def test_nothing_left_to_do_changes_nothing(self, draw: Draw):
        problem = make(self.kind, draw, rows=4, iters=6)
        problem.state.step.fill_(6)
        before = problem.copy()
        tokens = problem.run().tokens
        descent = problem.descend()
        assert torch.equal(problem.parameter, before.parameter)
        assert torch.equal(descent.token, tokens)
        assert not descent.flipped.any()

    @pytest.mark.parametrize("group", [False, True], ids=["", "group"])
    def test_no_rows(self, group: bool, draw: Draw):
        problem = make(self.kind, draw, rows=0, iters=3)
        options = {"group": torch.zeros(0, dtype=torch.int64)} if group else {}
        descent = problem.descend(**options)
        assert descent.token.shape == descent.flipped.shape == (0,)

    def test_grad_may_be_of_another_dtype(self, draw: Draw):
        problem = make(self.kind, draw, rows=3, iters=5)
        other = problem.copy()
        problem.descend(problem.grad.bfloat16())
        other.descend(problem.grad.bfloat16().double())
        assert torch.equal(problem.parameter, other.parameter)

    def test_moves_where_the_memory_is(self, draw: Draw):
        # A row of a larger tensor, as the decoder passes it.
        problem = make(self.kind, draw, rows=4, iters=5)
        whole = problem.copy()
        whole.descend()
        for row in range(4):
            problem.descend(rows=slice(row, row + 1))
        torch.testing.assert_close(problem.parameter, whole.parameter, **EXACT)
