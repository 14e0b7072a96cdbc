"""A case: an op at a size, with what no version of it can do without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Sizes of a language model of 7 billion parameters with a reward model beside it.
ROWS = (512, 64, 8, 1)
VOCABULARY, WIDTHS = 151_936, (3584, 2560)
HIDDEN, WIDTH = WIDTHS[0], sum(WIDTHS)
ITERS = 20


@dataclass(frozen=True)
class Case:
    """One line of the predictions.

    Attributes:
        op, of: name of the op, and of its variant with the dtypes.
        rows: N.
        call: the op's launcher on meta tensors.
        flops: of the op, with each operand whole: 2 a multiply-add.
        bytes: through memory at least, each input read and each result written once.
        goal: share of the limit that is wanted.
        goal_seconds: time that is wanted, where a share says nothing.
    """

    op: str
    of: str
    rows: int
    call: Callable[[], object]
    flops: float
    bytes: float
    goal: float | None = None
    goal_seconds: float | None = None
