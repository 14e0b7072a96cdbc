"""Compiles the launches of one op for one target."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from typing import Any

from tools.compile_check import launches
from tools.compile_check.targets import TARGETS

Row = dict[str, Any]


def check(target_name: str, op: str, dtype_name: str) -> list[Row]:
    """Compile the launches of one op; one row a kernel. To be run where TRITON_INTERPRET is not set."""
    # Here, since the process that only counts results has no use for them.
    import torch

    from nabla_fast.triton_kernels.common import presets
    from tools.compile_check.recording import recorded
    from tools.compile_check.resources import resources

    target = TARGETS[target_name]
    module = importlib.import_module(f"{launches.__name__}.{op}")
    rows, seen = [], set()
    with presets.assumed(target_name):
        for name, call in module.launches(getattr(torch, dtype_name)):
            row = {"op": op, "launch": name, "dtype": dtype_name, "target": target_name}
            try:
                with recorded(target) as kernels:
                    call()
            except Exception as error:  # a kernel that does not compile is a result like others
                rows.append(row | {"kernel": None, "problem": _one_line(error)})
                continue
            for key in kernels.keys() - seen:
                seen.add(key)
                kernel = kernels[key]
                used = resources(kernel.asm, kernel.metadata.shared, target)
                rows.append(
                    row
                    | {"kernel": kernel.metadata.name, "problem": used.problem(target)}
                    | asdict(used)
                    | {"shared_limit": target.shared}
                )
    return rows


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[-300:]}"
