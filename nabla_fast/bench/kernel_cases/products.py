"""Cases of the product that every path shares."""

from __future__ import annotations

import torch

import nabla_fast.ops as ops
from nabla_fast.bench.kernel_cases.case import Case, Versions, name_of, normal, normal_table, terms_of
from nabla_fast.bench.kernel_cases.in_place import Products, products_alone


def lm_logits(n: int, v: int, h: int, dtype: torch.dtype, device: torch.device) -> Case:
    """float32 logits [N, V] of float32 hidden states [N, H] under a head [V, H]."""

    def prepare() -> Versions:
        hidden = normal(n, h, dtype=torch.float32, device=device, scale=3.0)
        head = normal_table(v, h, dtype, device)
        products, logits = Products(n, head), hidden.new_empty(n, v)
        return Versions(
            lambda: [ops.lm_logits(hidden, head)],
            lambda: [hidden @ head.float().T],
            lambda: [products(hidden, head, logits)],
            lambda: [ops.lm_logits(hidden.double(), head)],
            products=products_alone(n, [head], []),
        )

    traffic = v * h * dtype.itemsize + 4 * n * v
    return Case(
        "lm_logits",
        f"N={n} V={v} H={h}",
        name_of(dtype),
        traffic,
        2 * n * v * h,
        prepare,
        terms_of(dtype),
    )
