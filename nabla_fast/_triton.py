"""Triton: whether its kernels can run here. Triton itself is not imported."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os

import torch

_OLDEST = (8, 0)  # compute capability; older devices have no bfloat16
_OLDEST_RELEASE = (3, 6)  # 3.5 fails to compile the one-hot gradients' kernels, and spills in others


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1, which Triton reads once."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_missing() -> str | None:
    """One line that says why Triton kernels cannot run; None where they can."""
    with contextlib.suppress(ImportError):
        if importlib.util.find_spec("triton") is not None:
            return _why_not_here()
    return "triton is not installed"


def _why_not_here() -> str | None:
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device was found, and TRITON_INTERPRET is not 1"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # AMD's has other names
        release = importlib.metadata.version("triton")
        if tuple(int(part) for part in release.split(".")[:2]) < _OLDEST_RELEASE:
            return f"triton {release} is installed; the kernels need {'.'.join(map(str, _OLDEST_RELEASE))}"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < _OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        return f"{name} has compute capability {major}.{minor}; the kernels need 8.0"
    return None
