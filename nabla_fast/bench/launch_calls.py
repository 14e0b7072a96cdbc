"""Calls of the ops whose cost before the kernels run is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import nabla_fast.ops as ops
from nabla_fast.ops.embedding_mix import embedding_mix_backward
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Sizes:
    """Rows N, vocabulary V, widths H_t of the tables, of which the first is the hidden states' too, and
    steps K of a descent of one row."""

    rows: int = 8
    vocabulary: int = 151_936
    widths: tuple[int, ...] = (3584, 2560)
    steps: int = 20

    def __str__(self) -> str:
        return f"N={self.rows} V={self.vocabulary} ΣH={sum(self.widths)}"


REAL, TINY = Sizes(), Sizes(2, 16, (8, 4), 1)


@dataclass(frozen=True)
class Call:
    """One call of an op. Nothing is allocated before ``prepare`` is called."""

    op: str
    shape: str
    prepare: Callable[[], Callable[[], object]]


def calls(sizes: Sizes, device: torch.device, table_dtype: torch.dtype) -> list[Call]:
    """The ops, with tables of ``table_dtype``. Where it is possible nothing is written to their inputs."""
    n, v, h = sizes.rows, sizes.vocabulary, sizes.widths[0]

    def empty(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
        # Small ones are good rows; large ones are never read where no kernel runs.
        tensor = torch.empty(*shape, dtype=dtype, device=device)
        return tensor if tensor.numel() > 1 << 24 else tensor.zero_()

    def table(width: int) -> Tensor:
        return empty(v, width, dtype=table_dtype)

    def tables() -> list[Tensor]:
        return [table(width) for width in sizes.widths]

    def cotangents() -> list[Tensor]:
        return [empty(n, width, dtype=table_dtype) for width in sizes.widths]

    def mix(hard: bool) -> Callable[[], object]:
        logits, read = empty(n, v), tables()
        return lambda: ops.embedding_mix(logits, read, hard=hard)

    def mix_backward() -> Callable[[], object]:
        logits, read, given = empty(n, v), tables(), cotangents()
        return lambda: embedding_mix_backward(given, logits, read, tau=1.0, noise=None, direct=None)

    def mix_with_gradient() -> Callable[[], object]:
        logits, read, given = empty(n, v).requires_grad_(), tables(), cotangents()
        return lambda: torch.autograd.grad(ops.embedding_mix(logits, read), logits, given)

    def linear(hard: bool) -> Callable[[], object]:
        hidden, head, read = empty(n, h, dtype=table_dtype), table(h), tables()
        return lambda: ops.linear_embedding_mix(hidden, head, read, hard=hard)

    def linear_backward() -> Callable[[], object]:
        hidden, head, read = empty(n, h, dtype=table_dtype), table(h), tables()
        given, options = cotangents(), {"tau": 1.0, "noise": None, "direct": None}
        return lambda: linear_embedding_mix_backward(given, hidden, head, read, **options)

    def stats(of_hidden: bool) -> Callable[[], object]:
        rows = empty(n, h if of_hidden else v)
        head = table(h) if of_hidden else None
        return lambda: ops.token_stats(rows, head)

    def onehot(op: Callable[..., object]) -> Callable[[], object]:
        given = ([empty(n, width) for width in sizes.widths], tables(), empty(n, h), table(h))
        return lambda: op(*given, nll_coeff=1e-3)

    def product() -> Callable[[], object]:
        hidden, head = empty(n, h), table(h)
        return lambda: ops.lm_logits(hidden, head)

    def descent() -> Callable[[], object]:
        z, grad, schedule = empty(1, v), empty(1, v), ops.cosine_schedule(sizes.steps, 0.01).to(device)
        state = ops.AdamState.zeros(z)
        return lambda: ops.dto_descent(z, grad, state, schedule)

    def latents() -> Callable[[], object]:
        hidden, head, grad = empty(1, h), table(h), empty(1, v)
        state, schedule = ops.AdamState.zeros(hidden), ops.cosine_schedule(sizes.steps, 0.01).to(device)
        return lambda: ops.dto_descent_latents(hidden, head, grad, state, schedule)

    shape, steps = str(sizes), f"N=1 V={v} K={sizes.steps}"
    return [
        Call("embedding_mix, straight-through", shape, lambda: mix(True)),
        Call("embedding_mix, soft", shape, lambda: mix(False)),
        Call("embedding_mix_backward", shape, mix_backward),
        Call("embedding_mix with autograd, forward and backward", shape, mix_with_gradient),
        Call("linear_embedding_mix, straight-through", shape, lambda: linear(True)),
        Call("linear_embedding_mix, soft", shape, lambda: linear(False)),
        Call("linear_embedding_mix_backward", shape, linear_backward),
        Call("token_stats of logits", shape, lambda: stats(False)),
        Call("token_stats of hidden states", shape, lambda: stats(True)),
        Call("onehot_grad", shape, lambda: onehot(ops.onehot_grad)),
        Call("onehot_grad_norm", shape, lambda: onehot(ops.onehot_grad_norm)),
        Call("lm_logits", shape, product),
        Call("dto_descent", steps, descent),
        Call("dto_descent_latents", f"{steps} H={h}", latents),
    ]


def yardsticks() -> list[Call]:
    """What torch's own smallest calls cost on the CPU."""
    one = torch.ones(1, 1)
    return [
        Call("torch.softmax", "one element", lambda: lambda: torch.softmax(one, -1)),
        Call("torch.mm", "one element", lambda: lambda: torch.mm(one, one)),
    ]
