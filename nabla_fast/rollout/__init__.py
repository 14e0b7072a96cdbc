"""Drawing continuations from the language model."""

from nabla_fast.rollout.transformers import Roller, Rollout

__all__ = ["Roller", "Rollout"]
