"""Checks of op arguments that several ops share; each raises InputError with one line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast.config import TAU_RANGE
from nabla_fast.errors import InputError

MOST_VOCABULARY = 2**20


def expect(condition: bool, message: str) -> None:
    """Raise InputError(message) unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def expect_matrix(
    op: str, name: str, tensor: Tensor, columns: int | None = None, rows: int | None = None
) -> None:
    """``tensor`` must be a floating-point matrix of the given numbers of rows and columns."""
    shape = list(tensor.shape)
    wanted = f"[{'N' if rows is None else rows}, {'M' if columns is None else columns}]"
    good = (
        len(shape) == 2
        and tensor.is_floating_point()
        and (columns is None or shape[1] == columns)
        and (rows is None or shape[0] == rows)
    )
    expect(good, f"{op}: {name} must be a float tensor {wanted}, got {tensor.dtype} {shape}")


def expect_vocabulary(op: str, vocabulary: int) -> None:
    """1 ≤ V ≤ 2²⁰."""
    expect(
        1 <= vocabulary <= MOST_VOCABULARY,
        f"{op}: the vocabulary must hold 1 to {MOST_VOCABULARY} tokens, got {vocabulary}",
    )


def expect_tau(op: str, tau: float) -> None:
    """A temperature is one that finite logits may be divided by in float32."""
    low, high = TAU_RANGE
    expect(low <= tau <= high, f"{op}: tau must be from {low:.3g} to {high:.3g}, got {tau}")


def expect_tables(
    op: str, tables: Sequence[Tensor], vocabulary: int, token_maps: Sequence[Tensor | None] = ()
) -> None:
    """At least one table, each [V, H_t], or of any rows with a map that has one of them for each token.

    A map on the CPU is read; for one on a device nobody waits.
    """
    expect(len(tables) > 0, f"{op}: at least one embedding table is needed")
    expect(
        len(token_maps) in (0, len(tables)),
        f"{op}: one token map a table is needed, or none, got {len(token_maps)} for {len(tables)}",
    )
    for t, table in enumerate(tables):
        token_map = token_maps[t] if token_maps else None
        expect_matrix(op, f"tables[{t}]", table, rows=vocabulary if token_map is None else None)
        if token_map is None:
            continue
        expect(
            token_map.dtype == torch.int64 and list(token_map.shape) == [vocabulary],
            f"{op}: token_maps[{t}] must be int64 [{vocabulary}], "
            f"got {token_map.dtype} {list(token_map.shape)}",
        )
        if token_map.device.type == "cpu":
            expect_rows(f"{op}: token_maps[{t}]", token_map, len(table))


def expect_rows(name: str, token_map: Tensor, rows: int) -> None:
    """Every token of a map [V] int64 has one of a table's rows."""
    low, high = token_map.aminmax()
    if low < 0 or high >= rows:
        token = int(((token_map < 0) | (token_map >= rows)).nonzero()[0])
        raise InputError(f"{name} gives token {token} row {int(token_map[token])} of a table of {rows}")


def expect_one_device(op: str, *tensors: Tensor | None) -> None:
    """All tensors must be on one device."""
    devices = {str(t.device) for t in tensors if t is not None}
    expect(len(devices) <= 1, f"{op}: tensors are on different devices: {', '.join(sorted(devices))}")


def expect_noise(op: str, noise: tuple[Tensor, Tensor] | None, rows: int) -> None:
    """Gumbel noise is keyed by one int64 seed and one int64 position a row."""
    for name, tensor in zip(("seed", "position"), noise or (), strict=False):
        expect(
            tensor.dtype == torch.int64 and list(tensor.shape) == [rows],
            f"{op}: noise.{name} must be int64 [{rows}], got {tensor.dtype} {list(tensor.shape)}",
        )


def expect_mix(
    op: str,
    rows: int,
    vocabulary: int,
    tables: Sequence[Tensor],
    *inputs: Tensor,
    tau: float,
    noise: tuple[Tensor, Tensor] | None,
    direct: Tensor | None,
) -> None:
    """A mix of N rows over V tokens has good arguments, all on one device with its ``inputs``."""
    expect_vocabulary(op, vocabulary)
    expect_tables(op, tables, vocabulary)
    expect_one_device(op, *inputs, *tables, *(noise or ()), direct)
    expect_tau(op, tau)
    expect_noise(op, noise, rows)
    if direct is not None:
        expect_matrix(op, "direct", direct, rows=rows, columns=vocabulary)
        expect(not direct.requires_grad, f"{op}: direct is a constant and must not require grad")
