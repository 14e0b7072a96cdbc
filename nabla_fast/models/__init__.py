"""The language model and the reward model, each with one interface."""

from nabla_fast.models.alignment import VocabularyAlignment
from nabla_fast.models.language import LanguageModel
from nabla_fast.models.reward import RewardModel

__all__ = ["LanguageModel", "RewardModel", "VocabularyAlignment"]
