"""Descents in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast._native.loading import check, extension


def dto_descent_(
    z: Tensor,  # [N, V] float32 like all of [N, V], on the CPU, unit stride along V, any along N
    grad: Tensor,  # [N, V]
    exp_avg: Tensor,  # [N, V]
    exp_avg_sq: Tensor,  # [N, V]
    step: Tensor,  # [N] int64 like all of [N], contiguous
    schedule: Tensor,  # [K] or [N, K] float64, unit stride along K
    *,
    until: Tensor | None = None,  # [N]
    group: Tensor | None = None,  # [N]
    tau: float = 1.0,
    noise: tuple[Tensor, Tensor] | None = None,  # seed [N] and position [N]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps of ``nabla_fast.ops.dto_descent`` in place; arguments as of the op, right as they are.

    Returns the hard tokens [N] int64; which of them the last step moved, [N] bool; and None, or the
    status [N] int32 of the rows as of :func:`token_stats`, if one is not 0: then nothing has changed.

    Raises ValueError for a step beyond the schedule or a tau not in [2^-64, 2^64]; RuntimeError where
    the extension is missing.
    """
    native = extension()
    rows, vocab = z.shape
    token = torch.empty(rows, dtype=torch.int64, device="cpu")
    flipped = torch.empty(rows, dtype=torch.bool, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    seed, position = (0, 0) if noise is None else (noise[0].data_ptr(), noise[1].data_ptr())
    code = native.dto_descent(
        z.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        step.data_ptr(),
        rows,
        vocab,
        z.stride(0),
        grad.stride(0),
        exp_avg.stride(0),
        exp_avg_sq.stride(0),
        schedule.data_ptr(),
        schedule.shape[-1],
        schedule.stride(0) if schedule.ndim == 2 else 0,
        0 if until is None else until.data_ptr(),
        # A row alone has nothing to wait for.
        0 if group is None or rows == 1 else group.data_ptr(),
        tau,
        seed,
        position,
        token.data_ptr(),
        flipped.data_ptr(),
        status.data_ptr(),
        torch.get_num_threads(),
    )
    if code == native.BAD_ROWS:
        return token, flipped, status
    check(code)
    return token, flipped, None


def dto_descent_latents_(
    h: Tensor,  # [N, H] float32 on the CPU, unit stride along H, any along N, like the moments
    head: Tensor,  # [V, H] float32 or bfloat16 on the CPU, unit stride along H, any along V
    grad: Tensor,  # [N, V] float32, unit stride along V
    exp_avg: Tensor,  # [N, H] float32
    exp_avg_sq: Tensor,  # [N, H] float32
    step: Tensor,  # [N] int64 like all of [N], contiguous
    schedule: Tensor,  # [K] or [N, K] float64, unit stride along K
    *,
    until: Tensor | None = None,  # [N]
    group: Tensor | None = None,  # [N]
    tau: float = 1.0,
    noise: tuple[Tensor, Tensor] | None = None,  # seed [N] and position [N]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps of ``nabla_fast.ops.dto_descent_latents`` in place; returns and raises as
    :func:`dto_descent_` does.
    """
    native = extension()
    (rows, width), vocab = h.shape, head.shape[0]
    token = torch.empty(rows, dtype=torch.int64, device="cpu")
    flipped = torch.empty(rows, dtype=torch.bool, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    seed, position = (0, 0) if noise is None else (noise[0].data_ptr(), noise[1].data_ptr())
    size = native.dto_descent_latents_workspace(rows, vocab, width)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    code = native.dto_descent_latents(
        h.data_ptr(),
        head.data_ptr(),
        native.FLOAT32 if head.dtype == torch.float32 else native.BFLOAT16,
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        step.data_ptr(),
        rows,
        vocab,
        width,
        h.stride(0),
        head.stride(0),
        grad.stride(0),
        exp_avg.stride(0),
        exp_avg_sq.stride(0),
        schedule.data_ptr(),
        schedule.shape[-1],
        schedule.stride(0) if schedule.ndim == 2 else 0,
        0 if until is None else until.data_ptr(),
        0 if group is None else group.data_ptr(),
        tau,
        seed,
        position,
        token.data_ptr(),
        flipped.data_ptr(),
        status.data_ptr(),
        workspace.data_ptr(),
        size,
        torch.get_num_threads(),
    )
    if code == native.BAD_ROWS:
        return token, flipped, status
    check(code)
    return token, flipped, None
