"""Kernels of gradient-guided decoding, callable on plain tensors.

Each op is its plain-PyTorch reference with faster backends registered on it;
:mod:`nabla_fast.ops.registry` says how one is chosen, :func:`set_backend` how to force one, and
:func:`use_backend` how to force one inside a ``with`` block. Where no forced backend takes an input, a
call raises BackendUnavailable with the reason of each.
"""

from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops.adam import AdamState, cosine_schedule
from nabla_fast.ops.descent_loop import Descent
from nabla_fast.ops.draw_tokens import DrawKey, draw_tokens
from nabla_fast.ops.dto_descent import dto_descent
from nabla_fast.ops.dto_descent_latents import dto_descent_latents
from nabla_fast.ops.embedding_mix import embedding_mix
from nabla_fast.ops.gumbel_noise import GumbelNoise, gumbel_noise
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix
from nabla_fast.ops.lm_logits import lm_logits, logits_backward
from nabla_fast.ops.nll_grad import nll_grad
from nabla_fast.ops.onehot_grad import onehot_grad
from nabla_fast.ops.onehot_grad_norm import onehot_grad_norm
from nabla_fast.ops.prefix_attention import Attention, prefix_attention
from nabla_fast.ops.registry import backend_status, set_backend, use_backend
from nabla_fast.ops.rows import synchronize
from nabla_fast.ops.store_keys_values import store_keys_values
from nabla_fast.ops.token_stats import TokenStats, token_stats
from nabla_fast.ops.vocab_parallel import vocab_parallel_embedding_mix

__all__ = [
    "AdamState",
    "Attention",
    "BackendUnavailable",
    "Descent",
    "DrawKey",
    "GumbelNoise",
    "TokenStats",
    "backend_status",
    "cosine_schedule",
    "draw_tokens",
    "dto_descent",
    "dto_descent_latents",
    "embedding_mix",
    "gumbel_noise",
    "linear_embedding_mix",
    "lm_logits",
    "logits_backward",
    "nll_grad",
    "onehot_grad",
    "onehot_grad_norm",
    "prefix_attention",
    "set_backend",
    "store_keys_values",
    "synchronize",
    "token_stats",
    "use_backend",
    "vocab_parallel_embedding_mix",
]
