"""Adam steps on rows of logits under a constant one-hot gradient, until a hard token moves.

A launch takes one step of every row. A row is shared by the programs of its slices: each joins the
sums that the launch before has left of all slices, in a fixed order, and so finds by itself what the
row's token is and whether the row goes on; then it moves its own slice and leaves the sums for the
next launch. Sums and what is known of a row alternate between two places, since other programs may
still read what the launch before has left. Rows that are done return at once.

Nothing waits for the host, and the launches are the same whatever the data: they can be captured in
a CUDA graph. Where the GPU can, a launch starts while the one before still runs, and waits before it
reads or writes anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import presets
from .common.adam import NEVER, adam_step, load_rates, store_corrections, store_team
from .common.exponential import exp_base, tempered_exp
from .common.gumbel import gumbel_noise
from .common.lanes import load_tiles, store_tiles, vector, warps
from .common.launch import launched, repeated
from .common.row_sums import FIELDS, finite_grads, joined_slices, joined_sums, store_sums
from .common.sizes import cdiv

TILE = 2048  # tokens of a slice; results depend on it
_THREADS = 128  # of a slice's program
# A row's record: its token, steps taken in this call, and flags; a bad row's code stands
# above the flags.
_RECORD = tl.constexpr(3)
_DONE, _FLIPPED = tl.constexpr(1), tl.constexpr(2)
_STATUS_SHIFT = tl.constexpr(2)


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
def _perturbed(tiles, noises):
    """y = z + g of tiles, or z where there is no noise."""
    sums = tiles
    if noises is not None:
        sums = ()
        for t in tl.static_range(len(tiles)):
            sums += (tiles[t] + noises[t],)
    return sums


@launched
@triton.jit(do_not_specialize=["rows", "slices", "iters"])
def _survey_kernel(
    z_ptr,  # [rows, V] float32
    grad_ptr,  # [rows, V]
    noise_ptr,  # [rows, V] float32, or None
    group_ptr,  # [rows] int64, or None
    team_ptr,  # [rows] int32, or None
    stopped_ptr,  # [rows] int32 by team, or None
    corrections_ptr,  # [2, K] float64
    sums_ptr,  # [2, rows, FIELDS, slices] float32
    vocabulary,
    rows,
    slices,
    iters,
    z_stride,
    grad_stride,
    base,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The sums before the first step, and what does not change from step to step."""
    row = (tl.program_id(0) // slices).to(tl.int64)
    slice = tl.program_id(0) % slices
    if slice == 0:
        if group_ptr is not None:
            store_team(group_ptr, team_ptr, stopped_ptr, row, rows)
        if row == 0:
            store_corrections(corrections_ptr, iters)
    start = slice * (LANES * TILES)
    z = load_tiles(z_ptr + row * z_stride, 1, start, vocabulary, -float("inf"), LANES, TILES, True)
    noise = None
    if noise_ptr is not None:
        noise = load_tiles(noise_ptr + row * vocabulary, 1, start, vocabulary, 0.0, LANES, TILES, True)
    grad_ptr += row * grad_stride
    grad = load_tiles(grad_ptr, 1, start, vocabulary, 0.0, LANES, TILES, True)
    sums_ptr = row_sums(sums_ptr, row, rows, slices, 0)
    store_sums(sums_ptr, slices, slice, _perturbed(z, noise), grad, grad_ptr, base, VECTOR)


@triton.jit
def _step_slice(
    z_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    noise_ptr,
    step_ptr,
    until_ptr,
    schedule_ptr,
    corrections_ptr,
    team_ptr,
    stopped_ptr,
    sums_ptr,
    records_ptr,
    vocabulary,
    rows,
    slices,
    turn,
    iters,
    schedule_stride,
    base,
    row,
    slice,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    SLICES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The step of a slice; arrays at its row."""
    before, taken, flags = load_record(records_ptr, row, rows, turn)
    start = slice * (LANES * TILES)
    # A row that is not done mostly moves: what that takes is on its way while the sums are joined.
    going = flags == 0
    z = load_tiles(z_ptr, 1, start, vocabulary, -float("inf"), LANES, TILES, MASKED, going)
    first = load_tiles(first_ptr, 1, start, vocabulary, 0.0, LANES, TILES, MASKED, going)
    second = load_tiles(second_ptr, 1, start, vocabulary, 0.0, LANES, TILES, MASKED, going)
    grad = load_tiles(grad_ptr, 1, start, vocabulary, 0.0, LANES, TILES, MASKED, going)
    noise = None
    if noise_ptr is not None:
        noise = load_tiles(noise_ptr, 1, start, vocabulary, 0.0, LANES, TILES, MASKED, going)
    y = _perturbed(z, noise)
    before_ptr = row_sums(sums_ptr, row, rows, slices, turn + 1)
    finite = finite_grads(before_ptr, slices, slice)
    token, top, grad_token, weight, mean, status = joined_sums(before_ptr, slices, base, SLICES)
    step = tl.load(step_ptr + row) + taken
    rate, scale = load_rates(schedule_ptr, schedule_stride, corrections_ptr, step, iters)
    left = iters - step
    if until_ptr is not None:
        left = tl.minimum(tl.load(until_ptr + row) - step, left)
    moves = False
    if going:
        flags = verdict(before, token, flags, status, turn)
        if left <= 0:
            flags |= _DONE
        if stopped_ptr is not None:
            flags |= (tl.load(stopped_ptr + tl.load(team_ptr + row)) < NEVER).to(tl.int32)
        moves = flags == 0
    else:
        token = before
    if slice == 0:
        store_record(records_ptr, row, rows, turn, token, taken + moves.to(tl.int32), flags)
    if moves:
        # G may be infinite where p is 0; a mean that is no number spoils the whole row.
        met = grad
        if finite == 0:
            kept = ()
            for t in tl.static_range(TILES):
                kept += (tl.where(tempered_exp(y[t] - top, base) > 0, grad[t], grad_token),)
            met = kept
        new_z, new_first, new_second = (), (), ()
        for t in tl.static_range(TILES):
            e = tempered_exp(y[t] - top, base)
            centred = met[t] - grad_token - mean
            moved, one, two = adam_step(z[t], e * weight * centred, first[t], second[t], rate, scale)
            if MASKED:
                inside = start + t * LANES + tl.arange(0, LANES) < vocabulary
                moved = tl.where(inside, moved, -float("inf"))
            new_z += (moved,)
            new_first += (one,)
            new_second += (two,)
        store_tiles(z_ptr, start, vocabulary, new_z, MASKED)
        store_tiles(first_ptr, start, vocabulary, new_first, MASKED)
        store_tiles(second_ptr, start, vocabulary, new_second, MASKED)
        own = row_sums(sums_ptr, row, rows, slices, turn)
        store_sums(own, slices, slice, _perturbed(new_z, noise), grad, grad_ptr, base, VECTOR)


@launched
@triton.jit(do_not_specialize=["turn", "iters", "rows", "slices"])
def _step_kernel(
    z_ptr,  # [rows, V] float32, in place
    grad_ptr,  # [rows, V]
    first_ptr,  # [rows, V] float32, in place
    second_ptr,  # [rows, V] float32, in place
    noise_ptr,  # [rows, V] float32, or None
    step_ptr,  # [rows] int64
    until_ptr,  # [rows] int64, or None
    schedule_ptr,  # [rows or 1, K] float64
    corrections_ptr,  # [2, K] float64
    team_ptr,  # [rows] int32, or None
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
    schedule_row_stride,
    schedule_stride,
    base,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    SLICES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Launch ``turn`` ≥ 1: its step of every row that goes on.

    EARLY: it is launched before the one ahead has ended. That one has waited for those before it.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = (tl.program_id(0) // slices).to(tl.int64)
    slice = tl.program_id(0) % slices
    if noise_ptr is not None:
        noise_ptr += row * vocabulary
    z_ptr += row * z_stride
    grad_ptr += row * grad_stride
    first_ptr += row * first_stride
    second_ptr += row * second_stride
    schedule_ptr += row * schedule_row_stride
    # A mask costs every element; the last slice alone has one.
    if (slice + 1) * (LANES * TILES) <= vocabulary:
        _step_slice(
            z_ptr,
            grad_ptr,
            first_ptr,
            second_ptr,
            noise_ptr,
            step_ptr,
            until_ptr,
            schedule_ptr,
            corrections_ptr,
            team_ptr,
            stopped_ptr,
            sums_ptr,
            records_ptr,
            vocabulary,
            rows,
            slices,
            turn,
            iters,
            schedule_stride,
            base,
            row,
            slice,
            LANES,
            TILES,
            VECTOR,
            SLICES,
            False,
        )
    else:
        _step_slice(
            z_ptr,
            grad_ptr,
            first_ptr,
            second_ptr,
            noise_ptr,
            step_ptr,
            until_ptr,
            schedule_ptr,
            corrections_ptr,
            team_ptr,
            stopped_ptr,
            sums_ptr,
            records_ptr,
            vocabulary,
            rows,
            slices,
            turn,
            iters,
            schedule_stride,
            base,
            row,
            slice,
            LANES,
            TILES,
            VECTOR,
            SLICES,
            True,
        )


@launched
@triton.jit(do_not_specialize=["turn", "rows", "slices"])
def _team_kernel(
    team_ptr,  # [rows] int32
    stopped_ptr,  # [rows] int32 by team
    sums_ptr,  # [2, rows, FIELDS, slices] float32
    records_ptr,  # [2, rows, 3] int32
    rows,
    slices,
    turn,
    base,
    SLICES: tl.constexpr,
):
    """Before launch ``turn``: the teams of rows whose token moved in the step before are stopped."""
    row = tl.program_id(0).to(tl.int64)
    before, _taken, flags = load_record(records_ptr, row, rows, turn)
    if flags == 0:
        token, _top, _grad, _weight, _mean, _status = joined_sums(
            row_sums(sums_ptr, row, rows, slices, turn + 1), slices, base, SLICES
        )
        if token != before:
            tl.store(stopped_ptr + tl.load(team_ptr + row), turn)


@launched
@triton.jit(do_not_specialize=["turn", "rows", "slices"])
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
    base,
    SLICES: tl.constexpr,
):
    """After the last step: what became of each row."""
    row = tl.program_id(0).to(tl.int64)
    token, taken, flags = load_record(records_ptr, row, rows, turn)
    if flags == 0:
        before = token
        token, _top, _grad, _weight, _mean, status = joined_sums(
            row_sums(sums_ptr, row, rows, slices, turn + 1), slices, base, SLICES
        )
        flags = verdict(before, token, flags, status, turn)
    tl.store(step_ptr + row, tl.load(step_ptr + row) + taken)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(flipped_ptr + row, (flags & _FLIPPED) != 0)
    tl.store(status_ptr + row, flags >> _STATUS_SHIFT)


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
    slices = cdiv(vocabulary, TILE)
    token, flipped = torch.empty_like(step), torch.empty(rows, dtype=torch.bool, device=z.device)
    status = torch.empty(rows, dtype=torch.int32, device=z.device)
    if rows == 0:
        return token, flipped, status
    until = None if until is None else until.contiguous()
    group = None if group is None else group.contiguous()
    noises = None if noise is None else gumbel_noise(*noise, vocabulary, torch.float32)
    # Rows of a group meet after every step, wherever they stand.
    most = rows if group is not None else min(rows, rows_at_once(z, 4 if noise is None else 5))
    sums = torch.empty(2 * most * FIELDS.value * slices, dtype=torch.float32, device=z.device)
    corrections = torch.empty(2, iters, dtype=torch.float64, device=z.device)
    marks = torch.empty(2 * _RECORD.value + 2, most, dtype=torch.int32, device=z.device)
    records, team, stopped = marks[2:], None, None
    if group is not None:
        team, stopped = marks[:2]
    # What a compiler would contract is written as fma: it must not choose, by what surrounds it.
    base, options = exp_base(tau), {"enable_fp_fusion": False}
    joined = {"SLICES": joined_slices(slices)}
    alone = joined | options | {"num_warps": 1}
    width = vector(z.element_size())
    lanes = {"LANES": _THREADS * width, "TILES": TILE // (_THREADS * width), "VECTOR": width}
    lanes |= options | {"num_warps": warps(_THREADS)}
    early = presets.starts_early(z.device)
    overlapping = {"EARLY": early} | ({"launch_pdl": True} if early else {})

    with torch.cuda.device_of(z):
        for start in range(0, rows, most):
            part = slice(start, min(start + most, rows))
            n = part.stop - part.start
            own_z, own_grad, own_step = z[part], grad[part], step[part]
            own_noise = None if noises is None else noises[part]
            arrays = (own_z, own_grad, exp_avg[part], exp_avg_sq[part], own_noise)
            limits = (own_step, None if until is None else until[part])
            by_row = schedule.ndim == 2
            own_schedule = schedule[part] if by_row else schedule
            strides = [array.stride(0) for array in arrays[:4]]
            _survey_kernel[(n * slices,)](
                own_z,
                own_grad,
                own_noise,
                group,
                team,
                stopped,
                corrections,
                sums,
                vocabulary,
                n,
                slices,
                iters,
                *strides[:2],
                base,
                **lanes,
            )
            step_rows = repeated(
                _step_kernel,
                (n * slices,),
                "turn",
                *arrays,
                *limits,
                own_schedule,
                corrections,
                team,
                stopped,
                sums,
                records,
                vocabulary,
                n,
                slices,
                turn=1,
                iters=iters,
                z_stride=strides[0],
                grad_stride=strides[1],
                first_stride=strides[2],
                second_stride=strides[3],
                schedule_row_stride=schedule.stride(0) if by_row else 0,
                schedule_stride=schedule.stride(-1),
                base=base,
                **joined,
                **lanes,
                **overlapping,
            )
            stop_teams = repeated(
                _team_kernel,
                (n,),
                "turn",
                team,
                stopped,
                sums,
                records,
                n,
                slices,
                turn=1,
                base=base,
                **alone,
            )
            for turn in range(1, iters + 1):
                if team is not None and turn > 1:
                    stop_teams(turn)
                step_rows(turn)
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
                base,
                **alone,
            )
    return token, flipped, status
