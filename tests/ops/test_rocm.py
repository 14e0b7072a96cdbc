"""An AMD GPU as torch's ROCm build shows it: nothing on the Python side asks what only CUDA answers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nabla_fast import _triton, env
from nabla_fast.ops.limits import triton_backend
from nabla_fast.triton_kernels import dto_descent
from nabla_fast.triton_kernels.common import presets
from tools.gpu_run.__main__ import FIND_GPU, TARGETS

DEVICE = torch.device("cuda", 0)
# What ROCm's properties have that launchers could ask for; a compute capability means nothing there.
MI300X = SimpleNamespace(
    name="AMD Instinct MI300X",
    gcnArchName="gfx942:sramecc+:xnack-",
    major=9,
    minor=4,
    multi_processor_count=304,
    L2_cache_size=4 << 20,
    total_memory=192 << 30,
    warp_size=64,
)


@pytest.fixture(autouse=True)
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_cuda(*_: object) -> None:
        raise AssertionError("a compute capability is CUDA's alone")

    monkeypatch.setattr(torch.version, "hip", "6.4.43484", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: MI300X)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of_cuda)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    presets._names.cache_clear()
    yield
    presets._names.cache_clear()


def test_the_kernels_are_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert _triton.why_missing.__wrapped__() is None


def test_presets_by_architecture():
    assert presets._names(DEVICE) == ("AMD Instinct MI300X", "gfx942", "default")
    entries = json.loads(presets.PATH.read_text())
    for kernel, kinds in entries["default"]["kernels"].items():
        for operands, default in kinds.items():
            own = entries.get("gfx942", {"kernels": {}})["kernels"].get(kernel, {}).get(operands, default)
            assert presets.config(kernel, operands, DEVICE) == own


def test_rows_that_stay_in_the_cache():
    z = SimpleNamespace(is_cuda=True, device=DEVICE, shape=(512, 151_936))
    assert dto_descent.rows_at_once(z, 4) == 1
    assert dto_descent.rows_at_once(SimpleNamespace(is_cuda=True, device=DEVICE, shape=(9, 1000)), 4) == 196


def test_tensors_are_taken():
    tensor = SimpleNamespace(is_cuda=True, is_cpu=False, dtype=torch.bfloat16, device=DEVICE)
    tensor.is_floating_point = lambda: True
    assert triton_backend._tensor_refusal("logits", tensor) is None
    tensor.dtype = torch.float64
    assert triton_backend._tensor_refusal("logits", tensor).startswith("logits is float64")


def test_the_environment_names_it():
    (gpu,) = env._gpus()
    assert gpu["name"] == "AMD Instinct MI300X"
    assert gpu["architecture"] == "gfx942"


def test_the_gpu_run_finds_it():
    fake = """
import torch
torch.version.hip = "6.4"
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "AMD Instinct MI300X"
torch.cuda.get_device_properties = lambda: type("P", (), {"gcnArchName": "gfx942:sramecc+:xnack-"})
"""
    process = subprocess.run(
        [sys.executable, "-c", fake + FIND_GPU], capture_output=True, text=True, check=True, timeout=120
    )
    assert process.stdout.splitlines() == ["AMD Instinct MI300X", "gfx942"]
    assert "gfx942" in TARGETS
