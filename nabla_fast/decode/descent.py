"""Steps on a rollout's relaxed parameter, for both loops: logits z, or latents h that give z."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.models.heads import Head
from nabla_fast.ops import (
    AdamState,
    Descent,
    GumbelNoise,
    cosine_schedule,
    dto_descent,
)
from nabla_fast.ops.adam import adam_step_
from nabla_fast.ops.softmax import softmax_gradient


def learning_rates(config: DTOConfig, device: torch.device) -> Tensor:
    """[K] float64, the learning rate of each step."""
    return cosine_schedule(
        config.iters, config.lr, min_ratio=config.min_lr_ratio, warmup_steps=config.warmup_steps
    ).to(device)


def initial_parameter(config: DTOConfig, hidden: Tensor, head: Head) -> Tensor:
    """The parameter of positions before the first step, float32 or wider.

    Args:
        hidden: [n, H], the final hidden states that predict the positions, in the model's dtype.
        head: of the LM.
    Returns:
        Logits [n, V] or latents [n, H], a new tensor.
    """
    if config.parameter == "logits":
        return head.logits(hidden)
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True)


def parameter_logits(config: DTOConfig, parameter: Tensor, head: Head) -> Tensor:
    """z [n, V] of a parameter [n, V or H]."""
    return parameter if config.parameter == "logits" else head.logits(parameter)


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
    adam_step_(parameter, direction.to(parameter.dtype), state, rate.expand(len(parameter)))
    logits.copy_(parameter_logits(config, parameter, head))
