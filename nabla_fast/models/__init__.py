"""The language model and the rewards, each with one interface."""

from nabla_fast.models.alignment import VocabularyAlignment
from nabla_fast.models.given_rewards import (
    ClassifierReward,
    DifferentiableReward,
    FunctionReward,
    ProcessReward,
    RewardEnsemble,
)
from nabla_fast.models.language import LanguageModel
from nabla_fast.models.reward import RewardModel
from nabla_fast.models.reward_terms import Reward, RewardSum, RewardTerm, terms_of

__all__ = [
    "ClassifierReward",
    "DifferentiableReward",
    "FunctionReward",
    "LanguageModel",
    "ProcessReward",
    "Reward",
    "RewardEnsemble",
    "RewardModel",
    "RewardSum",
    "RewardTerm",
    "VocabularyAlignment",
    "terms_of",
]
