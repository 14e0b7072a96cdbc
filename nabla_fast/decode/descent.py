"""Steps on a rollout's relaxed parameter, for both loops: logits z, or latents h that give z."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.parameter import parameter_logits
from nabla_fast.decode.plain_descent import decayed, plain_descent_
from nabla_fast.models.heads import Head
from nabla_fast.ops import AdamState, Descent, GumbelNoise, dto_descent
from nabla_fast.ops.adam import adam_step_
from nabla_fast.ops.softmax import softmax_gradient


def moves_all_rows(config: DTOConfig) -> bool:
    """Whether a descent moves every position of a rollout: by their gradients, or by weight decay alone."""
    return config.update == "all" or config.weight_decay > 0


def moving_rows(config: DTOConfig, gradient: Tensor, counts: Sequence[int]) -> Tensor:
    """G of all rows that a descent moves, 0 where weight decay alone moves them.

    Args:
        gradient: G [Σ n, V]; with ``update="first"`` [N, V], of each trajectory's first row.
        counts: n of each of N trajectories.
    Returns:
        [Σ n, V].
    """
    if config.update == "all" or len(gradient) == sum(counts):
        return gradient
    starts = torch.tensor([0, *counts[:-1]], device=gradient.device).cumsum(0)
    return gradient.new_zeros(sum(counts), gradient.shape[1]).index_copy_(0, starts, gradient)


def hard_descent_(
    config: DTOConfig,
    parameter: Tensor,
    gradient: Tensor,
    state: AdamState,
    schedule: Tensor,
    head: Head,
    *,
    until: Tensor | None = None,
    group: Tensor | None,
    noise: GumbelNoise | None,
) -> Descent:
    """Adam steps under a constant one-hot gradient until a hard token moves, in place.

    Args:
        parameter: [n, V or H].
        gradient: G [n, V].
        state, schedule, until, group, noise: as of :func:`~nabla_fast.ops.dto_descent`.
        head: of the LM.
    """
    if config.weight_decay > 0 or config.gumbel_scale != 1:
        given = gradient, state, schedule, head
        return plain_descent_(config, parameter, *given, until=until, group=group, noise=noise)
    options = {"until": until, "group": group, "tau": config.tau, "noise": noise}
    if config.parameter == "logits":
        return dto_descent(parameter, gradient, state, schedule, **options)
    return head.descend(parameter, gradient, state, schedule, **options)


def soft_step_(
    config: DTOConfig,
    parameter: Tensor,
    logits: Tensor,
    gradient: Tensor,
    state: AdamState,
    rate: Tensor,
    head: Head,
) -> None:
    """One Adam step of the soft relaxation, in place.

    Args:
        parameter: [n, V or H].
        logits: z [n, V] of the parameter, brought up to date.
        gradient: G [n, V] at softmax(z/τ).
        state: of the parameter.
        rate: the step's learning rate, a float64 scalar.
        head: of the LM.
    """
    p = torch.softmax(logits / config.tau, dim=-1)
    dz = softmax_gradient(p, gradient, logits.argmax(dim=-1), config.tau)
    direction = dz if config.parameter == "logits" else head.backward(dz, logits)
    # G is float64 where a reward's table alone is.
    direction = decayed(config, direction.to(parameter.dtype), parameter)
    adam_step_(parameter, direction, state, rate.expand(len(parameter)))
    logits.copy_(parameter_logits(config, parameter, head))
