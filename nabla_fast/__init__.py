"""Gradient-guided decoding of language models, without its cost.

∇-Reasoner (Wang et al., ICLR 2026) improves an answer while it is decoded, by gradient descent on
token logits through the language model and a reward model. This package computes the same tokens.
"""

from nabla_fast._native.library import (
    get_cmake_dir,
    get_cuda_library,
    get_include,
    get_library,
    get_pkgconfig_dir,
)
from nabla_fast._version import __version__
from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.special_tokens import neutralize_special_tokens
from nabla_fast.decode.stream import ResultStream
from nabla_fast.decoder import NablaDecoder
from nabla_fast.errors import (
    BackendUnavailable,
    DecodingFailed,
    DecodingInterrupted,
    InputError,
    ModelError,
    RowError,
)
from nabla_fast.models import (
    ClassifierReward,
    DifferentiableReward,
    FunctionReward,
    ProcessReward,
    RewardEnsemble,
    VocabularyAlignment,
)
from nabla_fast.ops import set_backend, use_backend
from nabla_fast.results import Candidate, Result, Revision, SampleResult, Stats
from nabla_fast.sampler import Sampler, best_of_n, sample

__all__ = [
    "BackendUnavailable",
    "Candidate",
    "ClassifierReward",
    "DTOConfig",
    "DecodingFailed",
    "DecodingInterrupted",
    "DifferentiableReward",
    "FunctionReward",
    "InputError",
    "ModelError",
    "NablaDecoder",
    "ProcessReward",
    "Result",
    "ResultStream",
    "Revision",
    "RewardEnsemble",
    "RowError",
    "SampleResult",
    "Sampler",
    "SamplingConfig",
    "Stats",
    "VocabularyAlignment",
    "__version__",
    "best_of_n",
    "get_cmake_dir",
    "get_cuda_library",
    "get_include",
    "get_library",
    "get_pkgconfig_dir",
    "neutralize_special_tokens",
    "sample",
    "set_backend",
    "use_backend",
]
