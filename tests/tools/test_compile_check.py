"""The compile check: what it reads, what it calls a failure, and one kernel through all of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.compile_check.resources import Resources, amd_usage, nvidia_usage
from tools.compile_check.targets import TARGETS

PRINTED = """
Resource usage:
 Common:
  GLOBAL:0
 Function k:
  REG:202 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ASSEMBLY = """
    .name:           k
    .private_segment_fixed_size: 24
    .sgpr_count:     16
    .vgpr_count:     204
    .vgpr_spill_count: 6
"""


def test_usage():
    assert nvidia_usage(PRINTED) == (202, 16)
    assert amd_usage(ASSEMBLY) == (204, 24)


def test_usage_of_another_format():
    with pytest.raises(ValueError, match="not enough values"):
        nvidia_usage("Resource usage: none")


@pytest.mark.parametrize(
    ("used", "problem"),
    [
        (Resources(255, 0, 232_448, True, True), None),
        (Resources(255, 0, 0, False, False), None),
        (Resources(255, 8, 0, True, True), "spills: 8 bytes of stack a thread"),
        (Resources(8, 0, 232_449, False, False), "232449 bytes of shared memory, 232448 are allowed"),
        (Resources(8, 0, 0, False, True), "half-precision products without HGMMA"),
    ],
)
def test_problems(used: Resources, problem: str | None):
    assert used.problem(TARGETS["sm_90"]) == problem


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_one_kernel():
    command = [sys.executable, "-m", "tools.compile_check", "--json", "--workers", "1"]
    command += ["--ops", "gumbel_noise", "--dtypes", "float32", "--targets", "sm_90", "gfx942"]
    process = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},  # which it must not heed
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    result = json.loads(process.stdout)
    assert result["failed"] == 0
    assert {row["target"] for row in result["kernels"]} == {"sm_90", "gfx942"}
    for row in result["kernels"]:
        assert row["kernel"] == "_gumbel_noise_kernel"
        assert 0 < row["registers"] <= 256
        assert row["stack"] == 0
        assert not row["half_products"]
