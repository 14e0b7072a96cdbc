"""Gradient-guided decoding of language models, without its cost.

∇-Reasoner (Wang et al., ICLR 2026) improves an answer while it is decoded, by gradient descent on
token logits through the language model and a reward model. This package computes the same tokens.

Names are imported when they are first asked for: ``nabla_fast.ops`` alone needs neither transformers nor
rich, and the command's ``--version`` no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nabla_fast._version import __version__

if TYPE_CHECKING:
    from nabla_fast._native.library import (
        get_cmake_dir,
        get_cuda_library,
        get_include,
        get_library,
        get_pkgconfig_dir,
    )
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

# Modules, and the names here that come from them.
_HOMES = {
    "nabla_fast._native.library": (
        "get_cmake_dir",
        "get_cuda_library",
        "get_include",
        "get_library",
        "get_pkgconfig_dir",
    ),
    "nabla_fast.config": (
        "DTOConfig",
        "SamplingConfig",
    ),
    "nabla_fast.decode.special_tokens": ("neutralize_special_tokens",),
    "nabla_fast.decode.stream": ("ResultStream",),
    "nabla_fast.decoder": ("NablaDecoder",),
    "nabla_fast.errors": (
        "BackendUnavailable",
        "DecodingFailed",
        "DecodingInterrupted",
        "InputError",
        "ModelError",
        "RowError",
    ),
    "nabla_fast.models": (
        "ClassifierReward",
        "DifferentiableReward",
        "FunctionReward",
        "ProcessReward",
        "RewardEnsemble",
        "VocabularyAlignment",
    ),
    "nabla_fast.ops": (
        "set_backend",
        "use_backend",
    ),
    "nabla_fast.results": (
        "Candidate",
        "Result",
        "Revision",
        "SampleResult",
        "Stats",
    ),
    "nabla_fast.sampler": (
        "Sampler",
        "best_of_n",
        "sample",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("config", "decoder", "errors", "models", "ops", "results", "sampler")

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


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value  # asked for once
        return value
    if name in _MODULES:
        return import_module(f"nabla_fast.{name}")
    raise AttributeError(f"module 'nabla_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, *_MODULES})
