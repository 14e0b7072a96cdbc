"""Adam and its learning-rate schedule, for the descents."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast.ops.checks import expect
from nabla_fast.ops.registry.rules import Table, floats, plain_float, plain_int
from nabla_fast.ops.registry.schema import read_parameters

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class AdamState(NamedTuple):
    """Moments and step count of N rows, float32 or float64; the descents change it in place.

    Example:
        >>> AdamState.zeros(torch.ones(2, 3)).step
        tensor([0, 0])
    """

    exp_avg: Tensor  # [N, V or H]
    exp_avg_sq: Tensor  # [N, V or H]
    step: Tensor  # [N] int64, steps taken

    @staticmethod
    def zeros(parameter: Tensor) -> AdamState:
        """The state before the first step of ``parameter`` [N, V or H].

        Raises:
            InputError: it is no matrix of floating-point numbers.
        """
        (parameter,) = _ZEROS.plain(parameter)
        return AdamState(
            torch.zeros_like(parameter),
            torch.zeros_like(parameter),
            torch.zeros(parameter.shape[0], dtype=torch.int64, device=parameter.device),
        )


_ZEROS = Table("AdamState.zeros", read_parameters(AdamState.zeros), {"parameter": floats("N", "D")})


def cosine_schedule(iters: int, lr: float, *, min_ratio: float = 0.0, warmup_steps: int = 0) -> Tensor:
    """Learning rates of steps 0..K−1: linear warm-up, then lr·max(min_ratio, ½(1 + cos πk/K)).

    With ``warmup_steps`` = w > 0, step k < w has lr·k/w, so that the first one moves nothing, and the
    cosine runs over the K − w steps that are left.

    Args:
        iters: K ≥ 0.
        lr: peak learning rate, finite and ≥ 0.
        min_ratio: floor of the cosine, as a share of ``lr``, in [0, 1].
        warmup_steps: w, at most K.
    Returns:
        [K] float64.
    Raises:
        InputError: an argument is no number, or out of its range.

    Example:
        >>> cosine_schedule(4, 1.0, min_ratio=0.3).tolist()
        [1.0, 0.8535533905932737, 0.5, 0.3]
    """
    name = "cosine_schedule"
    iters, warmup_steps = plain_int(name, "iters", iters), plain_int(name, "warmup_steps", warmup_steps)
    lr, min_ratio = plain_float(name, "lr", lr), plain_float(name, "min_ratio", min_ratio)
    expect(iters >= 0, f"{name}: iters must not be negative, got {iters}")
    expect(0 <= lr < math.inf, f"{name}: lr must be finite and not negative, got {lr}")
    expect(0 <= min_ratio <= 1, f"{name}: min_ratio must be in [0, 1], got {min_ratio}")
    expect(
        0 <= warmup_steps <= iters,
        f"{name}: warmup_steps must be between 0 and iters={iters}, got {warmup_steps}",
    )
    rates = []
    for k in range(iters):
        if k < warmup_steps:
            rates.append(lr * k / warmup_steps)
        else:
            progress = (k - warmup_steps) / (iters - warmup_steps)
            rates.append(lr * max(min_ratio, 0.5 * (1 + math.cos(math.pi * progress))))
    return torch.tensor(rates, dtype=torch.float64)


def adam_step_(parameter: Tensor, grad: Tensor, state: AdamState, lr: Tensor) -> None:
    """One bias-corrected Adam step (Kingma & Ba 2015, algorithm 1) on every row, in place.

    Args:
        parameter, grad: [N, D].
        state: moments [N, D] and steps [N], which may differ from row to row.
        lr: [N] float64.
    """
    state.step.add_(1)
    count = state.step.double()
    correction1, correction2 = 1 - BETA1**count, 1 - BETA2**count
    state.exp_avg.lerp_(grad, 1 - BETA1)
    state.exp_avg_sq.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    scale = correction2.sqrt()[:, None].to(parameter.dtype)
    denominator = state.exp_avg_sq.sqrt().div_(scale).add_(EPSILON)
    rate = (lr / correction1)[:, None].to(parameter.dtype)
    parameter.sub_(state.exp_avg.div(denominator).mul_(rate))
