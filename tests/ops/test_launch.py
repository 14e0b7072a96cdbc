"""Launches by a key of their own launch what Triton would, and call less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from nabla_fast.triton_kernels.common.launch import launched, repeated

LAUNCHES = Path(__file__).with_name("launches.py")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a driver that launches nothing is for other machines"
)
def test_launches_for_a_gpu_that_is_not_there():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, str(LAUNCHES)], env=environment, capture_output=True, text=True, timeout=500
    )
    if "launches cannot be timed" in process.stderr:
        pytest.skip(process.stderr.splitlines()[-1])
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    # Each call is compiled once; what is launched later is what Triton would launch, with its arguments.
    assert result["launches"] == {"same": 40, "other": 0, "compiled": 40}
    assert result["repeated"] == 5
    planned, watched = result["planned"], result["watched"]
    assert planned["other"] == planned["unplanned"] == []
    # A plan calls what Triton's launcher would call, as its call by the launcher does for each launch.
    assert all(by_launcher and not by_plan for by_launcher, by_plan in planned["launcher_runs"].values())
    # Whoever sets a hook or replaces a function hears of both kernels; then the plan is used again.
    assert watched == {
        "hooks": 4,
        "run": 2,
        "launcher": 2,
        "by_plan": 0,
        "by_plan_again": 0,
        "launches": 12,
    }
    calls = result["calls"]
    assert 2 * calls["repeated"] < calls["launched"] < calls["triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs only where there is no GPU")
def test_what_is_interpreted_is_launched_as_it_is():
    seen = []

    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **options: seen.append((grid, args, options))

    kernel = launched(Interpreted())
    step = repeated(kernel, (3,), "turn", 1, turn=0, BLOCK=4)
    step(7)
    assert seen == [((3,), (1,), {"turn": 7, "BLOCK": 4})]


def test_on_amd_triton_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel = object.__new__(triton.runtime.jit.JITFunction)
    assert launched(kernel) is kernel
