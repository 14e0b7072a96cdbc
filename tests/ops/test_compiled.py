"""What no interpreter shows: a row's bits follow neither alignment nor what surrounds an expression."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from nabla_fast.ops import backend_status

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

# Kernels whose only sums are of one number and zeros, of a G that is picked out.
_PICKED = {"sums_kernel"}
OPS = ["token_stats", "softmax_sums", "dto_descent", "dto_descent_latents"]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_neither_alignment_nor_contraction_changes_a_row(op: str):
    process = subprocess.run(
        [sys.executable, "-m", "tests.ops.compiled", op],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    kernels = json.loads(process.stdout)
    assert not any(kernel["contracts"] for kernel in kernels)
    assert any(kernel["sums"] for kernel in kernels)
    assert all(kernel["early"] == kernel["waits_first"] for kernel in kernels)
    assert any(kernel["early"] for kernel in kernels) == (op == "dto_descent")
    loads = {"aligned": 0, "odd": 0}
    for kernel in kernels:
        loads[kernel["alignment"]] += kernel["vector_loads"]
    assert loads["aligned"] > loads["odd"]  # the two are laid out differently
    key = lambda kernel: (kernel["launch"], kernel["kernel"])  # noqa: E731
    for (_, name), copies in groupby(sorted(kernels, key=key), key):
        sums = [kernel["sums"] for kernel in copies]
        assert name in _PICKED or all(other == sums[0] for other in sums)
