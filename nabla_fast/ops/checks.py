"""Checks of op arguments that several ops share; each raises InputError with one line."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nabla_fast.config import TAU_RANGE
from nabla_fast.errors import InputError

MOST_VOCABULARY = 2**20


def expect(condition: bool, message: str) -> None:
    """Raise InputError(message) unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


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


def expect_tables(op: str, tables: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None) -> None:
    """At least one table and, where there are cotangents, as many."""
    expect(len(tables) > 0, f"{op}: at least one embedding table is needed")
    if cotangents is not None:
        expect(
            len(cotangents) == len(tables),
            f"{op}: one cotangent a table is needed, got {len(cotangents)} for {len(tables)}",
        )


def expect_rows(name: str, token_map: Tensor, rows: int) -> None:
    """Every token of a map [V] int64 has one of a table's rows."""
    low, high = token_map.aminmax()
    if low < 0 or high >= rows:
        token = int(((token_map < 0) | (token_map >= rows)).nonzero()[0])
        raise InputError(f"{name} gives token {token} row {int(token_map[token])} of a table of {rows}")


def expect_mix(
    op: str,
    vocabulary: int,
    tables: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    tau: float,
    direct: Tensor | None,
    **_: object,
) -> None:
    """What the table of a mix's arguments cannot say, over V tokens."""
    expect_vocabulary(op, vocabulary)
    expect_tables(op, tables, cotangents)
    expect_tau(op, tau)
    expect(
        direct is None or not direct.requires_grad,
        f"{op}: direct is a constant and must not require grad",
    )
