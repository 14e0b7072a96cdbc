"""Cases of the gradients that are made from small tensors.

Hidden states and cotangents are float32, as the package keeps them, whatever the dtype of the tables; so
are the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from nabla_fast.bench.kernel_cases.in_place import Products, products_alone

_NLL_COEFF = 1e-3


def onehot_grad(
    n: int, v: int, h: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Case:
    """Rows of G [N, V] from tables [V, H_t] and a head [V, H]."""
    return _onehot("onehot_grad", ops.onehot_grad, lambda g: g, n, v, h, widths, dtype, device)


def onehot_grad_norm(
    n: int, v: int, h: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Case:
    """‖G_i‖₂ of the same rows."""

    def norm(grad: Tensor) -> Tensor:
        return torch.linalg.vector_norm(grad, dim=-1)

    return _onehot("onehot_grad_norm", ops.onehot_grad_norm, norm, n, v, h, widths, dtype, device)


def _onehot(
    name: str,
    op: Callable[..., Tensor],
    result: Callable[[Tensor], Tensor],
    n: int,
    v: int,
    h: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    def prepare() -> Versions:
        hidden = normal(n, h, dtype=torch.float32, device=device, scale=3.0)
        head = normal_table(v, h, dtype, device)
        tables = [normal_table(v, width, dtype, device) for width in widths]
        cotangents = [normal(n, width, dtype=torch.float32, device=device) for width in widths]

        def ours(hidden: Tensor, cotangents: list[Tensor]) -> Outputs:
            return [op(cotangents, tables, hidden, head, nll_coeff=_NLL_COEFF)]

        def naive() -> Outputs:
            grad = sum(g @ t.float().T for g, t in zip(cotangents, tables, strict=True))
            log_pi = torch.log_softmax(hidden @ head.float().T, dim=-1)
            return [result(grad - _NLL_COEFF * log_pi)]

        products = Products(n, head), *(Products(n, t) for t in tables)
        grad, work = torch.empty(2, n, v, device=device)

        def eager() -> Outputs:
            z = products[0](hidden, head, grad)
            z.sub_(torch.logsumexp(z, dim=-1, keepdim=True)).mul_(-_NLL_COEFF)
            for times, g, t in zip(products[1:], cotangents, tables, strict=True):
                z.add_(times(g, t, work))
            return [result(z)]

        return Versions(
            lambda: ours(hidden, cotangents),
            naive,
            eager,
            lambda: ours(hidden.double(), [g.double() for g in cotangents]),
            products=products_alone(n, [head, *tables], []),
        )

    total = sum(widths) + h
    rows_out = 4 * n * v if op is ops.onehot_grad else 0
    return Case(
        name,
        f"N={n} V={v} H={h} H_t={'+'.join(map(str, widths))}",
        name_of(dtype),
        v * total * dtype.itemsize + rows_out,
        2 * n * v * total,
        prepare,
        terms_of(dtype),
    )


def nll_grad(n: int, v: int, h: int, dtype: torch.dtype, device: torch.device) -> Case:
    """∂/∂hidden [N, H] of the likelihood under a head [V, H]."""

    def prepare() -> Versions:
        hidden = normal(n, h, dtype=torch.float32, device=device, scale=3.0)
        head = normal_table(v, h, dtype, device)
        tokens = torch.randint(v, (n,), device=device)
        row = torch.arange(n, device=device)

        def naive() -> Outputs:
            wide = head.float()
            pi = torch.softmax(hidden @ wide.T, dim=-1)
            pi[row, tokens] -= 1
            return [pi @ wide]

        products, z = Products(n, head), hidden.new_empty(n, v)
        gradient = torch.empty_like(hidden)

        def eager() -> Outputs:
            pi = products(hidden, head, z)
            pi.sub_(pi.amax(dim=-1, keepdim=True)).exp_()
            pi.div_(pi.sum(dim=-1, keepdim=True))
            pi[row, tokens] -= 1
            return [products.mix(pi, head, gradient)]

        return Versions(
            lambda: [ops.nll_grad(hidden, head, tokens)],
            naive,
            eager,
            lambda: [ops.nll_grad(hidden.double(), head, tokens)],
        )

    return Case(
        "nll_grad",
        f"N={n} V={v} H={h}",
        name_of(dtype),
        v * h * dtype.itemsize,
        4 * n * v * h,
        prepare,
        terms_of(dtype),
    )
