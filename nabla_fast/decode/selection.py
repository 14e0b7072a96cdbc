"""Selection of the positions that are optimized: thresholds on confidence, entropy and ‖G‖₂.

Confidence and entropy come with the rollout; ‖G‖₂ costs a forward+backward of both models, so it is asked
for only where the other conditions leave a position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.ops import TokenStats


def selected_by_statistics(config: DTOConfig, stats: TokenStats) -> Tensor:
    """[L] bool, the positions whose confidence and entropy meet the thresholds that are set.

    Args:
        stats: [L] each.
    """
    selected = torch.ones_like(stats.argmax, dtype=torch.bool)
    if config.confidence_threshold is not None:
        selected &= stats.confidence <= config.confidence_threshold
    if config.entropy_threshold is not None:
        selected &= stats.entropy >= config.entropy_threshold
    return selected


def needs_gradient(config: DTOConfig, selected: Tensor) -> bool:
    """Whether ‖G‖₂ decides over positions that are selected so far, [L] bool."""
    return config.grad_threshold is not None and bool(selected.any())


def selected_by_norm(config: DTOConfig, selected: Tensor, norms: Tensor) -> Tensor:
    """[L] bool, those of ``selected`` whose ``norms`` ‖G_i‖₂ [L] are at least the threshold."""
    return selected & (norms >= config.grad_threshold)


def first_position(selected: Tensor) -> int | None:
    """Index of the first selected position of [L] bool, or None."""
    positions = selected.nonzero()
    return int(positions[0]) if len(positions) else None
