"""The environment of a result: versions, hardware, backends. Every command's JSON carries it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import nabla_fast._native as _native
from nabla_fast._version import __version__

# The flags of /proc/cpuinfo that decide which kernels can run, and how fast.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def report() -> dict[str, Any]:
    """The environment as a JSON-serialisable dict.

    ``versions`` (null for a package that is not there), ``commit`` (of the source tree, with
    ``-dirty`` after local changes; null outside one), ``cpu``, ``threads`` (that kernels use),
    ``gpus``, and ``backends``: ``{"available": bool, "why": null or one line}`` by name.
    """
    import torch

    from nabla_fast.ops.registry import backend_status

    return {
        "versions": {
            "nabla_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": _version("transformers"),
            "triton": _version("triton"),
        },
        "commit": _commit(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "backends": {
            name: {"available": why is None, "why": why} for name, why in backend_status().items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> dict[str, Any]:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    # The first processor's fields; the others repeat them.
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    }
    flags = fields.get("flags", "").split()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "count": os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "kernels": _native.cpu_isa() if _native.available() else None,
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []

    def _architecture(device: Any) -> str:
        if torch.version.hip:
            return device.gcnArchName.split(":")[0]
        return f"sm_{device.major}{device.minor}"

    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [
        {
            "name": device.name,
            "memory_bytes": device.total_memory,
            "compute_capability": None if torch.version.hip else f"{device.major}.{device.minor}",
            "architecture": _architecture(device),
        }
        for device in devices
    ]
