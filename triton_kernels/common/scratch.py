"""Device memory that a launcher takes beside its inputs and results: at most BYTES, whatever the sizes.

Not counted are a few numbers a row, which are little beside the row.
"""

from __future__ import annotations

from collections.abc import Iterator

from .sizes import cdiv

BYTES = 64_000_000

_ROWS = 16  # of the smallest tile


def share(sixteenths: int) -> int:
    """Bytes that are this part of BYTES."""
    return BYTES * sixteenths // 16


def row_blocks(rows: int, row_bytes: int, budget: int, *, tile: int = _ROWS) -> Iterator[slice]:
    """Parts of N rows, nearly equal, whose scratch of ``row_bytes`` a row fits in ``budget`` bytes.

    A single row is a part even if it does not fit.

    Args:
        tile: rows that are multiplied together, a multiple of the smallest tile's.
    """
    most = max(1, budget // max(1, row_bytes))
    if most < tile:
        tile = _ROWS
    most = most // tile * tile or most
    step = cdiv(rows, cdiv(rows, most)) if rows else 1
    # Whole tiles; `most` is a multiple of them if it holds one.
    step = min(cdiv(step, tile) * tile, most)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
