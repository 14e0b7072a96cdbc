"""Adam steps on rows of logits under a constant one-hot gradient, until a hard token moves.

A launch takes one step of every row. A row is shared by the programs of its slices: each joins the
sums that the launch before has left of all slices, in a fixed order, and so finds by itself what the
row's token is and whether the row goes on; then it moves its own slice and leaves the sums for the
next launch. Sums and what is known of a row alternate between two places, since other programs may
still read what the launch before has left. Rows that are done return at once.

Nothing waits for the host, and the launches are the same whatever the data: they can be captured in
a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.exponential import exp, inverse_parts, scaled
from .common.gumbel import gumbel_noise
from .common.row_sums import FIELDS, joined_sums, store_sums

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
_SHARE1, _BETA2, _SHARE2, _EPSILON = (tl.constexpr(x) for x in (1 - BETA1, BETA2, 1 - BETA2, EPSILON))

TILE = 2048  # tokens of a slice; results depend on it
_WARPS = 16
# A row's record: its token, steps taken in this call, and flags; a bad row's code stands
# above the flags.
_RECORD = tl.constexpr(3)
_DONE, _FLIPPED = tl.constexpr(1), tl.constexpr(2)
_STATUS_SHIFT = tl.constexpr(2)


@triton.jit
def adam_step(parameter, gradient, first, second, rate, scale):
    """Kingma & Ba's step with bias correction; rate = lr/(1 − β₁ᵗ), scale = 1/√(1 − β₂ᵗ)."""
    first = first + _SHARE1 * (gradient - first)
    second = _BETA2 * second + _SHARE2 * gradient * gradient
    return parameter - rate * (first / (tl.sqrt(second) * scale + _EPSILON)), first, second


@triton.jit
def load_record(records_ptr, row, rows, turn):
    """(token, steps taken, flags) as the launch before has left them; before the first, (−1, 0, 0)."""
    at = records_ptr + (((turn + 1) % 2) * rows + row) * _RECORD
    begun = turn > 1
    token = tl.load(at, mask=begun, other=-1)
    return token, tl.load(at + 1, mask=begun, other=0), tl.load(at + 2, mask=begun, other=0)


@triton.jit
def store_record(records_ptr, row, rows, turn, token, taken, flags):
    at = records_ptr + ((turn % 2) * rows + row) * _RECORD
    tl.store(at, token)
    tl.store(at + 1, taken)
    tl.store(at + 2, flags)


@triton.jit
def row_sums(sums_ptr, row, rows, slices, turn):
    """Where the sums of a row lie that launch ``turn`` leaves."""
    return sums_ptr + ((turn % 2) * rows + row) * (FIELDS * slices)


@triton.jit
def verdict(before, token, flags, status, turn):
    """The flags of a row that has not been done, now that its sums are joined."""
    flipped = (turn > 1) & (token != before)
    bad = (turn == 1) & (status != 0)
    flags = tl.where(flipped, _DONE | _FLIPPED, flags)
    return tl.where(bad, _DONE | (status << _STATUS_SHIFT), flags)


@triton.jit
def steps_left(step_ptr, until_ptr, row, iters, taken):
    """Steps that the schedule and ``until`` leave to a row."""
    step = tl.load(step_ptr + row) + taken
    left = iters - step
    if until_ptr is not None:
        left = tl.minimum(tl.load(until_ptr + row) - step, left)
    return left


