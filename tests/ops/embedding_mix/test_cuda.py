"""embedding_mix and its backward by the CUDA kernels."""

from __future__ import annotations

import pytest

from ..contract import BackendContract
from .cases import EMBEDDING_MIX, EMBEDDING_MIX_BACKWARD

pytestmark = pytest.mark.usefixtures("cuda_kernels")


class TestForward(BackendContract):
    tested, backend = EMBEDDING_MIX, "cuda"


class TestBackward(BackendContract):
    tested, backend = EMBEDDING_MIX_BACKWARD, "cuda"
