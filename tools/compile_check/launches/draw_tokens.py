"""Launches of draw_tokens: a step's draws from a large vocabulary, filtered in two ways and not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.draw_tokens import draw_tokens
from tools.compile_check.recording import Launch
from tools.compile_check.work import Work

_ROWS, _VOCABULARY = 16, 151_936


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    logits = torch.empty(_ROWS, _VOCABULARY, dtype=dtype, device="meta")
    key = (torch.empty(_ROWS, dtype=torch.int64, device="meta"),) * 4
    yield "all", lambda: draw_tokens(logits, key, False, 0.7, 0, 1.0)
    yield "top-k 20", lambda: draw_tokens(logits, key, False, 0.7, 20, 1.0)
    yield "top-k 20, top-p 0.8", lambda: draw_tokens(logits, key, False, 0.7, 20, 0.8)


def _slices(launch: Launch) -> Work:
    logits, best, token = (launch[name] for name in ("logits_ptr", "best_ptr", "token_ptr"))
    return Work(elements=logits.numel(), reads=[logits], writes=[best, token])


def _joined(launch: Launch) -> Work:
    best, token = launch["best_ptr"], launch["token_ptr"]
    return Work(elements=best.numel(), reads=[best, token], writes=[launch["drawn_ptr"]])


def _maxima(launch: Launch) -> Work:
    logits, maxima = launch["logits_ptr"], launch["maxima_ptr"]
    return Work(elements=logits.numel(), reads=[logits], writes=[maxima])


def _filtered(launch: Launch) -> Work:
    # Eight passes over the maxima; of the logits the groups that hold the k largest.
    logits, maxima = launch["logits_ptr"], launch["maxima_ptr"]
    read = len(logits) * launch["top_k"] * launch["GROUP"] * logits.element_size()
    return Work(
        elements=maxima.numel(), reads=[maxima, (logits, read)], writes=[launch["drawn_ptr"]], passes=8.0
    )


WORK = {
    "draw_tokens._slice_draws_kernel": _slices,
    "draw_tokens._join_kernel": _joined,
    "draw_tokens._maxima_kernel": _maxima,
    "draw_tokens._filtered_draws_kernel": _filtered,
}
