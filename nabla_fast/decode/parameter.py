"""The relaxed parameter of positions: logits z, or latents h that give z."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.models.heads import Head


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
