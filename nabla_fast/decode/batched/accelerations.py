"""Parts of the batched loop that save work, each to be switched off alone: for measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerations:
    """Parts of the batched loop; none of them changes a token.

    Attributes:
        gradient_store: one forward+backward serves every question about a sequence.
        small_gradients: a gradient's rows are computed where they are asked for; off: G [L, V] whole.
        whole_descents: the steps up to a flip are one call; off: one call a step.
        frozen_prefix: keys and values of what is committed are read from a cache; off: read anew.
        speculation: proposals are made ahead of their acceptance.
        batching: many prompts run as one batch, and a trajectory's reward is kept.
        drafting: the trajectory being replaced drafts the new one.
    """

    gradient_store: bool = True
    small_gradients: bool = True
    whole_descents: bool = True
    frozen_prefix: bool = True
    speculation: bool = True
    batching: bool = True
    drafting: bool = True
