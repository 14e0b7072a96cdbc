"""Inputs of gumbel_noise."""

from __future__ import annotations

from typing import Any

from nabla_fast.ops import gumbel_noise

from ..contract import OpUnderTest
from ..inputs import WHOLE, Draw, cases_of
from ..shared import arguments


def noise_arguments(draw: Draw, rows: int, vocabulary: int) -> dict[str, Any]:
    return {"noise": draw.noise(rows), "vocabulary": vocabulary}


def good() -> dict[str, Any]:
    return {"noise": arguments.keys(), "vocabulary": arguments.VOCABULARY}


_NOISES: dict[str, dict[str, Any]] = {
    "one token": {"rows": 3, "vocabulary": 1},
    "two tokens": {"rows": 3, "vocabulary": 2},
    "odd": {"rows": 5, "vocabulary": 257},
    "one row": {"rows": 1, "vocabulary": 4099},
    "whole vocabulary": {"rows": 2, "vocabulary": WHOLE},
}

GUMBEL_NOISE = OpUnderTest(
    gumbel_noise,
    cases_of(noise_arguments, _NOISES),
    checked=("odd",),
    compiled=("odd",),
    rows_alone=True,
)
