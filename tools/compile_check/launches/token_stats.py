"""Launches of token_stats, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.token_stats import token_stats
from tools.compile_check.launches._products import vocabulary_tiles
from tools.compile_check.recording import Launch
from tools.compile_check.work import Work

ROWS, VOCABULARY, HIDDEN = 128, 151_936, 4096


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    logits = torch.empty(ROWS, VOCABULARY, dtype=dtype, device="meta")
    hidden = torch.empty(ROWS, HIDDEN, dtype=dtype, device="meta")
    head = torch.empty(VOCABULARY, HIDDEN, dtype=dtype, device="meta")
    yield "logits", lambda: token_stats(logits, None, 1.0)
    yield "hidden states", lambda: token_stats(hidden, head, 1.0)
    if dtype == torch.bfloat16:
        yield "float32 hidden states", lambda: token_stats(hidden.float(), head, 1.0)


def _of_logits(launch: Launch) -> Work:
    logits, parts = launch["logits_ptr"], launch["parts_ptr"]
    return Work(len(logits) * launch["vocabulary"], reads=[logits], writes=[parts])


def _of_hidden(launch: Launch) -> Work:
    return vocabulary_tiles(launch, writes=[launch["parts_ptr"]])


def _joined(launch: Launch) -> Work:
    parts = launch["parts_ptr"]
    # Two loops, over the slices in blocks.
    passes = -(-launch["slices"] // launch["BLOCK"])
    return Work(parts.shape[0] * launch["slices"], reads=[parts], passes=passes)


WORK = {
    "token_stats._logits_kernel": _of_logits,
    "token_stats._hidden_kernel": _of_hidden,
    "token_stats._join_kernel": _joined,
}
