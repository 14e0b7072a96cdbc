"""Cases of ``token_stats``."""

from __future__ import annotations

import torch
from torch import Tensor

import nabla_fast.ops as ops
from nabla_fast.bench.kernel_cases.case import (
    Case,
    Outputs,
    Versions,
    name_of,
    normal,
    normal_table,
    terms_of,
)
from nabla_fast.bench.kernel_cases.in_place import Products, products_alone, row_blocks


def token_stats(n: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Statistics of logits [N, V]."""

    def prepare() -> Versions:
        logits = normal(n, v, dtype=dtype, device=device, scale=3.0)
        eager = _InPlace(n, v, device)
        return Versions(
            lambda: _results(ops.token_stats(logits)),
            lambda: _naive(logits),
            lambda: eager(logits),
            lambda: _results(ops.token_stats(logits.double())),
        )

    return Case("token_stats", f"N={n} V={v}", name_of(dtype), n * v * dtype.itemsize, 0, prepare)


def token_stats_of_hidden(n: int, v: int, h: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Statistics of hidden states [N, H], float32 as the package keeps them, under a head [V, H]."""

    def prepare() -> Versions:
        hidden = normal(n, h, dtype=torch.float32, device=device, scale=3.0)
        head = normal_table(v, h, dtype, device)
        eager, products, logits = _InPlace(n, v, device), Products(n, head), hidden.new_empty(n, v)
        return Versions(
            lambda: _results(ops.token_stats(hidden, head)),
            lambda: _naive(hidden @ head.float().T),
            lambda: eager(products(hidden, head, logits)),
            lambda: _results(ops.token_stats(hidden.double(), head)),
            products=products_alone(n, [head], []),
        )

    shape = f"N={n} V={v} H={h}"
    traffic = v * h * dtype.itemsize
    return Case(
        "token_stats of hidden", shape, name_of(dtype), traffic, 2 * n * v * h, prepare, terms_of(dtype)
    )


def _results(stats: ops.TokenStats) -> Outputs:
    return [*stats[:3], stats.argmax.double()]


def _naive(logits: Tensor) -> Outputs:
    logp = torch.log_softmax(logits.float(), dim=-1)
    p = logp.exp()
    entropy = -(p * logp).sum(dim=-1)
    token = logits.argmax(dim=-1)
    return [torch.logsumexp(logits.float(), dim=-1), p.amax(dim=-1), entropy, token.double()]


class _InPlace:
    """By rows that stay in a cache, one exponential an element."""

    def __init__(self, n: int, v: int, device: torch.device):
        self._blocks = list(row_blocks(n, v, device))
        most = self._blocks[0].stop
        self._x, self._e = torch.empty(2, most, v, device=device)
        self._values = torch.empty(3, n, device=device)
        self._token = torch.empty(n, dtype=torch.float64, device=device)

    def __call__(self, logits: Tensor) -> Outputs:
        for rows in self._blocks:
            count = rows.stop - rows.start
            top, token = logits[rows].max(dim=-1, keepdim=True)  # faster than argmax
            x = self._x[:count].copy_(logits[rows]).sub_(top)
            e = torch.exp(x, out=self._e[:count])
            total = e.sum(dim=-1)
            moment = x.mul_(e).sum(dim=-1)
            log_total = total.log()
            torch.add(top.squeeze(1), log_total, out=self._values[0, rows])
            torch.reciprocal(total, out=self._values[1, rows])
            torch.sub(log_total, moment.div_(total), out=self._values[2, rows])
            self._token[rows] = token.squeeze(1).double()
        return [*self._values, self._token]
