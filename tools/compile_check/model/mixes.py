"""The mixes over logits and over hidden states, forward and backward; bfloat16 tables, soft weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nabla_fast.triton_kernels import embedding_mix, linear_embedding_mix
from tools.compile_check.model.cases import HIDDEN, ROWS, VOCABULARY, WIDTH, WIDTHS, Case

_FEW_ROWS = 0.70  # of memory's rate: reading the tables is all that few rows need
_OPTIONS = {"tau": 1.0, "noise": None}


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    for rows in ROWS:
        yield from _over_logits(rows)
        yield from _over_hidden(rows)


def _over_logits(rows: int) -> Iterator[Case]:
    tables = [_empty(VOCABULARY, width) for width in WIDTHS]
    cotangents = [_empty(rows, width) for width in WIDTHS]
    flops = 2.0 * rows * VOCABULARY * WIDTH
    read = 2.0 * VOCABULARY * WIDTH
    logits = _empty(rows, VOCABULARY, dtype=torch.float32)
    yield Case(
        "embedding_mix",
        "soft, forward, float32 logits",
        rows,
        lambda: embedding_mix.embedding_mix(logits, tables, hard=False, **_OPTIONS),
        flops,
        read + 4.0 * rows * VOCABULARY,
        goal=0.85 if rows == 512 else _FEW_ROWS,
    )
    for dtype, size, goal in ((torch.float32, 4, 0.75), (torch.bfloat16, 2, 0.70)):
        own = logits.to(dtype)
        yield Case(
            "embedding_mix",
            f"backward, {str(dtype).removeprefix('torch.')} logits",
            rows,
            lambda own=own: embedding_mix.embedding_mix_backward(
                cotangents, own, tables, direct=None, **_OPTIONS
            ),
            flops,
            read + 2.0 * size * rows * VOCABULARY,
            goal=goal if rows == 512 else _FEW_ROWS,
        )


def _over_hidden(rows: int) -> Iterator[Case]:
    head, *_ = tables = [_empty(VOCABULARY, width) for width in WIDTHS]
    cotangents = [_empty(rows, width) for width in WIDTHS]
    hidden = _empty(rows, HIDDEN)
    read = 2.0 * VOCABULARY * (HIDDEN + WIDTH)
    yield Case(
        "linear_embedding_mix",
        "soft, forward, bfloat16",
        rows,
        lambda: linear_embedding_mix.linear_embedding_mix(hidden, head, tables, hard=False, **_OPTIONS),
        2.0 * rows * VOCABULARY * (HIDDEN + WIDTH),
        read,
        goal=0.60 if rows == 512 else _FEW_ROWS,
    )
    yield Case(
        "linear_embedding_mix",
        "backward, bfloat16",
        rows,
        lambda: linear_embedding_mix.linear_embedding_mix_backward(
            cotangents, hidden, head, tables, direct=None, **_OPTIONS
        ),
        2.0 * rows * VOCABULARY * (2 * HIDDEN + WIDTH),
        read,
        goal=0.60 if rows == 512 else _FEW_ROWS,
    )
