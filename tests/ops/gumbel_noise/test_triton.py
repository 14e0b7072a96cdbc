"""The Triton gumbel_noise."""

from __future__ import annotations

from ..contract import BackendContract
from .cases import GUMBEL_NOISE


class TestContract(BackendContract):
    tested, backend = GUMBEL_NOISE, "triton"
