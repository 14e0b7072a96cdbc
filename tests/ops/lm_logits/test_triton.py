"""The Triton lm_logits."""

from __future__ import annotations

from ..contract import BackendContract
from .cases import LM_LOGITS


class TestContract(BackendContract):
    tested, backend = LM_LOGITS, "triton"
