"""Cases of the embedding mixes.

Logits, where a case does not say otherwise, and hidden states are float32 whatever the dtype of the
tables: the package's z is the float32 product of head and hidden state, and its optimizer's state is
float32. Results have the tables' dtype, so that with bf16 tables both sides of every product may be bf16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import nabla_fast.ops as ops
from nabla_fast.bench.kernel_cases.case import Case, Outputs, Versions, name_of, normal, normal_table
from nabla_fast.bench.kernel_cases.in_place import Products, products_alone, softmax_gradient_
from nabla_fast.ops.linear_embedding_mix import MOST_KEPT_BYTES


def embedding_mix(
    n: int,
    v: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    hard: bool,
    backward: bool,
    logits: torch.dtype = torch.float32,
) -> Case:
    """Mixes of logits [N, V] with one table [V, H_t] a width; with ``backward`` the gradient alone."""

    def prepare() -> Versions:
        z = normal(n, v, dtype=logits, device=device, scale=3.0)
        tables = [normal_table(v, width, dtype, device) for width in widths]
        cotangents = [normal(n, width, dtype=dtype, device=device) for width in widths]

        def ours(z: Tensor, tables: list[Tensor], cotangents: list[Tensor]) -> Outputs:
            z = z.detach().requires_grad_(backward)
            mixes = ops.embedding_mix(z, tables, hard=hard)
            return list(torch.autograd.grad(mixes, z, cotangents)) if backward else mixes

        def naive() -> Outputs:
            leaf = z.detach().requires_grad_(backward)
            mixes = _naive_mixes(leaf, tables, hard)
            return list(torch.autograd.grad(mixes, leaf, cotangents)) if backward else mixes

        mix = _InPlace(n, tables)

        def eager() -> Outputs:
            mixes = mix.forward(z, hard)
            return [mix.backward(z, cotangents)] if backward else mixes

        return Versions(
            lambda: ours(z, tables, cotangents),
            naive,
            eager,
            lambda: ours(z.double(), *_in_float64(tables, cotangents)),
            products=products_alone(n, tables if backward else [], [] if hard else tables),
        )

    total, size = sum(widths), dtype.itemsize
    passes = (not hard) + backward
    return Case(
        "embedding_mix " + _form(hard, backward),
        f"N={n} V={v} H={'+'.join(map(str, widths))}"
        + ("" if logits == torch.float32 else f" z={name_of(logits)}"),
        name_of(dtype),
        logits.itemsize * n * v * (3 if backward else 1)
        + passes * v * total * size
        + (hard * n * total * size),
        2 * n * v * total * passes,
        prepare,
        int(dtype == torch.bfloat16),
    )


def linear_embedding_mix(
    n: int, v: int, h: int, dtype: torch.dtype, device: torch.device, *, hard: bool, backward: bool
) -> Case:
    """Mixes of hidden states [N, H] with one table, head and table [V, H]."""
    kept = device.type == "cpu" and 4 * n * v <= MOST_KEPT_BYTES

    def prepare() -> Versions:
        hidden = normal(n, h, dtype=torch.float32, device=device, scale=3.0)
        head, embeddings = (normal_table(v, h, dtype, device) for _ in range(2))
        cotangents = [normal(n, h, dtype=dtype, device=device)]

        def ours(hidden: Tensor, head: Tensor, tables: list[Tensor], cotangents: list[Tensor]) -> Outputs:
            hidden = hidden.detach().requires_grad_(backward)
            mixes = ops.linear_embedding_mix(hidden, head, tables, hard=hard)
            return list(torch.autograd.grad(mixes, hidden, cotangents)) if backward else mixes

        def naive() -> Outputs:
            leaf = hidden.detach().requires_grad_(backward)
            mixes = _naive_mixes(leaf @ head.float().T, [embeddings], hard)
            return list(torch.autograd.grad(mixes, leaf, cotangents)) if backward else mixes

        mix, products = _InPlace(n, [embeddings]), Products(n, head)
        z, dh = hidden.new_empty(n, v), torch.empty_like(hidden)

        def eager() -> Outputs:
            mixes = mix.forward(products(hidden, head, z), hard)
            return [products.mix(mix.backward(z, cotangents), head, dh)] if backward else mixes

        return Versions(
            lambda: ours(hidden, head, [embeddings], cotangents),
            naive,
            eager,
            # The head is widened block by block.
            lambda: ours(hidden.double(), head, *_in_float64([embeddings], cotangents)),
            products=products_alone(
                n,
                [head, *[head] * (not kept), embeddings] if backward else [head],
                [head] * backward + [embeddings] * (not hard),
            ),
        )

    # z, the soft mix; then G and ∂ℒ/∂h. The tiles of z are made again where they are not kept.
    products = 1 + (not hard) + (2 if kept else 3) * backward
    passes = 1 + (not hard) + 2 * backward
    return Case(
        "linear_embedding_mix " + _form(hard, backward),
        f"N={n} V={v} H={h}",
        name_of(dtype),
        v * h * passes * dtype.itemsize,
        2 * n * v * h * products,
        prepare,
        int(dtype == torch.bfloat16),
    )


def _form(hard: bool, backward: bool) -> str:
    return ("straight-through" if hard else "soft") + (" forward+backward" if backward else " forward")


def _in_float64(*lists: list[Tensor]) -> list[list[Tensor]]:
    return [[tensor.double() for tensor in tensors] for tensors in lists]


def _naive_mixes(z: Tensor, tables: list[Tensor], hard: bool) -> Outputs:
    y = torch.softmax(z, dim=-1, dtype=torch.float32)
    if hard:
        onehot = F.one_hot(z.argmax(dim=-1), z.shape[1]).to(y.dtype)
        y = onehot + y - y.detach()
    return [y.to(table.dtype) @ table for table in tables]


class _InPlace:
    """Both directions for one set of tables, with the memory for them."""

    def __init__(self, n: int, tables: list[Tensor]):
        v = len(tables[0])
        dtype, device = tables[0].dtype, tables[0].device
        self._tables = tables
        self._p, self._grad, self._work = torch.empty(3, n, v, device=device)
        half = dtype != torch.float32
        # A product in half precision has a result in half precision.
        self._half, self._half_grad = (
            torch.empty(2, n, v, dtype=dtype, device=device) if half else (None, None)
        )
        self._mixes = [torch.empty(n, t.shape[1], dtype=dtype, device=device) for t in tables]
        self._products = None if half else Products(n, tables[0])

    def forward(self, z: Tensor, hard: bool) -> Outputs:
        if hard:
            token = z.max(dim=-1).indices
            pairs = zip(self._tables, self._mixes, strict=True)
            return [torch.index_select(table, 0, token, out=out) for table, out in pairs]
        p = torch.softmax(z, dim=-1, dtype=torch.float32, out=self._p)
        y = p if self._half is None else self._half.copy_(p)
        return [torch.mm(y, table, out=out) for table, out in zip(self._tables, self._mixes, strict=True)]

    def backward(self, z: Tensor, cotangents: list[Tensor]) -> Tensor:
        p = torch.softmax(z, dim=-1, dtype=torch.float32, out=self._p)
        for number, (cotangent, table) in enumerate(zip(cotangents, self._tables, strict=True)):
            target = self._grad if number == 0 else self._work
            self._times(cotangent, table, target)
            if number:
                self._grad.add_(self._work)
        return softmax_gradient_(p, self._grad, self._work).to(z.dtype)

    def _times(self, cotangent: Tensor, table: Tensor, out: Tensor) -> None:
        if self._products is None:
            out.copy_(torch.mm(cotangent, table.T, out=self._half_grad))
        else:
            self._products(cotangent, table, out)
