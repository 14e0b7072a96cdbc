"""Committed counts of instructions: a kernel that needs more than these is a failure.

``counts.json`` holds, for each target, the instructions an element of every kernel as the pinned Triton
compiles it. Another Triton's are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("counts.json")
TARGETS = ("sm_90", "gfx942")
TOLERANCE = 0.05  # a count may grow by as much

Row = dict[str, Any]
# By target, then by kernel.
Counts = dict[str, dict[str, float]]


def names(rows: Iterable[Row]) -> Iterator[tuple[str, str, Row]]:
    """(target, name, row) of each row with a count; the second of a name in a launch is numbered."""
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.get("instructions_per_element") is None or row["target"] not in TARGETS:
            continue
        target, name = row["target"], f"{row['op']}, {row['dtype']}, {row['launch']}: {row['kernel']}"
        number = seen[target, name] = seen.get((target, name), 0) + 1
        yield target, name if number == 1 else f"{name} #{number}", row


def load() -> tuple[str, Counts]:
    """The Triton that the counts are of, and the counts."""
    told = json.loads(PATH.read_text())
    return told["triton"], told["instructions_per_element"]


def compare(rows: Iterable[Row], committed: Counts) -> None:
    """Put a ``problem`` into each row whose kernel has grown or has no committed count."""
    for target, name, row in names(rows):
        count, before = row["instructions_per_element"], committed.get(target, {}).get(name)
        if row["problem"]:
            continue
        if before is None:
            row["problem"] = "no committed count: make compile-check COMPILE_ARGS=--write"
        elif count > before * (1 + TOLERANCE):
            row["problem"] = (
                f"{count:g} instructions an element, {count / before - 1:.0%} more than the {before:g} of "
                f"counts.json ({TOLERANCE:.0%} are allowed)"
            )


def renewed(rows: Iterable[Row], committed: Counts) -> Counts:
    """The counts with those of these rows; what of their ops and dtypes is no longer there goes."""
    rows = list(rows)
    checked = {(row["target"], f"{row['op']}, {row['dtype']}, ") for row in rows}
    new = {
        target: {
            name: count
            for name, count in committed.get(target, {}).items()
            if not any(name.startswith(prefix) for at, prefix in checked if at == target)
        }
        for target in TARGETS
    }
    for target, name, row in names(rows):
        new[target][name] = row["instructions_per_element"]
    return {target: dict(sorted(found.items())) for target, found in new.items()}


def store(triton: str, counts: Counts) -> None:
    PATH.write_text(json.dumps({"triton": triton, "instructions_per_element": counts}, indent=1) + "\n")
