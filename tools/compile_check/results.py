"""Rows that are committed: a file for each release of Triton, a line for each kernel."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "compile_check"


def store(rows: Iterable[dict[str, Any]], folder: Path = FOLDER) -> list[Path]:
    """Write the rows, in place of those that are there of the same releases."""
    by_release: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_release.setdefault(row["triton"], []).append(row)
    written = []
    for release, own in by_release.items():
        # In order: processes end when they do.
        own.sort(key=lambda row: (row["target"], row["op"], row["dtype"]))
        lines = ",\n".join(json.dumps(row) for row in own)
        path = folder / f"triton-{release}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"triton": "{release}", "kernels": [\n{lines}\n]}}\n')
        written.append(path)
    return written
