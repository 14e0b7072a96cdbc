"""Whether Triton kernels are there, and which arguments they take."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from nabla_fast import _triton
from nabla_fast.ops import use_backend
from nabla_fast.ops.limits.triton_backend import refusal


@pytest.fixture
def why(monkeypatch: pytest.MonkeyPatch):
    """The reason on a machine without TRITON_INTERPRET, found anew."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    return _triton.why_missing.__wrapped__


def test_not_installed(why, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why() == "triton is not installed"


def test_no_device(why, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why() == "no CUDA device was found, and TRITON_INTERPRET is not 1"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why() is None


@pytest.mark.parametrize(("capability", "good"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_old_device(why, capability: tuple[int, int], good: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0")
    reason = why()
    assert (reason is None) == good
    assert good or reason == "Tesla T4 has compute capability 7.5; the kernels need 8.0"


@pytest.mark.parametrize(("release", "good"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True)])
def test_old_release(why, release: str, good: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release)
    reason = why()
    assert (reason is None) == good
    assert good or reason == "triton 3.5.1 is installed; the kernels need 3.6"


@pytest.mark.skipif(not _triton.interpreted(), reason="the interpreter runs only where there is no GPU")
def test_the_interpreter_is_never_the_choice_by_input():
    logits, tokens = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    on_the_cpu = "logits is on the CPU (the Triton kernels run on CUDA devices)"
    assert refusal(logits=logits) == on_the_cpu
    with use_backend("torch"):
        assert refusal(logits=logits) == on_the_cpu
    with use_backend("triton", "torch"):
        assert refusal(logits=logits, head=None, tokens=tokens) is None
        assert refusal(logits=logits, tables=[logits, logits.double()]) == (
            "tables[1] is float64 (the Triton kernels take float32, bfloat16 and float16)"
        )


SCRIPT = """
import importlib.abc, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            frame, importers = sys._getframe(), []
            while frame:
                importers.append(frame.f_globals.get("__name__", ""))
                frame = frame.f_back
            # torch looks for triton when transformers loads torch._dynamo: that is theirs.
            direct = next(n for n in importers[1:] if not n.startswith("importlib"))
            assert not direct.startswith("nabla_fast"), importers

sys.meta_path.insert(0, Watch())
import nabla_fast
assert not [m for m in sys.modules if m.startswith("nabla_fast.triton_kernels")]
"""


def test_importing_the_package_imports_no_kernel():
    environment = {k: v for k, v in os.environ.items() if k != "NABLA_FAST_BACKEND"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True, timeout=120)
