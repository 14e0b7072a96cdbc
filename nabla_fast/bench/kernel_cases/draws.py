"""Cases of ``draw_tokens``."""

from __future__ import annotations

import torch
from torch import Tensor

import nabla_fast.ops as ops
from nabla_fast.bench.kernel_cases.case import Case, Outputs, Versions, name_of, normal
from nabla_fast.ops.gumbel_noise import philox_4x32_10

_LOW = 0xFFFFFFFF


def draw_tokens(
    n: int, v: int, dtype: torch.dtype, device: torch.device, *, top_k: int = 0, top_p: float = 1.0
) -> Case:
    """Draws from logits [N, V] at a rollout's temperature."""
    temperature = 0.7
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def prepare() -> Versions:
        logits = normal(n, v, dtype=dtype, device=device, scale=3.0)
        zero = torch.zeros(n, dtype=torch.int64, device=device)
        key = ops.DrawKey(zero + 42, zero + 7, zero, torch.arange(n, device=device) + 7)

        def filtered() -> Outputs:
            """By torch.topk or sort, and noise of what is left alone; of ties some may be left out."""
            values, tokens = logits.topk(top_k, dim=1) if top_k else logits.sort(dim=1, descending=True)
            scores = values.double() / temperature
            mass = scores.softmax(dim=1).flip(1).cumsum(dim=1).flip(1)
            stay = mass.float() > torch.tensor(1 - top_p, dtype=torch.float32)
            most = int(stay.sum(dim=1).max())
            scores = scores[:, :most].masked_fill(~stay[:, :most], -torch.inf)
            best = (scores + _noise(key, tokens[:, :most])).argmax(dim=1, keepdim=True)
            return [tokens.gather(1, best)[:, 0].double()]

        def body() -> Outputs:
            with ops.use_backend("torch"):
                return [ops.draw_tokens(logits, key, **options).double()]

        return Versions(
            lambda: [ops.draw_tokens(logits, key, **options).double()],
            body,
            filtered if top_k or top_p < 1 else body,
            lambda: [ops.draw_tokens(logits.double(), key, **options).double()],
        )

    names = [f"k={top_k}"] * (top_k > 0) + [f"p={top_p}"] * (top_p < 1)
    shape = " ".join([f"N={n} V={v}", *names])
    return Case("draw_tokens", shape, name_of(dtype), n * v * dtype.itemsize, 0, prepare)


def _noise(key: ops.DrawKey, tokens: Tensor) -> Tensor:
    """The noise of some tokens of each row, [N, k] float64."""
    seed, start, visit, position = (part[:, None] for part in key)
    counter = (tokens // 4, position & _LOW, start & _LOW, 4 * visit + 1 & _LOW)
    words = torch.stack(philox_4x32_10(counter, (seed & _LOW, seed >> 32 & _LOW)), dim=-1)
    word = words.gather(-1, (tokens % 4)[..., None])[..., 0]
    return -torch.log(-torch.log((word.double() + 0.5) / 2**32))
