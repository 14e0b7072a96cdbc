"""Cases of ``draw_tokens``."""

from __future__ import annotations

import torch
from torch import Tensor

import nabla_fast.ops as ops
from nabla_fast.bench.kernel_cases.case import Case, Outputs, Versions, name_of, normal
from nabla_fast.ops.gumbel_noise import philox_4x32_10

_LOW = 0xFFFFFFFF


def draw_tokens(n: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Draws from logits [N, V] by the settings of a rollout."""
    temperature, top_k, top_p = 0.7, 20, 0.8
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def prepare() -> Versions:
        logits = normal(n, v, dtype=dtype, device=device, scale=3.0)
        zero = torch.zeros(n, dtype=torch.int64, device=device)
        key = ops.DrawKey(zero + 42, zero + 7, zero, torch.arange(n, device=device) + 7)

        def eager() -> Outputs:
            """The k largest by torch.topk, and noise of these alone; no more of what ties with the k-th."""
            values, tokens = logits.topk(top_k, dim=1)
            scores = values.double() / temperature
            mass = scores.softmax(dim=1).flip(1).cumsum(dim=1).flip(1)
            scores.masked_fill_(mass.float() <= torch.tensor(1 - top_p, dtype=torch.float32), -torch.inf)
            best = (scores + _noise(key, tokens)).argmax(dim=1, keepdim=True)
            return [tokens.gather(1, best)[:, 0].double()]

        return Versions(
            lambda: [ops.draw_tokens(logits, key, **options).double()],
            lambda: [_by_body(logits, key, options)],
            eager,
            lambda: [ops.draw_tokens(logits.double(), key, **options).double()],
        )

    return Case("draw_tokens", f"N={n} V={v}", name_of(dtype), n * v * dtype.itemsize, 0, prepare)


def _by_body(logits: Tensor, key: ops.DrawKey, options: dict[str, float]) -> Tensor:
    with ops.use_backend("torch"):
        return ops.draw_tokens(logits, key, **options).double()


def _noise(key: ops.DrawKey, tokens: Tensor) -> Tensor:
    """The noise of some tokens of each row, [N, k] float64."""
    seed, start, visit, position = (part[:, None] for part in key)
    counter = (tokens // 4, position & _LOW, start & _LOW, 4 * visit + 1 & _LOW)
    words = torch.stack(philox_4x32_10(counter, (seed & _LOW, seed >> 32 & _LOW)), dim=-1)
    word = words.gather(-1, (tokens % 4)[..., None])[..., 0]
    return -torch.log(-torch.log((word.double() + 0.5) / 2**32))
