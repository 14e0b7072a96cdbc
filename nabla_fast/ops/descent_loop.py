"""Adam steps on rows until their hard token moves: the loop and the checks of both descents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.errors import InputError
from nabla_fast.ops.adam import AdamState, adam_step_
from nabla_fast.ops.checks import expect_noise, expect_tau
from nabla_fast.ops.rows import report


class Descent(NamedTuple):
    """Hard tokens of N rows after a descent, and whether its last step moved them."""

    token: Tensor  # [N] int64, the hard token now
    flipped: Tensor  # [N] bool, whether the last step taken moved it


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
    any_flipped = torch.zeros(int(group.max()) + 1, dtype=torch.bool, device=group.device)
    any_flipped[group[flipped]] = True
    return any_flipped[group]


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
    rows, columns = parameter.shape
    if parameter.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"{name}: the parameter must be float32 or float64, got {parameter.dtype}: "
            "a small step on a half-precision number rounds to nothing"
        )
    for field, tensor in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            raise InputError(
                f"{name}: state.{field} must be {parameter.dtype} [{rows}, {columns}], "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    for field, tensor in (("state.step", state.step), ("until", until), ("group", group)):
        if tensor is not None and (tensor.dtype != torch.int64 or tensor.shape != (rows,)):
            raise InputError(f"{name}: {field} must be int64 [{rows}]")
    if (
        schedule.dtype != torch.float64
        or schedule.ndim not in (1, 2)
        or schedule.shape[:-1] not in ((), (rows,))
    ):
        raise InputError(
            f"{name}: schedule must be float64 [K] or [{rows}, K], "
            f"got {schedule.dtype} {list(schedule.shape)}"
        )
    # Values on a device are not checked, as that would wait for it; kernels read nothing past the schedule.
    if rows > 0 and state.step.device.type == "cpu":
        if until is not None and int(until.max()) > schedule.shape[-1]:
            raise InputError(f"{name}: until exceeds the {schedule.shape[-1]} steps of the schedule")
        if group is not None and int(group.min()) < 0:
            raise InputError(f"{name}: group numbers must not be negative")
    expect_tau(name, tau)
    if noise is not None:
        expect_noise(name, noise, rows)


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
) -> Descent:
    """The descent by the C++ kernel of the op ``name``.

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
    )
    return reported(name, token, flipped, None if good else status)


def reported(name: str, token: Tensor, flipped: Tensor, status: Tensor | None) -> Descent:
    """A kernel's result, after its status [N] int32 is reported; None stands for rows that are all good."""
    if status is not None:
        report(name, status)
    return Descent(token, flipped)
