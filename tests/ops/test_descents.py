"""dto_descent and dto_descent_latents against torch.optim.Adam, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
)

from .cases import BF16, F16, F32, F64, Draw, adam_state, against, tight
from .reference import AdamRun

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


KINDS = pytest.mark.parametrize("kind", ["logits", "latents"])


@KINDS
@pytest.mark.parametrize("options", ["", "noise", "tau", "row schedules"])
def test_step_by_step_against_adam(kind: str, options: str, draw: Draw):
    problem = make(kind, draw, rows=5, iters=12)
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


@KINDS
@pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
@pytest.mark.parametrize("iters", [1, 20, 100])
def test_stops_right_after_the_flip(kind: str, noise: bool, iters: int, draw: Draw):
    problem = make(kind, draw, rows=40, iters=iters)
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


def test_flips_at_the_first_step_at_the_last_and_never(draw: Draw):
    # Two equally likely tokens pushed apart by 2·lr a step, from gaps that reach from 0 past the end.
    iters, lr, rows = 20, 0.01, 400
    gap = torch.linspace(1e-4, 0.5, rows, dtype=F64)
    z = torch.stack([gap, torch.zeros_like(gap)], dim=1)
    grad = torch.tensor([[1.0, -1.0]], dtype=F64).expand(rows, 2).contiguous()
    problem = Problem(z, grad, torch.full((iters,), lr, dtype=F64))
    taken, where, flipped = stops(problem, iters)
    assert {1, iters} <= set(taken[flipped].tolist())
    assert not flipped.all()
    descent = problem.descend()
    assert torch.equal(problem.state.step, taken)
    assert torch.equal(descent.flipped, flipped)
    assert torch.equal(descent.token, flipped.long())
    torch.testing.assert_close(problem.parameter, where, **EXACT)


@KINDS
def test_rows_together_equal_rows_by_themselves(kind: str, draw: Draw):
    together = make(kind, draw, rows=9, iters=15)
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


@KINDS
def test_group_stops_at_its_earliest_flip(kind: str, draw: Draw):
    problem = make(kind, draw, rows=12, iters=20)
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


@KINDS
def test_until_stops_before_and_goes_on_after(kind: str, draw: Draw):
    problem = make(kind, draw, rows=8, iters=20, gap=0.6)
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


@KINDS
def test_a_new_gradient_after_each_flip_equals_one_run(kind: str, draw: Draw):
    rows, iters = 6, 40
    problem = make(kind, draw, rows, iters, gap=0.1, lr=0.05)
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


@pytest.mark.parametrize("dtype", [F32, F64])
def test_masked_logits_stay_masked_and_take_no_step(dtype: torch.dtype, draw: Draw):
    z = draw.logits(6, VOCABULARY, dtype, masked=0.5)
    masked = z == -torch.inf
    grad = draw.normal(6, VOCABULARY, dtype=dtype).masked_fill(masked, torch.inf)
    state, before = AdamState.zeros(z), z.clone()
    dto_descent(z, grad, state, cosine_schedule(10, 0.01))
    assert masked.any()
    assert torch.equal(z == -torch.inf, masked)
    assert (state.exp_avg[masked] == 0).all()
    assert (state.exp_avg_sq[masked] == 0).all()
    assert z[~masked].isfinite().all()
    assert (z[~masked] != before[~masked]).any()


@pytest.mark.parametrize("dtype", [BF16, F16])
@KINDS
def test_half_precision_parameter_is_refused(kind: str, dtype: torch.dtype, draw: Draw):
    problem = make(kind, draw, rows=2, iters=3)
    problem.parameter = problem.parameter.to(dtype)
    problem.state = AdamState.zeros(problem.parameter)
    with pytest.raises(InputError, match="must be float32 or float64") as error:
        problem.descend()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field_name", ["exp_avg", "exp_avg_sq"])
@KINDS
def test_half_precision_state_is_refused(kind: str, field_name: str, draw: Draw):
    problem = make(kind, draw, rows=2, iters=3)
    problem.state = problem.state._replace(**{field_name: getattr(problem.state, field_name).bfloat16()})
    with pytest.raises(InputError, match=f"state.{field_name} must be torch.float64") as error:
        problem.descend()
    assert "\n" not in str(error.value)


def test_a_small_step_on_a_large_logit():
    # Adam's first step is lr whatever the gradient; bfloat16 has 1/8 between neighbours at 20.
    z = torch.tensor([[20.0, 19.0]])
    dto_descent(z, torch.tensor([[1.0, -1.0]]), AdamState.zeros(z), torch.tensor([0.01], dtype=F64))
    assert float(z[0, 0]) == pytest.approx(19.99, abs=1e-5)
    assert float(torch.tensor(20.0, dtype=BF16) - 0.01) == 20.0


@KINDS
def test_float32_follows_float64(kind: str, draw: Draw):
    exact = make(kind, draw, rows=20, iters=100, gap=2.0)
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
        atol=2e-5 if kind == "logits" else 1e-4,
    )


@KINDS
def test_nothing_left_to_do_changes_nothing(kind: str, draw: Draw):
    problem = make(kind, draw, rows=4, iters=6)
    problem.state.step.fill_(6)
    before = problem.copy()
    tokens = problem.run().tokens
    descent = problem.descend()
    assert torch.equal(problem.parameter, before.parameter)
    assert torch.equal(descent.token, tokens)
    assert not descent.flipped.any()


@KINDS
@pytest.mark.parametrize("group", [False, True], ids=["", "group"])
def test_no_rows(kind: str, group: bool, draw: Draw):
    problem = make(kind, draw, rows=0, iters=3)
    options = {"group": torch.zeros(0, dtype=torch.int64)} if group else {}
    descent = problem.descend(**options)
    assert descent.token.shape == descent.flipped.shape == (0,)


@KINDS
def test_grad_may_be_of_another_dtype(kind: str, draw: Draw):
    problem = make(kind, draw, rows=3, iters=5)
    other = problem.copy()
    problem.descend(problem.grad.bfloat16())
    other.descend(problem.grad.bfloat16().double())
    assert torch.equal(problem.parameter, other.parameter)


@KINDS
def test_moves_where_the_memory_is(kind: str, draw: Draw):
    # A row of a larger tensor, as the decoder passes it.
    problem = make(kind, draw, rows=4, iters=5)
    whole = problem.copy()
    whole.descend()
    for row in range(4):
        problem.descend(rows=slice(row, row + 1))
    torch.testing.assert_close(problem.parameter, whole.parameter, **EXACT)
