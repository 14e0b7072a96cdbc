"""The C++ kernels (``nabla_fast._C``) as plain functions on CPU tensors.

The extension is optional and loaded at the first call. Each function takes tensors that are right for
it, as the ops that call it have checked, and raises ValueError for what the C interface refuses.
"""

from nabla_fast._native.attention import prefix_attention, prefix_attention_backward
from nabla_fast._native.descents import dto_descent_, dto_descent_latents_
from nabla_fast._native.loading import (
    ABI_VERSION,
    ISA_NAMES,
    MOST_HEAD_DIM,
    available,
    check,
    cpu_isa,
    extension,
    why_missing,
)
from nabla_fast._native.mixes import Mix
from nabla_fast._native.onehot import linear_token_stats, onehot_grad, onehot_grad_norm
from nabla_fast._native.products import lm_logits, nll_grad
from nabla_fast._native.statistics import token_stats

__all__ = [
    "ABI_VERSION",
    "ISA_NAMES",
    "MOST_HEAD_DIM",
    "Mix",
    "available",
    "check",
    "cpu_isa",
    "dto_descent_",
    "dto_descent_latents_",
    "extension",
    "linear_token_stats",
    "lm_logits",
    "nll_grad",
    "onehot_grad",
    "onehot_grad_norm",
    "prefix_attention",
    "prefix_attention_backward",
    "token_stats",
    "why_missing",
]
