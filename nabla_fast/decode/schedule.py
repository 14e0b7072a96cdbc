"""Learning rates of a descent's steps."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.ops import cosine_schedule


def learning_rates(config: DTOConfig, device: torch.device) -> Tensor:
    """[K] float64, the learning rate of each step.

    All schedules warm up alike: step k of the first w = ``warmup_steps`` has lr·k/w. Then "cosine" is
    :func:`~nabla_fast.ops.cosine_schedule`, "linear" lr·max(min_ratio, 1 − (k − w)/(K − w)), and "constant"
    lr.
    """
    iters, warmup = config.iters, config.warmup_steps
    if config.schedule == "cosine":
        rates = cosine_schedule(iters, config.lr, min_ratio=config.min_lr_ratio, warmup_steps=warmup)
        return rates.to(device)
    shares = [k / warmup for k in range(warmup)]
    for k in range(iters - warmup):
        falling = config.schedule == "linear"
        shares.append(max(config.min_lr_ratio, 1 - k / (iters - warmup)) if falling else 1.0)
    return torch.tensor([config.lr * share for share in shares], dtype=torch.float64, device=device)
