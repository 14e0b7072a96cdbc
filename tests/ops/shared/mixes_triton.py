"""Mixes over several chunks of the vocabulary: cases for the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from nabla_fast.ops.registry import Op

from ..harness import check, run
from ..inputs import BF16, F16, F32, Case, Draw
from .mixes import backward_arguments, mix_arguments

# Three slices, the last one short.
VOCABULARY = 2 * 4096 + 131


def _changed(
    recipe: Callable[..., dict[str, Any]],
    change: Callable[[dict[str, Any]], None],
    draw: Draw,
    **sizes: Any,
) -> dict[str, Any]:
    arguments = recipe(draw, **sizes)
    change(arguments)
    return arguments


def _rising(arguments: dict[str, Any]) -> None:
    """Every chunk has a larger logit than those before, and by far in some rows."""
    logits = arguments["logits"]
    step = torch.tensor([0.0, 1.0, 9.0, 60.0, 200.0])[: len(logits), None]
    logits += step * (torch.arange(logits.shape[1]) // 4096)


def _masked(arguments: dict[str, Any]) -> None:
    """Chunks without a finite logit: the first, the last, all but the middle one."""
    logits = arguments["logits"]
    logits[0, :4096] = logits[1, 8192:] = logits[2, :4096] = logits[2, 8192:] = -torch.inf
    logits[3, 1:] = -torch.inf


def _huge(arguments: dict[str, Any]) -> None:
    """Logits at the end of float32's range."""
    logits = arguments["logits"]
    logits[0] *= 1e37
    logits[1] = -3e38
    logits[1, 5000] = 3e38


def _same(arguments: dict[str, Any]) -> None:
    pass


def chunk_cases(backward: bool, hidden: int = 0) -> list[Case]:
    """Cases whose chunks are single slices, see :func:`short_chunks`."""
    recipe = backward_arguments if backward else mix_arguments
    sizes: dict[str, Any] = {"rows": 5, "vocabulary": VOCABULARY, "tables": ((9, F32), (5, F32))}
    half = sizes | {"dtype": BF16, "tables": ((9, BF16), (6, F16), (3, F32))}
    kinds = {
        "chunks": (_same, sizes | {"direct": True, "tau": 0.7}),
        "chunks, noise": (_same, sizes | {"noise": True, "tau": 1.3}),
        "chunks, half": (_same, half | {"direct": True}),
        "chunks, half, noise": (_same, half | {"noise": True, "tau": 0.3}),
        "chunks, fp16": (_same, sizes | {"dtype": F16, "tables": ((9, F16),)}),
        "chunks, one row": (_same, sizes | {"rows": 1}),
    }
    if not hidden:
        kinds |= {
            "chunks, rising": (_rising, sizes | {"direct": True}),
            "chunks, rising, half": (_rising, half | {"tau": 2.7}),
            "chunks, masked": (_masked, sizes | {"direct": True}),
            "chunks, masked, half": (_masked, half | {"noise": True}),
            "chunks, huge": (_huge, sizes),
        }
    mode = {} if backward else {"hard": False}
    return [
        Case(name, partial(_changed, recipe, change, **given, hidden=hidden, **mode))
        for name, (change, given) in kinds.items()
    ]


def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slice is a chunk."""
    from nabla_fast.triton_kernels.common import vocabulary_chunks

    monkeypatch.setattr(vocabulary_chunks, "CHUNK_SHARE", 0)


def check_chunks(op: Op, case: Case, draw: Draw, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float64 rule, where every slice is a chunk."""
    short_chunks(monkeypatch)
    check(op, case, draw, device, lambda arguments: run(op, "triton", arguments))


def check_parts(op: Op, case: Case, draw: Draw, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float64 rule, where the scratch memory holds some of the rows at a time."""
    from nabla_fast.triton_kernels.common import scratch

    monkeypatch.setattr(scratch, "BYTES", 24_000)
    check(op, case, draw, device, lambda arguments: run(op, "triton", arguments))


def part_cases(backward: bool, hidden: int = 0) -> list[Case]:
    """Cases of 37 rows that do not fit, see :func:`check_parts`."""
    recipe = backward_arguments if backward else mix_arguments
    sizes: dict[str, Any] = {"rows": 37, "vocabulary": 515, "tables": ((8, BF16), (5, F32)), "tau": 0.7}
    mode = {} if backward else {"hard": False}
    return [
        Case(name, partial(recipe, **sizes, dtype=dtype, noise=True, direct=True, hidden=hidden, **mode))
        for name, dtype in (("parts", F32), ("parts, half", BF16))
    ]
