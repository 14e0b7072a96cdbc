"""Statistics of rows, rows of the one-hot gradient and their norms; bfloat16 tables."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nabla_fast.triton_kernels.onehot_grad import onehot_grad, onehot_grad_norm
from nabla_fast.triton_kernels.token_stats import token_stats
from tools.compile_check.model.cases import HIDDEN, ROWS, VOCABULARY, WIDTH, WIDTHS, Case

_THREE_TERMS = 0.60 / 3  # 60 % where a float32 operand takes three products with bfloat16
_BYTES = {torch.float32: 4.0, torch.bfloat16: 2.0}


def cases() -> Iterator[Case]:
    for rows in ROWS:
        yield from _stats(rows)
        yield from _gradients(rows)


def _stats(rows: int) -> Iterator[Case]:
    head = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="meta")
    for dtype, size in _BYTES.items():
        name = str(dtype).removeprefix("torch.")
        logits = torch.empty(rows, VOCABULARY, dtype=dtype, device="meta")
        yield Case(
            "token_stats",
            f"{name} logits",
            rows,
            lambda logits=logits: token_stats(logits, None, 1.0),
            0.0,
            size * rows * VOCABULARY,
            goal=0.85 if rows == 512 and dtype == torch.bfloat16 else None,
        )
        hidden = torch.empty(rows, HIDDEN, dtype=dtype, device="meta")
        yield Case(
            "token_stats",
            f"{name} hidden states",
            rows,
            lambda hidden=hidden: token_stats(hidden, head, 1.0),
            2.0 * rows * VOCABULARY * HIDDEN,
            2.0 * VOCABULARY * HIDDEN,
            goal=_THREE_TERMS if rows == 512 and dtype == torch.float32 else None,
        )


def _gradients(rows: int) -> Iterator[Case]:
    tables = [torch.empty(VOCABULARY, width, dtype=torch.bfloat16, device="meta") for width in WIDTHS]
    cotangents = [torch.empty(rows, width, device="meta") for width in WIDTHS]
    hidden = torch.empty(rows, HIDDEN, device="meta")
    arguments = (cotangents, tables, hidden, tables[0], 1e-3, [])
    flops = 2.0 * rows * VOCABULARY * (WIDTH + HIDDEN)
    read = 2.0 * VOCABULARY * (WIDTH + HIDDEN)
    goal = _THREE_TERMS if rows == 512 else None
    written = 4.0 * rows * VOCABULARY
    of = "float32 states"
    yield Case("onehot_grad", of, rows, lambda: onehot_grad(*arguments), flops, read + written, goal)
    yield Case("onehot_grad_norm", of, rows, lambda: onehot_grad_norm(*arguments), flops, read, goal)