@triton.jit(do_not_specialize=["rows"])
def _survey_kernel(
    z_ptr,  # [rows, V] float32
    grad_ptr,  # [rows, V]
    noise_ptr,  # [rows, V] float32, or None
    sums_ptr,  # [2, rows, FIELDS, slices] float32
    vocabulary,
    rows,
    slices,
    z_stride,
    grad_stride,
    inverse,
    inverse_low,
    TILE: tl.constexpr,
):
    """The sums before the first step."""
    row = (tl.program_id(0) // slices).to(tl.int64)
    slice = tl.program_id(0) % slices
    columns = slice * TILE + tl.arange(0, TILE)
    there = columns < vocabulary
    y = tl.load(z_ptr + row * z_stride + columns, mask=there, other=-float("inf"))
    if noise_ptr is not None:
        y += tl.load(noise_ptr + row * vocabulary + columns, mask=there, other=0.0)
    grad_ptr += row * grad_stride
    grad = tl.load(grad_ptr + columns, mask=there, other=0.0).to(tl.float32)
    sums_ptr = row_sums(sums_ptr, row, rows, slices, 0)
    store_sums(sums_ptr, slices, slice, y, grad, grad_ptr, columns, inverse, inverse_low)


@triton.jit(do_not_specialize=["turn", "iters", "rows"])
def _step_kernel(
    z_ptr,  # [rows, V] float32, in place
    grad_ptr,  # [rows, V]
    first_ptr,  # [rows, V] float32, in place
    second_ptr,  # [rows, V] float32, in place
    noise_ptr,  # [rows, V] float32, or None
    step_ptr,  # [rows] int64
    until_ptr,  # [rows] int64, or None
    rates_ptr,  # [rows or 1, K] float32
    scales_ptr,  # [K] float32
    team_ptr,  # [rows] int64, or None
    stopped_ptr,  # [rows] int32 by team, or None
    sums_ptr,  # [2, rows, FIELDS, slices] float32
    records_ptr,  # [2, rows, 3] int32
    vocabulary,
    rows,
    slices,
    turn,
    iters,
    z_stride,
    grad_stride,
    first_stride,
    second_stride,
    rates_stride,
    inverse,
    inverse_low,
    TILE: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Launch ``turn`` ≥ 1: its step of every row that goes on."""
    row = (tl.program_id(0) // slices).to(tl.int64)
    slice = tl.program_id(0) % slices
    before, taken, flags = load_record(records_ptr, row, rows, turn)
    if flags != 0:
        if slice == 0:
            store_record(records_ptr, row, rows, turn, before, taken, flags)
    else:
        # A row that is not done mostly moves: what that takes is on its way while the sums are joined.
        columns = slice * TILE + tl.arange(0, TILE)
        there = columns < vocabulary
        z = tl.load(z_ptr + row * z_stride + columns, mask=there, other=-float("inf"))
        first = tl.load(first_ptr + row * first_stride + columns, mask=there, other=0.0)
        second = tl.load(second_ptr + row * second_stride + columns, mask=there, other=0.0)
        row_grad_ptr = grad_ptr + row * grad_stride
        grad = tl.load(row_grad_ptr + columns, mask=there, other=0.0).to(tl.float32)
        y = z
        if noise_ptr is not None:
            noise = tl.load(noise_ptr + row * vocabulary + columns, mask=there, other=0.0)
            y += noise
        token, top, grad_token, weight, mean, status = joined_sums(
            row_sums(sums_ptr, row, rows, slices, turn + 1), slices, inverse, inverse_low, SLICES
        )
        flags = verdict(before, token, flags, status, turn)
        if steps_left(step_ptr, until_ptr, row, iters, taken) <= 0:
            flags |= _DONE
        if stopped_ptr is not None:
            flags |= tl.load(stopped_ptr + tl.load(team_ptr + row))
        moves = flags == 0
        if slice == 0:
            store_record(records_ptr, row, rows, turn, token, taken + moves.to(tl.int32), flags)
        if moves:
            step = tl.load(step_ptr + row) + taken
            rate = tl.load(rates_ptr + row * rates_stride + step)
            scale = tl.load(scales_ptr + step)
            e = exp(scaled(y - top, inverse, inverse_low))
            # G may be infinite where p is 0; a mean that is no number spoils the whole row.
            centred = tl.where(e > 0, grad, grad_token) - grad_token - mean
            gradient = tl.where(e > 0, e * weight * centred, tl.where(mean == mean, 0.0, mean))
            z, first, second = adam_step(z, gradient, first, second, rate, scale)
            tl.store(z_ptr + row * z_stride + columns, z, mask=there)
            tl.store(first_ptr + row * first_stride + columns, first, mask=there)
            tl.store(second_ptr + row * second_stride + columns, second, mask=there)
            y = tl.where(there, z, -float("inf"))
            if noise_ptr is not None:
                y += noise
            own = row_sums(sums_ptr, row, rows, slices, turn)
            store_sums(own, slices, slice, y, grad, row_grad_ptr, columns, inverse, inverse_low)


@triton.jit(do_not_specialize=["turn", "rows"])
def _team_kernel(
    team_ptr,  # [rows] int64
    stopped_ptr,  # [rows] int32 by team
    sums_ptr,  # [2, rows, FIELDS, slices] float32
    records_ptr,  # [2, rows, 3] int32
    rows,
    slices,
    turn,
    inverse,
    inverse_low,
    SLICES: tl.constexpr,
):
    """Before launch ``turn``: the teams of rows whose token moved in the step before are stopped."""
    row = tl.program_id(0).to(tl.int64)
    before, _taken, flags = load_record(records_ptr, row, rows, turn)
    if flags == 0:
        token, _top, _grad, _weight, _mean, _status = joined_sums(
            row_sums(sums_ptr, row, rows, slices, turn + 1), slices, inverse, inverse_low, SLICES
        )
        if token != before:
            tl.store(stopped_ptr + tl.load(team_ptr + row), 1)


@triton.jit(do_not_specialize=["turn", "rows"])
def _finish_kernel(
    step_ptr,  # [rows] int64, in place
    token_ptr,  # [rows] int64
    flipped_ptr,  # [rows] bool
    status_ptr,  # [rows] int32
    sums_ptr,  # [2, rows, FIELDS, slices] float32
    records_ptr,  # [2, rows, 3] int32
    rows,
    slices,
    turn,
    inverse,
    inverse_low,
    SLICES: tl.constexpr,
):
    """After the last step: what became of each row."""
    row = tl.program_id(0).to(tl.int64)
    token, taken, flags = load_record(records_ptr, row, rows, turn)
    if flags == 0:
        before = token
        token, _top, _grad, _weight, _mean, status = joined_sums(
            row_sums(sums_ptr, row, rows, slices, turn + 1), slices, inverse, inverse_low, SLICES
        )
        flags = verdict(before, token, flags, status, turn)
    tl.store(step_ptr + row, tl.load(step_ptr + row) + taken)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(flipped_ptr + row, (flags & _FLIPPED) != 0)
    tl.store(status_ptr + row, flags >> _STATUS_SHIFT)


def adam_rates(schedule: Tensor) -> tuple[Tensor, Tensor]:
    """lr/(1 − β₁ᵗ) in float32, shaped as ``schedule`` [.., K], and 1/√(1 − β₂ᵗ) [K]."""
    count = torch.arange(1, schedule.shape[-1] + 1, dtype=torch.float64, device=schedule.device)
    return (schedule / (1 - BETA1**count)).float(), (1 - BETA2**count).rsqrt().float()


def teams_of(group: Tensor) -> Tensor:
    """The groups [N] numbered from 0 without gaps, without waiting for the device."""
    order = group.argsort(stable=True)
    ascending = group[order]
    number = torch.zeros_like(group)
    number[1:] = (ascending[1:] != ascending[:-1]).cumsum(0)
    return torch.empty_like(group).scatter_(0, order, number)


def rows_at_once(z: Tensor, arrays: int) -> int:
    """How many rows of ``arrays`` float32 arrays [V] stay in the device's L2 cache together."""
    if not z.is_cuda:
        return len(z)
    cache = torch.cuda.get_device_properties(z.device).L2_cache_size
    return max(1, int(0.75 * cache) // (4 * arrays * z.shape[1]))


def dto_descent(
    z: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    schedule: Tensor,
    *,
    until: Tensor | None,
    group: Tensor | None,
    tau: float,
    noise: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``nabla_fast.ops.dto_descent``, in place; a row with a status other than 0 stays as it is.

    Args:
        z: [N, V] float32.
        grad: [N, V] float32, bfloat16 or float16.
        exp_avg, exp_avg_sq: [N, V] float32; of these and the two above, neighbours in a row are
            neighbours in memory.
        step: [N] int64, contiguous.
        schedule: [K] or [N, K] float64.
        until, group: [N] int64, or None.
        tau: τ in [2⁻⁶⁴, 2⁶⁴].
        noise: seed [N] and position [N] int64, or None.
    Returns:
        token [N] int64, flipped [N] bool, status [N] int32.
    """
    (rows, vocabulary), iters = z.shape, schedule.shape[-1]
    slices = triton.cdiv(vocabulary, TILE)
    token, flipped = torch.empty_like(step), torch.empty(rows, dtype=torch.bool, device=z.device)
    status = torch.empty(rows, dtype=torch.int32, device=z.device)
    if rows == 0:
        return token, flipped, status
    until = None if until is None else until.contiguous()
    noises = None if noise is None else gumbel_noise(*noise, vocabulary, torch.float32)
    rates, scales = adam_rates(schedule)
    team = stopped = None
    if group is not None:
        team, stopped = teams_of(group), torch.zeros(rows, dtype=torch.int32, device=z.device)
    # Rows of a group meet after every step, wherever they stand.
    most = rows if group is not None else min(rows, rows_at_once(z, 4 if noise is None else 5))
    sums = torch.empty(2 * most * FIELDS.value * slices, dtype=torch.float32, device=z.device)
    records = torch.empty(2 * most * _RECORD.value, dtype=torch.int32, device=z.device)
    inverse = inverse_parts(tau)
    options = {"SLICES": triton.next_power_of_2(slices), "num_warps": 4}

    with torch.cuda.device_of(z):
        for start in range(0, rows, most):
            part = slice(start, min(start + most, rows))
            n = part.stop - part.start
            own_z, own_grad, own_step = z[part], grad[part], step[part]
            own_noise = None if noises is None else noises[part]
            arrays = (own_z, own_grad, exp_avg[part], exp_avg_sq[part], own_noise)
            limits = (own_step, None if until is None else until[part])
            own_rates = rates if rates.ndim == 1 else rates[part]
            strides = [array.stride(0) for array in arrays[:4]]
            _survey_kernel[(n * slices,)](
                own_z,
                own_grad,
                own_noise,
                sums,
                vocabulary,
                n,
                slices,
                *strides[:2],
                *inverse,
                TILE=TILE,
                num_warps=_WARPS,
            )
            for turn in range(1, iters + 1):
                if team is not None and turn > 1:
                    _team_kernel[(n,)](team, stopped, sums, records, n, slices, turn, *inverse, **options)
                _step_kernel[(n * slices,)](
                    *arrays,
                    *limits,
                    own_rates,
                    scales,
                    team,
                    stopped,
                    sums,
                    records,
                    vocabulary,
                    n,
                    slices,
                    turn,
                    iters,
                    *strides,
                    0 if rates.ndim == 1 else rates.stride(0),
                    *inverse,
                    TILE=TILE,
                    SLICES=options["SLICES"],
                    num_warps=_WARPS,
                )
            _finish_kernel[(n,)](
                own_step,
                token[part],
                flipped[part],
                status[part],
                sums,
                records,
                n,
                slices,
                iters + 1,
                *inverse,
                **options,
            )
    return token, flipped, status
