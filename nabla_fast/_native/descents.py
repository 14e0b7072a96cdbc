"""Descents in C++."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast._native.loading import check, extension


class Found(NamedTuple):
    """How a descent left its rows."""

    token: Tensor  # [N] int64, the hard tokens
    flipped: Tensor  # [N] bool, which of them the last step moved
    status: Tensor | None  # [N] int32 as of token_stats if one is not 0: then nothing has changed

    @classmethod
    def of(cls, rows: int) -> Found:
        """Room for N rows, in the order in which kernels take it."""
        dtypes = (torch.int64, torch.bool, torch.int32)
        return cls(*(torch.empty(rows, dtype=dtype, device="cpu") for dtype in dtypes))


def _steps(
    schedule: Tensor,
    until: Tensor | None,
    group: Tensor | None,
    tau: float,
    noise: tuple[Tensor, Tensor] | None,
) -> tuple[int | float, ...]:
    """A descent's options as both kernels take them, in their order."""
    return (
        schedule.data_ptr(),
        schedule.shape[-1],
        schedule.stride(0) if schedule.ndim == 2 else 0,
        0 if until is None else until.data_ptr(),
        # A row alone has nothing to wait for.
        0 if group is None or len(group) == 1 else group.data_ptr(),
        tau,
        *((0, 0) if noise is None else (key.data_ptr() for key in noise)),
    )


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
) -> Found:
    """Steps of ``nabla_fast.ops.dto_descent`` in place; arguments as of the op, right as they are.

    Raises ValueError for a step beyond the schedule or a tau not in [2^-64, 2^64]; RuntimeError where
    the extension is missing.
    """
    native = extension()
    rows, vocab = z.shape
    found = Found.of(rows)
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
        *_steps(schedule, until, group, tau, noise),
        *(tensor.data_ptr() for tensor in found),
        torch.get_num_threads(),
    )
    if code == native.BAD_ROWS:
        return found
    check(code)
    return found._replace(status=None)


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
) -> Found:
    """Steps of ``nabla_fast.ops.dto_descent_latents`` in place; returns and raises as
    :func:`dto_descent_` does.
    """
    native = extension()
    (rows, width), vocab = h.shape, head.shape[0]
    found = Found.of(rows)
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
        *_steps(schedule, until, group, tau, noise),
        *(tensor.data_ptr() for tensor in found),
        workspace.data_ptr(),
        size,
        torch.get_num_threads(),
    )
    if code == native.BAD_ROWS:
        return found
    check(code)
    return found._replace(status=None)
