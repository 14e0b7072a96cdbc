"""Adam steps on hidden states under a constant one-hot gradient, until a hard token moves.

A step is two products with the head, which all rows of the launch share: z = h·headᵀ, and then
Σ_v ∂ℒ/∂z[v] head[v], for which the softmax of the whole of z must be known. One pass that sums
Σ p (G − G[ŷ]) w and Σ p w beside z would read the head once and multiply half as much again; what it
sums, 2·H floats a row, has no room beside a tile of the head on chip.

Between the products stand small kernels: the sums of slices of z, their joining into the row's verdict,
and the step of h. Nothing waits for the host, and the launches are the same whatever the data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dto_descent import _DONE, _FLIPPED, _STATUS_SHIFT, adam_rates, adam_step, teams_of
from .exponential import exp, inverse_parts, scaled
from .gumbel import gumbel_noise
from .products import upcast
from .row_sums import FIELDS, joined_sums, store_sums

# Tiles do not depend on the number of rows, so that a row's result does not; by how _dot multiplies.
_LOGITS = {
    "half": {"ROWS": 16, "COLUMNS": 128, "DEPTH": 64, "num_warps": 4, "num_stages": 3},
    "float32": {"ROWS": 16, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2},
    # An interpreter's time goes by operations, not by their size.
    "interpreter": {"ROWS": 16, "COLUMNS": 1024, "DEPTH": 64},
}
_PULL = {
    "half": {"ROWS": 16, "COLUMNS": 64, "WIDTH": 128, "num_warps": 4, "num_stages": 2},
    "float32": {"ROWS": 16, "COLUMNS": 16, "WIDTH": 128, "num_warps": 4, "num_stages": 2},
    "interpreter": {"ROWS": 16, "COLUMNS": 1024, "WIDTH": 128},
}
_SPLIT = 4096  # tokens of a split of the second product, a multiple of its COLUMNS
_SLICE = 2048  # tokens of a slice of the sums
_PART = 1024  # of a row of h, for one program
_RECORD = tl.constexpr(3)  # of a row: token, steps taken, flags
# Of a row's next step: largest y, G[token], 1/(S τ), ⟨p, G⟩ − G[token], Adam's two factors.
_STEP_FIELDS = tl.constexpr(6)
_NEVER = 1 << 30  # when a team stops that has not


@triton.jit
def _moves(records_ptr, team_ptr, stopped_ptr, row, turn):
    """Whether rows take step ``turn``: not done, and of a team that goes on."""
    going = tl.load(records_ptr + row * _RECORD + 2) == 0
    if team_ptr is not None:
        going = going & (tl.load(stopped_ptr + tl.load(team_ptr + row)) > turn)
    return going


@triton.jit
def _dot(table, states, acc, UPCAST: tl.constexpr):
    """acc + table·states in float32, the many tokens or the width of the head first: the few rows of a
    launch fill no tensor core's longer side.

    Float32 states meet a bfloat16 table as three bfloat16 terms, which hold their 24 bits; the rest is
    float32 arithmetic, nothing rounded to tf32.

    Args:
        table: [M, K].
        states: [K, ROWS] float32.
        acc: [M, ROWS] float32.
        UPCAST: multiply in float32 anyhow, for the interpreter, whose bfloat16 arithmetic is wrong.
    """
    if table.dtype == tl.bfloat16 and not UPCAST:
        high = states.to(tl.bfloat16)
        rest = states - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        acc = tl.dot(table, (rest - middle.to(tl.float32)).to(tl.bfloat16), acc)
        acc = tl.dot(table, middle, acc)
        acc = tl.dot(table, high, acc)
    else:
        acc = tl.dot(table.to(tl.float32), states, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["turn", "rows"])
def _logits_kernel(
    h_ptr,  # [N, H] float32
    head_ptr,  # [V, H]
    z_ptr,  # [N, V] float32, contiguous
    records_ptr,
    team_ptr,
    stopped_ptr,
    rows,
    vocabulary,
    width,  # H
    tiles_of_rows,
    turn,
    h_stride,
    head_stride_v,
    head_stride_h,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """z of the rows that took step ``turn``; of all rows for turn 0."""
    # Programs that follow each other share a tile of the head.
    row = (tl.program_id(0) % tiles_of_rows * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (tl.program_id(0) // tiles_of_rows * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    within = tl.minimum(row, rows - 1)
    moves = _moves(records_ptr, team_ptr, stopped_ptr, within, turn).to(tl.int32)
    if tl.max(moves, axis=0) > 0:
        depth = tl.arange(0, DEPTH)
        states = h_ptr + within[None, :] * h_stride + depth[:, None]
        table = tl.minimum(token, vocabulary - 1)[:, None] * head_stride_v
        table = head_ptr + table + depth.to(tl.int64)[None, :] * head_stride_h
        acc = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
        for start in range(0, width, DEPTH):
            there = depth < width - start
            head = tl.load(table, mask=there[None, :], other=0.0)
            acc = _dot(head, tl.load(states, mask=there[:, None], other=0.0), acc, UPCAST)
            table += DEPTH * head_stride_h
            states += DEPTH
        at = z_ptr + row[None, :] * vocabulary + token[:, None]
        tl.store(at, acc, mask=(row < rows)[None, :] & (token < vocabulary)[:, None])


@triton.jit(do_not_specialize=["turn"])
def _survey_kernel(
    z_ptr,  # [N, V] float32, contiguous
    grad_ptr,  # [N, V]
    noise_ptr,  # [N, V] float32, contiguous, or None
    sums_ptr,  # [N, FIELDS, slices] float32
    records_ptr,
    team_ptr,
    stopped_ptr,
    vocabulary,
    slices,
    turn,
    grad_stride,
    inverse,
    inverse_low,
    TILE: tl.constexpr,
):
    """The sums of the slices of z."""
    row = (tl.program_id(0) // slices).to(tl.int64)
    slice = tl.program_id(0) % slices
    if _moves(records_ptr, team_ptr, stopped_ptr, row, turn):
        columns = slice * TILE + tl.arange(0, TILE)
        there = columns < vocabulary
        y = tl.load(z_ptr + row * vocabulary + columns, mask=there, other=-float("inf"))
        if noise_ptr is not None:
            y += tl.load(noise_ptr + row * vocabulary + columns, mask=there, other=0.0)
        grad_row = grad_ptr + row * grad_stride
        grad = tl.load(grad_row + columns, mask=there, other=0.0).to(tl.float32)
        at = sums_ptr + row * (FIELDS * slices)
        store_sums(at, slices, slice, y, grad, grad_row, columns, inverse, inverse_low)


@triton.jit(do_not_specialize=["turn", "iters"])
def _verdict_kernel(
    step_ptr,  # [N] int64
    until_ptr,  # [N] int64, or None
    rates_ptr,  # [N or 1, K] float32
    scales_ptr,  # [K] float32
    team_ptr,  # [N] int64, or None
    stopped_ptr,  # [N] int32 by team: the turn before whose step it stopped, or None
    sums_ptr,  # [N, FIELDS, slices] float32
    records_ptr,  # [N, 3] int32
    steps_ptr,  # [N, _STEP_FIELDS] float32
    slices,
    turn,
    iters,
    rates_stride,
    inverse,
    inverse_low,
    SLICES: tl.constexpr,
):
    """Before step ``turn``: what the step before it came to, and what this one needs."""
    row = tl.program_id(0).to(tl.int64)
    record = records_ptr + row * _RECORD
    flags = tl.load(record + 2)
    if flags == 0:
        before, taken = tl.load(record), tl.load(record + 1)
        took = turn > 1
        stopped = took & (turn < 0)
        if team_ptr is not None:
            # A team that stops in this very launch, by another row, has turn here: the same for us.
            stopped = tl.load(stopped_ptr + tl.load(team_ptr + row)) < turn
            took = took & (stopped == 0)
        taken += took
        token, top, grad, weight, mean, status = joined_sums(
            sums_ptr + row * (FIELDS * slices), slices, inverse, inverse_low, SLICES
        )
        if took & (token != before):
            flags = _DONE | _FLIPPED
            if team_ptr is not None:
                tl.store(stopped_ptr + tl.load(team_ptr + row), turn)
        if stopped:
            flags |= _DONE
        if (turn == 1) & (status != 0):
            flags = _DONE | (status << _STATUS_SHIFT)
        step = tl.load(step_ptr + row) + taken
        left = iters - step
        if until_ptr is not None:
            left = tl.minimum(left, tl.load(until_ptr + row) - step)
        if left <= 0:
            flags |= _DONE
        tl.store(record, token)
        tl.store(record + 1, taken)
        tl.store(record + 2, flags)
        at = steps_ptr + row * _STEP_FIELDS
        tl.store(at, top)
        tl.store(at + 1, grad)
        tl.store(at + 2, weight)
        tl.store(at + 3, mean)
        tl.store(at + 4, tl.load(rates_ptr + row * rates_stride + step, mask=left > 0, other=0.0))
        tl.store(at + 5, tl.load(scales_ptr + step, mask=left > 0, other=1.0))


@triton.jit(do_not_specialize=["turn", "rows"])
def _pull_kernel(
    z_ptr,  # [N, V] float32, contiguous
    grad_ptr,  # [N, V]
    noise_ptr,  # [N, V] float32, contiguous, or None
    head_ptr,  # [V, H]
    partial_ptr,  # [splits, N, H] float32
    records_ptr,
    team_ptr,
    stopped_ptr,
    steps_ptr,  # [N, _STEP_FIELDS] float32
    rows,
    vocabulary,
    width,  # H
    tiles_of_rows,
    tiles_of_width,
    turn,
    grad_stride,
    head_stride_v,
    head_stride_h,
    inverse,
    inverse_low,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Σ_v ∂ℒ/∂z[v] head[v] over a split of the vocabulary, for the rows that take step ``turn``."""
    program = tl.program_id(0)
    row = (program % tiles_of_rows * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = program // tiles_of_rows % tiles_of_width * WIDTH + tl.arange(0, WIDTH)
    split = (program // tiles_of_rows // tiles_of_width).to(tl.int64)
    within = tl.minimum(row, rows - 1)
    moves = _moves(records_ptr, team_ptr, stopped_ptr, within, turn)
    if tl.max(moves.to(tl.int32), axis=0) > 0:
        of_row = steps_ptr + within * _STEP_FIELDS
        top = tl.load(of_row, mask=moves, other=0.0)[None, :]
        grad_token = tl.load(of_row + 1, mask=moves, other=0.0)[None, :]
        weight = tl.load(of_row + 2, mask=moves, other=0.0)[None, :]
        mean = tl.load(of_row + 3, mask=moves, other=0.0)[None, :]
        # A mean that is no number spoils the whole row.
        nothing = tl.where(mean == mean, 0.0, mean)
        there = part < width
        part_offset = part.to(tl.int64)[None, :] * head_stride_h
        acc = tl.zeros((WIDTH, ROWS), dtype=tl.float32)
        first = split.to(tl.int32) * SPLIT
        for start in range(first, tl.minimum(first + SPLIT, vocabulary), COLUMNS):
            token = (start + tl.arange(0, COLUMNS)).to(tl.int64)
            known = (token < vocabulary)[:, None] & moves[None, :]
            at = within[None, :] * vocabulary + token[:, None]
            y = tl.load(z_ptr + at, mask=known, other=-float("inf"))
            if noise_ptr is not None:
                y += tl.load(noise_ptr + at, mask=known, other=0.0)
            at = within[None, :] * grad_stride + token[:, None]
            grad = tl.load(grad_ptr + at, mask=known, other=0.0).to(tl.float32)
            e = exp(scaled(y - top, inverse, inverse_low))
            centred = tl.where(e > 0, grad, grad_token) - grad_token - mean
            pull = tl.where(e > 0, e * weight * centred, nothing)
            at = head_ptr + token[:, None] * head_stride_v + part_offset
            head = tl.load(at, mask=(token < vocabulary)[:, None] & there[None, :], other=0.0)
            acc = _dot(tl.trans(head), pull, acc, UPCAST)
        at = partial_ptr + (split * rows + row)[None, :] * width + part[:, None]
        tl.store(at, acc, mask=(row < rows)[None, :] & there[:, None])


@triton.jit(do_not_specialize=["turn", "rows"])
def _step_kernel(
    h_ptr,  # [N, H] float32, in place
    first_ptr,  # [N, H] float32, in place
    second_ptr,  # [N, H] float32, in place
    partial_ptr,  # [splits, N, H] float32
    records_ptr,
    team_ptr,
    stopped_ptr,
    steps_ptr,  # [N, _STEP_FIELDS] float32
    rows,
    width,  # H
    parts,  # of a row
    splits,
    turn,
    h_stride,
    first_stride,
    second_stride,
    PART: tl.constexpr,
):
    """Step ``turn`` of h."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    if _moves(records_ptr, team_ptr, stopped_ptr, row, turn):
        columns = tl.program_id(0) % parts * PART + tl.arange(0, PART)
        there = columns < width
        gradient = tl.zeros((PART,), tl.float32)
        at = partial_ptr + row * width + columns
        for _ in range(splits):
            gradient += tl.load(at, mask=there, other=0.0)
            at += rows * width
        h = tl.load(h_ptr + row * h_stride + columns, mask=there, other=0.0)
        first = tl.load(first_ptr + row * first_stride + columns, mask=there, other=0.0)
        second = tl.load(second_ptr + row * second_stride + columns, mask=there, other=0.0)
        rate = tl.load(steps_ptr + row * _STEP_FIELDS + 4)
        scale = tl.load(steps_ptr + row * _STEP_FIELDS + 5)
        h, first, second = adam_step(h, gradient, first, second, rate, scale)
        tl.store(h_ptr + row * h_stride + columns, h, mask=there)
        tl.store(first_ptr + row * first_stride + columns, first, mask=there)
        tl.store(second_ptr + row * second_stride + columns, second, mask=there)


def dto_descent_latents(
    h: Tensor,
    head: Tensor,
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
    """As ``nabla_fast.ops.dto_descent_latents``, in place; a row with another status than 0 stays.

    Args:
        h: [N, H] float32.
        head: [V, H] float32, bfloat16 or float16, any strides.
        grad: [N, V] float32, bfloat16 or float16.
        exp_avg, exp_avg_sq: [N, H] float32; of these, ``h`` and ``grad``, neighbours in a row are
            neighbours in memory.
        step: [N] int64, contiguous.
        schedule: [K] or [N, K] float64.
        until, group: [N] int64, or None.
        tau: τ in [2⁻⁶⁴, 2⁶⁴].
        noise: seed [N] and position [N] int64, or None.
    Returns:
        token [N] int64, flipped [N] bool, status [N] int32.
    """
    (rows, width), vocabulary, device = h.shape, len(head), h.device
    if rows == 0:
        return (
            torch.empty_like(step),
            torch.empty(0, dtype=torch.bool, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
        )
    inverse, (rates, scales) = inverse_parts(tau), adam_rates(schedule)
    slices, parts = triton.cdiv(vocabulary, _SLICE), triton.cdiv(width, _PART)
    splits, iters = triton.cdiv(vocabulary, _SPLIT), schedule.shape[-1]
    z = torch.empty(rows, vocabulary, device=device, dtype=torch.float32)
    until = None if until is None else until.contiguous()
    noises = None if noise is None else gumbel_noise(*noise, vocabulary, torch.float32)
    sums = torch.empty(rows * FIELDS.value * slices, device=device, dtype=torch.float32)
    steps = torch.empty(rows, _STEP_FIELDS.value, device=device, dtype=torch.float32)
    partial = torch.empty(splits, rows, width, device=device, dtype=torch.float32)
    records = torch.zeros(rows, _RECORD.value, device=device, dtype=torch.int32)
    team = stopped = None
    if group is not None:
        team = teams_of(group)
        stopped = torch.full((rows,), _NEVER, device=device, dtype=torch.int32)
    who = (records, team, stopped)
    kind = "half" if head.dtype == torch.bfloat16 else "float32"
    kind = "interpreter" if upcast(h) else kind
    logits_tile, pull_tile = _LOGITS[kind], _PULL[kind]

    def survey(turn: int) -> None:
        """z and its sums, after step ``turn``."""
        tiles = triton.cdiv(rows, logits_tile["ROWS"])
        _logits_kernel[(tiles * triton.cdiv(vocabulary, logits_tile["COLUMNS"]),)](
            h,
            head,
            z,
            *who,
            rows,
            vocabulary,
            width,
            tiles,
            turn,
            h.stride(0),
            *head.stride(),
            UPCAST=upcast(h),
            **logits_tile,
        )
        _survey_kernel[(rows * slices,)](
            z,
            grad,
            noises,
            sums,
            *who,
            vocabulary,
            slices,
            turn,
            grad.stride(0),
            *inverse,
            TILE=_SLICE,
            num_warps=8,
        )

    def verdict(turn: int) -> None:
        _verdict_kernel[(rows,)](
            step,
            until,
            rates,
            scales,
            team,
            stopped,
            sums,
            records,
            steps,
            slices,
            turn,
            iters,
            rates.stride(0) if rates.ndim == 2 else 0,
            *inverse,
            SLICES=triton.next_power_of_2(slices),
        )

    def move(turn: int) -> None:
        """Step ``turn``."""
        tiles = triton.cdiv(rows, pull_tile["ROWS"]), triton.cdiv(width, pull_tile["WIDTH"])
        _pull_kernel[(tiles[0] * tiles[1] * splits,)](
            z,
            grad,
            noises,
            head,
            partial,
            *who,
            steps,
            rows,
            vocabulary,
            width,
            *tiles,
            turn,
            grad.stride(0),
            *head.stride(),
            *inverse,
            SPLIT=_SPLIT,
            UPCAST=upcast(h),
            **pull_tile,
        )
        _step_kernel[(rows * parts,)](
            h,
            exp_avg,
            exp_avg_sq,
            partial,
            *who,
            steps,
            rows,
            width,
            parts,
            splits,
            turn,
            h.stride(0),
            exp_avg.stride(0),
            exp_avg_sq.stride(0),
            PART=_PART,
        )

    with torch.cuda.device_of(h):
        survey(0)
        for turn in range(1, iters + 1):
            verdict(turn)
            move(turn)
            survey(turn)
        verdict(iters + 1)
        token, taken, flags = records.unbind(1)
        step += taken
        return token.long(), (flags & _FLIPPED.value) != 0, flags >> _STATUS_SHIFT.value
