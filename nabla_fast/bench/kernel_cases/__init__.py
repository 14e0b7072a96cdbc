"""Cases of the kernel benchmark: inputs, versions of each op, the least work there is."""

from __future__ import annotations

import torch

from nabla_fast.bench.kernel_cases.attention import prefix_attention
from nabla_fast.bench.kernel_cases.case import Case, Versions
from nabla_fast.bench.kernel_cases.descents import dto_descent, dto_descent_latents
from nabla_fast.bench.kernel_cases.draws import draw_tokens
from nabla_fast.bench.kernel_cases.gradients import nll_grad, onehot_grad, onehot_grad_norm
from nabla_fast.bench.kernel_cases.mixes import embedding_mix, linear_embedding_mix
from nabla_fast.bench.kernel_cases.products import lm_logits
from nabla_fast.bench.kernel_cases.statistics import token_stats, token_stats_of_hidden

__all__ = ["Case", "Versions", "cases"]

_V, _K = 151_936, 20  # Qwen's vocabulary; the default number of steps
_BOTH = torch.float32, torch.bfloat16
_MIXES = {"hard": False, "backward": False}, {"hard": True, "backward": True}


def cases(device: torch.device, *, quick: bool = False) -> list[Case]:
    """The cases for a device: the sizes of a 0.5B model on a CPU, of a 7B model on a GPU.

    Quick ones have a small vocabulary, on a GPU with the real widths and fewer rows, on a CPU with narrow
    tables.
    """
    if device.type == "cuda":
        return _gpu_cases(device, *((32_768, 64) if quick else (_V, 512)))
    return _cpu_cases(device, *((1_000, 48, 32) if quick else (_V, 896, 512)))


def _cpu_cases(device: torch.device, v: int, h: int, h_r: int) -> list[Case]:
    f32, bf16 = _BOTH
    return [
        *(token_stats(64, v, dtype, device) for dtype in _BOTH),
        *(token_stats_of_hidden(16, v, h, dtype, device) for dtype in _BOTH),
        *(embedding_mix(64, v, [h], dtype, device, **form) for dtype in _BOTH for form in _MIXES),
        *(embedding_mix(16, v, [h, h_r], dtype, device, **form) for dtype in _BOTH for form in _MIXES),
        linear_embedding_mix(64, v, h, f32, device, hard=False, backward=False),
        linear_embedding_mix(64, v, h, f32, device, hard=True, backward=False),
        linear_embedding_mix(64, v, h, f32, device, hard=True, backward=True),
        *(onehot_grad(n, v, h, [h, h_r], f32, device) for n in (1, 16)),
        onehot_grad(16, v, h, [h, h_r], bf16, device),
        *(onehot_grad_norm(64, v, h, [h, h_r], dtype, device) for dtype in _BOTH),
        *(dto_descent(n, v, _K, device) for n in (1, 64)),
        *(dto_descent_latents(n, v, h, _K, f32, device) for n in (1, 16)),
        *(lm_logits(n, v, h, f32, device) for n in (1, 16)),
        lm_logits(1, v, h, bf16, device),
        nll_grad(16, v, h, f32, device),
        draw_tokens(16, v, f32, device, top_k=20, top_p=0.8),
        draw_tokens(16, v, f32, device, top_p=0.8),
        draw_tokens(16, v, f32, device),
        # A step of a decode, a draft that is read at once, and a gradient of a trajectory.
        *(
            prefix_attention(batch, 600, suffix, 14, 2, 64, backward=backward, device=device)
            for batch, suffix, backward in ((1, 1, False), (16, 1, False), (4, 16, False), (1, 128, True))
        ),
    ]


def _gpu_cases(device: torch.device, v: int, n: int) -> list[Case]:
    h, h_r, bf16 = 3584, 2560, torch.bfloat16
    widths, prefix = [h, h_r], 8 * n
    fewer = [rows for rows in (1, 8, 64) if rows < n]  # of a decode
    # The rows that goals are set for come first: a run may be cut off.
    return [
        token_stats(n, v, bf16, device),
        *(embedding_mix(n, v, widths, bf16, device, **form) for form in _MIXES),
        embedding_mix(n, v, widths, bf16, device, logits=bf16, **_MIXES[1]),
        *(linear_embedding_mix(n, v, h, bf16, device, **form) for form in _MIXES),
        token_stats_of_hidden(n, v, h, bf16, device),
        onehot_grad(16, v, h, widths, bf16, device),
        onehot_grad_norm(n, v, h, widths, bf16, device),
        dto_descent(1, v, _K, device),
        *(dto_descent_latents(rows, v, h, _K, bf16, device) for rows in (1, 2)),
        *(embedding_mix(few, v, widths, bf16, device, **form) for few in fewer for form in _MIXES),
        *(token_stats_of_hidden(few, v, h, bf16, device) for few in fewer),
        dto_descent(n, v, _K, device),
        dto_descent_latents(16, v, h, _K, bf16, device),
        lm_logits(8, v, h, bf16, device),
        # A step, and a trajectory's pass, of a 7B model behind a prefix.
        *(
            prefix_attention(8, prefix, suffix, 28, 4, 128, bf16, backward=backward, device=device)
            for suffix, backward in ((1, False), (n, False), (n, True))
        ),
    ]
