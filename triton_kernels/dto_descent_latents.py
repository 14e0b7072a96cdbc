"""Adam steps on hidden states under a constant one-hot gradient, until a hard token moves.

A step is two products with the head, which all rows of the launch share: z = h·headᵀ, and then
Σ_v ∂ℒ/∂z[v] head[v], for which the softmax of the whole of z must be known. With c = G[ŷ] it is
1/(S τ) (Σ e (G − c) w − (⟨p, G⟩ − c) Σ e w), of sums that can be taken as z comes, and few rows so
read the head once a step; for more rows reading it twice costs less. Both ways are arithmetic for
arithmetic the same (``latents_tiles``), so that a row's bits do not depend on its batch.

After a pass, one kernel joins the sums of the splits into each row's verdict, and one takes its step.
Nothing waits for the host, and the launches are the same whatever the data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import presets
from .common.adam import adam_step, load_rates, store_corrections, store_team
from .common.exponential import exp_base, tempered_exp
from .common.gumbel import gumbel_noise
from .common.latents_passes import logits_kernel, one_pass_kernel, pull_kernel, sums_kernel
from .common.latents_tiles import RECORD, moved, terms
from .common.launch import launched
from .common.products import upcast
from .common.row_sums import FIELDS, GRAD, TOP, joined_slices, joined_sums
from .common.sizes import cdiv
from .dto_descent import _DONE, _FLIPPED, _STATUS_SHIFT

_FEW_ROWS, _GROUPS = 2, 2  # rows whose terms, and whose sums in two chunks, fill the columns of a product
_PART = 64  # of a row of h, for one program
_BEGUN = 1024  # of a row of h that are split into terms at a time
_SPLITS = 64  # whose sums over w are joined at a time
_PARTIAL_BYTES = 1 << 28  # of sums over w that exist at a time
# A row's next step: largest y, G[token], 1/(S τ), ⟨p, G⟩ − G[token], Adam's two factors.
_STEP_FIELDS = tl.constexpr(6)


@triton.jit
def _store_states(states_ptr, row, width, columns, h):
    """Some columns of h as ``one_pass_kernel`` reads them."""
    if states_ptr.dtype.element_ty == tl.bfloat16:
        low, middle, high = terms(h)
        at = states_ptr + row * (3 * width) + columns
        tl.store(at, low, mask=columns < width)
        tl.store(at + width, middle, mask=columns < width)
        tl.store(at + 2 * width, high, mask=columns < width)
    else:
        tl.store(states_ptr + row * width + columns, h, mask=columns < width)


@launched
@triton.jit(do_not_specialize=["rows", "iters"])
def _begin_kernel(
    h_ptr,  # [N, H] float32
    states_ptr,  # of one_pass_kernel, or None
    group_ptr,  # [N] int64, or None
    team_ptr,  # [N] int32, or None
    stopped_ptr,  # [N] int32 by team, or None
    records_ptr,  # [N, 3] int32
    corrections_ptr,  # [2, K] float64
    rows,
    iters,
    width,  # H
    h_stride,
    PART: tl.constexpr,
):
    """What no pass over the tokens finds out."""
    row = tl.program_id(0).to(tl.int64)
    if states_ptr is not None:
        for start in range(0, width, PART):
            columns = start + tl.arange(0, PART)
            h = tl.load(h_ptr + row * h_stride + columns, mask=columns < width, other=0.0)
            _store_states(states_ptr, row, width, columns, h)
    for field in tl.static_range(RECORD):
        tl.store(records_ptr + row * RECORD + field, 0)
    if group_ptr is not None:
        store_team(group_ptr, team_ptr, stopped_ptr, row, rows)
    if row == 0:
        store_corrections(corrections_ptr, iters)


@launched
@triton.jit(do_not_specialize=["turn", "iters", "slices"])
def _verdict_kernel(
    step_ptr,  # [N] int64
    until_ptr,  # [N] int64, or None
    schedule_ptr,  # [N or 1, K] float64
    corrections_ptr,  # [2, K] float64
    team_ptr,  # [N] int32, or None
    stopped_ptr,  # [N] int32 by team: the turn before whose step it stopped, or None
    sums_ptr,  # [N, FIELDS, slices] float32
    records_ptr,  # [N, 3] int32
    steps_ptr,  # [N, _STEP_FIELDS] float32
    slices,
    turn,
    iters,
    schedule_row_stride,
    schedule_stride,
    temper,
    SLICES: tl.constexpr,
):
    """Before step ``turn``: what the step before it came to, and what this one needs."""
    row = tl.program_id(0).to(tl.int64)
    record = records_ptr + row * RECORD
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
            sums_ptr + row * (FIELDS * slices), slices, temper, SLICES
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
        schedule_ptr += row * schedule_row_stride
        rate, scale = load_rates(schedule_ptr, schedule_stride, corrections_ptr, step, iters)
        tl.store(at + 4, rate)
        tl.store(at + 5, scale)


@launched
@triton.jit(do_not_specialize=["turn", "rows"])
def _step_kernel(
    h_ptr,  # [N, H] float32, in place
    states_ptr,  # of one_pass_kernel, or None
    first_ptr,  # [N, H] float32, in place
    second_ptr,  # [N, H] float32, in place
    sums_ptr,  # [N, FIELDS, splits] float32
    partial_ptr,  # [splits, N, 2, H] float32: Σ e w and Σ e (G − G[the split's own token]) w
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
    temper,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Step ``turn`` of h."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    if moved(records_ptr, team_ptr, stopped_ptr, row, turn):
        columns = tl.program_id(0) % parts * PART + tl.arange(0, PART)
        there = columns < width
        top = tl.load(steps_ptr + row * _STEP_FIELDS)
        grad = tl.load(steps_ptr + row * _STEP_FIELDS + 1)
        weight = tl.load(steps_ptr + row * _STEP_FIELDS + 2)
        # A mean that is no number spoils the whole row.
        mean = tl.load(steps_ptr + row * _STEP_FIELDS + 3)
        gradient = tl.zeros((PART,), tl.float32)
        for start in range(0, splits, SPLITS):
            split = start + tl.arange(0, SPLITS)
            known = split < splits
            at = sums_ptr + row * (FIELDS * splits) + split
            own = tl.load(at + TOP * splits, mask=known, other=-float("inf"))
            base = tl.load(at + GRAD * splits, mask=known, other=0.0)
            share = tempered_exp(own - top, temper)
            at = partial_ptr + (split.to(tl.int64) * rows + row)[:, None] * (2 * width) + columns[None, :]
            mask = known[:, None] & there[None, :]
            plain = tl.load(at, mask=mask, other=0.0)
            tilted = tl.load(at + width, mask=mask, other=0.0)
            tilted = tl.fma(plain, ((base - grad) - mean)[:, None], tilted)
            gradient += tl.sum(share[:, None] * tilted, axis=0)
        gradient *= weight
        h = tl.load(h_ptr + row * h_stride + columns, mask=there, other=0.0)
        first = tl.load(first_ptr + row * first_stride + columns, mask=there, other=0.0)
        second = tl.load(second_ptr + row * second_stride + columns, mask=there, other=0.0)
        rate = tl.load(steps_ptr + row * _STEP_FIELDS + 4)
        scale = tl.load(steps_ptr + row * _STEP_FIELDS + 5)
        h, first, second = adam_step(h, gradient, first, second, rate, scale)
        tl.store(h_ptr + row * h_stride + columns, h, mask=there)
        if states_ptr is not None:
            _store_states(states_ptr, row, width, columns, h)
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
    kind = "half" if head.dtype == torch.bfloat16 else "float32"
    config = dict(presets.config("dto_descent_latents", kind, device))
    few, few_width, hold = (config.pop(name) for name in ("FEW", "FEW_WIDTH", "HOLD"))
    programs, many_tokens, pulled_width = (
        config.pop(name) for name in ("PROGRAMS", "MANY_TOKENS", "WIDTH")
    )
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")} | {"UPCAST": upcast(h)}
    one_pass = rows <= few and width <= few_width
    if one_pass:
        config["ROWS"] = _FEW_ROWS
    tokens, tile = config["TOKENS"], config["ROWS"]
    # By the vocabulary and the device alone, as the bits of a row are.
    split = cdiv(cdiv(vocabulary, tokens), programs) * tokens
    splits, iters = cdiv(vocabulary, split), schedule.shape[-1]
    # What a compiler would contract is written as fma: the schedules must not differ by what it chooses.
    temper, plain = exp_base(tau), {"enable_fp_fusion": False}
    options |= plain
    triples = {"TRIPLES": kind == "half" and not options["UPCAST"]}
    until = None if until is None else until.contiguous()
    group = None if group is None else group.contiguous()
    noises = None if noise is None else gumbel_noise(*noise, vocabulary, torch.float32)
    sums = torch.empty(rows, FIELDS.value, splits, device=device, dtype=torch.float32)
    steps = torch.empty(rows, _STEP_FIELDS.value, device=device, dtype=torch.float32)
    corrections = torch.empty(2, iters, device=device, dtype=torch.float64)
    records = torch.empty(rows, RECORD.value, device=device, dtype=torch.int32)
    most, tile_bytes = rows, max(1, 8 * splits * width * tile)
    if not one_pass:
        most = min(rows, max(1, _PARTIAL_BYTES // tile_bytes) * tile)
    partial = torch.empty(splits, most, 2, width, device=device, dtype=torch.float32)
    y = None if one_pass else torch.empty(rows, vocabulary, device=device, dtype=torch.float32)
    states = None
    if one_pass:
        shape = (rows, 3, width) if kind == "half" else (rows, 1, width)
        states = torch.empty(
            shape, device=device, dtype=torch.bfloat16 if kind == "half" else torch.float32
        )
    team = stopped = None
    if group is not None:
        team, stopped = torch.empty(2, rows, device=device, dtype=torch.int32)
    who = (records, team, stopped)
    tiles = cdiv(rows, tile)

    def survey(turn: int) -> None:
        """The sums after step ``turn``; those over w too where the head is read once."""
        chunks = cdiv(width, config["DEPTH"])
        if one_pass:
            last = turn == iters
            one_pass_kernel[(splits * tiles,)](
                states,
                head,
                noises,
                grad,
                sums,
                None if last else partial,
                *who,
                rows,
                vocabulary,
                width,
                splits,
                split,
                tiles,
                turn,
                grad.stride(0),
                *head.stride(),
                temper,
                CHUNKS=chunks,
                HOLD=min(hold, chunks),
                GROUPS=_GROUPS,
                TRIPLES=False,
                **config,
                **options,
            )
            return
        own = config | {"TOKENS": many_tokens}
        logits_kernel[(tiles * cdiv(vocabulary, many_tokens),)](
            h,
            head,
            noises,
            y,
            *who,
            rows,
            vocabulary,
            width,
            tiles,
            turn,
            h.stride(0),
            *head.stride(),
            **own,
            **options,
        )
        sums_kernel[(splits * tiles,)](
            y,
            grad,
            sums,
            *who,
            rows,
            vocabulary,
            splits,
            split,
            tiles,
            turn,
            grad.stride(0),
            temper,
            TOKENS=tokens,
            ROWS=tile,
            **triples,
            **plain,
        )

    def verdict(turn: int) -> None:
        _verdict_kernel[(rows,)](
            step,
            until,
            schedule,
            corrections,
            team,
            stopped,
            sums,
            records,
            steps,
            splits,
            turn,
            iters,
            schedule.stride(0) if schedule.ndim == 2 else 0,
            schedule.stride(-1),
            temper,
            SLICES=joined_slices(splits),
            num_warps=1,
            **plain,
        )

    def move(turn: int) -> None:
        """Step ``turn``."""
        for start in range(0, rows, most):
            part = slice(start, min(start + most, rows))
            n = part.stop - part.start
            own_who = (records[part], None if team is None else team[part], stopped)
            if not one_pass:
                own_tiles = cdiv(n, tile), cdiv(width, pulled_width)
                pull_kernel[(own_tiles[0] * own_tiles[1] * splits,)](
                    y[part],
                    grad[part],
                    head,
                    partial,
                    *own_who,
                    n,
                    vocabulary,
                    width,
                    splits,
                    split,
                    *own_tiles,
                    turn,
                    grad.stride(0),
                    *head.stride(),
                    temper,
                    TOKENS=tokens,
                    ROWS=tile,
                    PARTS=config["PARTS"],
                    WIDTH=pulled_width,
                    TRIPLES=False,
                    **options,
                )
            parts = cdiv(width, _PART)
            _step_kernel[(n * parts,)](
                h[part],
                states,
                exp_avg[part],
                exp_avg_sq[part],
                sums[part],
                partial,
                *own_who,
                steps[part],
                n,
                width,
                parts,
                splits,
                turn,
                h.stride(0),
                exp_avg.stride(0),
                exp_avg_sq.stride(0),
                temper,
                PART=_PART,
                SPLITS=_SPLITS,
                # A tile of splits and columns in four warps spilled on sm_120.
                num_warps=8,
                **plain,
            )

    with torch.cuda.device_of(h):
        _begin_kernel[(rows,)](
            h,
            states,
            group,
            team,
            stopped,
            records,
            corrections,
            rows,
            iters,
            width,
            h.stride(0),
            PART=_BEGUN,
            num_warps=1,
            **plain,
        )
        survey(0)
        for turn in range(1, iters + 1):
            verdict(turn)
            move(turn)
            survey(turn)
        verdict(iters + 1)
        token, taken, flags = records.unbind(1)
        step += taken
        return token.long(), (flags & _FLIPPED.value) != 0, flags >> _STATUS_SHIFT.value
