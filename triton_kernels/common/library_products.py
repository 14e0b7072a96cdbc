"""Products by the vendor's library, through ``torch.mm``: added up in float32, and never in less.

The library multiplies what lies in memory: where operands differ in dtype, or it has no half-precision
product with a float32 result, a few rows of the table at a time are converted.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from nabla_fast.plans.recording import recorder, step

from . import scratch

_lock = threading.Lock()
_users = 0  # of float32_products(), in all threads
_former = ""  # what is set again, if anything


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Inside, float32 operands are multiplied as they are, whatever the process has allowed elsewhere.

    The setting is the process': it returns when the last of several threads leaves.
    """
    global _users, _former
    settings = torch.backends.cuda.matmul
    with _lock:
        _users += 1
        if _users == 1:
            _former = settings.fp32_precision
            if _former == "tf32":
                # What is set for all of torch is followed again afterwards, not held.
                _former = "none" if torch.backends.fp32_precision == "tf32" else "tf32"
                settings.fp32_precision = "ieee"
            else:
                _former = ""
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _former:
                settings.fp32_precision = _former


def add_weighted_rows(sums: Tensor, weights: Tensor, table: Tensor, *, keep: bool) -> None:
    """sums = weights·table, or sums + weights·table if ``keep``.

    Args:
        sums: [N, H] float32, contiguous rows.
        weights: [N, C].
        table: [C, H].
    """
    if multiplies(weights, table):
        _add_product(sums, weights, table, keep=keep)
        return
    for part in _table_parts(table, len(weights)):
        _add_product(sums, weights[:, part].float(), table[part].float(), keep=keep)
        keep = True


def add_vocabulary_products(out: Tensor, states: list[Tensor], tables: list[Tensor]) -> None:
    """out = Σ_t states_t·tables_tᵀ.

    Args:
        out: [N, C] float32, contiguous rows.
        states: [N, H_t] each.
        tables: [C, H_t] each.
    """
    for index, (state, table) in enumerate(zip(states, tables, strict=True)):
        if multiplies(state, table):
            _add_product(out, state, table.T, keep=index > 0)
            continue
        state = state.float()
        for part in _table_parts(table, 0):
            _add_product(out[:, part], state, table[part].float().T, keep=index > 0)


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, keep: bool) -> None:
    if left.dtype == torch.float32:
        if (recording := recorder()) is not None:
            recording.within(float32_products)
        if keep:
            step(torch.addmm, out, left, right, out=out)
        else:
            step(torch.mm, left, right, out=out)
    elif keep:
        step(torch.addmm, out, left, right, out_dtype=torch.float32, out=out)
    else:
        step(torch.mm, left, right, out_dtype=torch.float32, out=out)


def multiplies(left: Tensor, right: Tensor) -> bool:
    """Whether the library multiplies these tensors without a copy of either."""
    return (
        left.dtype == right.dtype
        and _is_matrix(right)
        and (left.dtype == torch.float32 or _adds_in_float32(left.device, left.dtype))
    )


def _is_matrix(tensor: Tensor) -> bool:
    """Whether rows, or else columns, are contiguous and apart: what a library takes as it lies."""
    (rows, columns), (down, along) = tensor.shape, tensor.stride()
    return (along == 1 and down >= max(1, columns)) or (down == 1 and along >= max(1, rows))


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether half-precision products have float32 results here; tried once."""
    if device.type == "cpu":
        return False
    one = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        sums = torch.mm(one, one, out_dtype=torch.float32)
        torch.addmm(sums, one, one, out_dtype=torch.float32, out=sums)
    except RuntimeError:  # some releases for AMD
        return False
    return True


def _table_parts(table: Tensor, rows: int) -> Iterator[slice]:
    """Rows of a table whose float32 copies, with the columns of N rows of weights, take little memory."""
    return scratch.row_blocks(len(table), 4 * (table.shape[1] + rows), scratch.share(1))


def converted_bytes(states: list[Tensor], tables: list[Tensor]) -> int:
    """Bytes that a row of states takes where :func:`add_vocabulary_products` converts them."""
    widths = [
        state.shape[1]
        for state, table in zip(states, tables, strict=True)
        if state.dtype != torch.float32 and not multiplies(state, table)
    ]
    return 4 * max(widths, default=0)
