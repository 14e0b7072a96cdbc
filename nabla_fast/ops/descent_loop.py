"""Adam steps on rows until their hard token moves: the loop and the checks of both descents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.errors import InputError
from nabla_fast.ops.adam import AdamState, adam_step_
from nabla_fast.ops.checks import expect_tau
from nabla_fast.ops.gumbel_noise import NOISE_RULE
from nabla_fast.ops.registry import floats, integers, tensors
from nabla_fast.ops.registry.rules import Rule
from nabla_fast.ops.rows import report


class Descent(NamedTuple):
    """Hard tokens of N rows after a descent, and whether its last step moved them."""

    token: Tensor  # [N] int64, the hard token now
    flipped: Tensor  # [N] bool, whether the last step taken moved it


# A small step on a half-precision number rounds to nothing.
PARAMETER_DTYPES = torch.float32, torch.float64


def descent_rules(parameter: str, columns: str) -> dict[str, Rule]:
    """Rules of what a descent has beside its parameter [N, columns] and G."""
    moment = floats("N", columns, like=parameter)
    return {
        "state": {"exp_avg": moment, "exp_avg_sq": moment, "step": integers("N")},
        "schedule": tensors(("K",), ("N", "K"), dtypes=(torch.float64,)),
        "until": integers("N"),
        "group": integers("N"),
        "noise": NOISE_RULE,
    }


def descend(
    parameter: Tensor,
    state: AdamState,
    schedule: Tensor,
    until: Tensor | None,
    group: Tensor | None,
    gradient: Callable[[Tensor, Tensor | slice], Tensor],
    hard_token: Callable[[Tensor, Tensor | slice], Tensor],
) -> Descent:
    """Take Adam steps on rows of ``parameter`` [N, D] in place; arguments as in ``dto_descent``.

    Args:
        gradient: (parameter of some rows [n, D], which rows) → ∂ℒ/∂parameter [n, D].
        hard_token: likewise → [n] int64.
    """
    limit = torch.full_like(state.step, schedule.shape[-1]) if until is None else until
    token = hard_token(parameter, slice(None))
    flipped = torch.zeros_like(token, dtype=torch.bool)
    while True:
        active = (state.step < limit) & ~_spread(flipped, group)
        if not active.any():
            return Descent(token, flipped)
        # Indexing copies; the usual case, every row active, works on the tensors themselves.
        rows = slice(None) if active.all() else active.nonzero().flatten()
        part, moments = parameter[rows], AdamState(*(tensor[rows] for tensor in state))
        if schedule.ndim == 2:
            lr = schedule[rows].gather(1, moments.step[:, None]).squeeze(1)
        else:
            lr = schedule[moments.step]
        adam_step_(part, gradient(part, rows), moments, lr)
        moved = hard_token(part, rows)
        flipped[rows] = moved != token[rows]
        token[rows] = moved
        if not isinstance(rows, slice):
            parameter[rows] = part
            for tensor, new in zip(state, moments, strict=True):
                tensor[rows] = new


def _spread(flipped: Tensor, group: Tensor | None) -> Tensor:
    """True for each row of a group in which any row is True."""
    if group is None or not flipped.any():
        return flipped
    numbers, place = group.unique(return_inverse=True)  # a number may be any
    any_flipped = torch.zeros(len(numbers), dtype=torch.bool, device=group.device)
    any_flipped[place[flipped]] = True
    return any_flipped[place]


def check_descent(
    name: str,
    parameter: Tensor,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    until: Tensor | None,
    group: Tensor | None,
    tau: float,
    noise: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise InputError for arguments that no descent takes.

    Args:
        name: of the op, for the message.
        parameter: [N, D], z or h.
        grad, state, schedule, until, group, tau, noise: as in ``dto_descent``.
    """
    # Messages are written on failure alone: a descent of few tokens takes less time than to write them.
    rows = len(parameter)
    # Values on a device are not checked, as that would wait for it; kernels read nothing past the schedule.
    if rows > 0 and state.step.is_cpu:
        if int(state.step.min()) < 0:
            raise InputError(f"{name}: state.step must not be negative, got {int(state.step.min())}")
        if until is not None and int(until.max()) > schedule.shape[-1]:
            raise InputError(f"{name}: until exceeds the {schedule.shape[-1]} steps of the schedule")
        if group is not None and int(group.min()) < 0:
            raise InputError(f"{name}: group numbers must not be negative")
    expect_tau(name, tau)


def descend_native(
    name: str,
    parameter: Tensor,
    head: Tensor | None,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    until: Tensor | None,
    group: Tensor | None,
    tau: float,
    noise: tuple[Tensor, Tensor] | None,
    **fields: Any,
) -> Descent:
    """The descent by the C++ kernel of the op ``name``; it gets ``fields`` as they are.

    Raises:
        RowError: a row of z is bad; then nothing has changed.
        ValueError: a step is beyond the schedule, or what is changed overlaps something.
    """
    rows = len(parameter)
    token, flipped, status = (
        torch.empty(rows, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.bool, torch.int32)
    )
    seed, position = noise or (None, None)
    good = getattr(extension(), name)(
        num_threads=torch.get_num_threads(),
        rows=rows,
        vocab=grad.shape[1],
        parameter=parameter,
        exp_avg=state.exp_avg,
        exp_avg_sq=state.exp_avg_sq,
        step=state.step,
        head=head,
        grad=grad,
        schedule=schedule,
        iters=schedule.shape[-1],
        schedule_stride=schedule.stride(0) if schedule.ndim == 2 else 0,
        until=until,
        group=group,
        tau=tau,
        noise_seed=seed,
        noise_position=position,
        token=token,
        flipped=flipped,
        row_status=status,
        **fields,
    )
    return reported(name, token, flipped, None if good else status)


def reported(name: str, token: Tensor, flipped: Tensor, status: Tensor | None) -> Descent:
    """A kernel's result, after its status [N] int32 is reported; None stands for rows that are all good."""
    if status is not None:
        report(name, status)
    return Descent(token, flipped)
