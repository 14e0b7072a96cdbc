"""The descent with what kernels do not have, in plain PyTorch: weight decay, and noise of another scale."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.parameter import parameter_logits
from nabla_fast.models.heads import Head
from nabla_fast.ops import AdamState, Descent, GumbelNoise, gumbel_noise
from nabla_fast.ops.descent_loop import descend
from nabla_fast.ops.rows import report, row_status
from nabla_fast.ops.softmax import softmax_gradient, tempered


def decayed(config: DTOConfig, direction: Tensor, parameter: Tensor) -> Tensor:
    """A gradient [n, V or H] with weight decay's share; a logit of −inf, a masked token, stays."""
    if config.weight_decay == 0:
        return direction
    return direction + config.weight_decay * parameter.masked_fill(parameter.isinf(), 0)


def scaled_noise(config: DTOConfig, noise: GumbelNoise, logits: Tensor) -> Tensor:
    """z plus the noise of its rows at the config's scale, [n, V] in the dtype of z."""
    g = gumbel_noise(noise, logits.shape[1])
    return logits + (g if config.gumbel_scale == 1 else config.gumbel_scale * g).to(logits.dtype)


def plain_descent_(
    config: DTOConfig,
    parameter: Tensor,
    gradient: Tensor,
    state: AdamState,
    schedule: Tensor,
    head: Head,
    *,
    until: Tensor | None,
    group: Tensor | None,
    noise: GumbelNoise | None,
) -> Descent:
    """As :func:`~nabla_fast.decode.descent.hard_descent_`, one step after another over whole rows.

    Raises:
        RowError: a row of z has a NaN or +inf logit, or no finite one. Nothing has changed then.
    """

    def perturbed(z: Tensor, rows: Tensor | slice) -> Tensor:
        return z if noise is None else scaled_noise(config, GumbelNoise(*(key[rows] for key in noise)), z)

    def direction(part: Tensor, rows: Tensor | slice) -> Tensor:
        z = parameter_logits(config, part, head)
        y = perturbed(z, rows)
        p = torch.softmax(tempered(y, config.tau), dim=-1)
        dz = softmax_gradient(p, gradient[rows].to(z.dtype), y.argmax(dim=-1), config.tau)
        step = dz if config.parameter == "logits" else head.backward(dz, z)
        return decayed(config, step.to(part.dtype), part)

    def hard_token(part: Tensor, rows: Tensor | slice) -> Tensor:
        return perturbed(parameter_logits(config, part, head), rows).argmax(dim=-1)

    report("dto_descent", row_status(parameter_logits(config, parameter, head)))
    return descend(parameter, state, schedule, until, group, direction, hard_token)
