"""Compiles the launches of one op for one target."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from tools.compile_check import launches
from tools.compile_check.targets import TARGETS, Target

Row = dict[str, Any]
# Of a row whose launch does not compile, None.
_FIGURES = ("instructions_per_element", "barriers", "predicted_share")


def check(target_name: str, op: str, dtype_name: str) -> list[Row]:
    """Compile the launches of one op; one row a kernel. To be run where TRITON_INTERPRET is not set."""
    # Here, since the process that only counts results has no use for them.
    import torch
    import triton

    from nabla_fast.triton_kernels.common import presets
    from tools.compile_check.recording import recorded

    target = TARGETS[target_name]
    module = importlib.import_module(f"{launches.__name__}.{op}")
    rows, seen = [], set()
    with presets.assumed(target_name):
        for name, call in module.launches(getattr(torch, dtype_name)):
            row = {"op": op, "launch": name, "dtype": dtype_name, "target": target_name}
            row["triton"] = triton.__version__
            made = []
            try:
                with recorded(target, made.append):
                    call()
            except Exception as error:  # a kernel that does not compile is a result like others
                rows.append(not_compiled(row, error))
                continue
            for launch in made:
                if launch.kernel.hash not in seen:
                    seen.add(launch.kernel.hash)
                    rows.append(row | _row(launch, target))
    return rows


def not_compiled(where: Row, error: Exception) -> Row:
    """The row of what came to no end.

    Args:
        where: op, dtype and target, and what else is known of the launch.
    """
    known = {"launch": "some launch", "triton": version("triton")} | where
    return known | dict.fromkeys(_FIGURES) | {"kernel": None, "problem": _one_line(error)}


def _row(launch: Any, target: Target) -> Row:
    from tools.compile_check.figures import figures, read
    from tools.compile_check.launches import described
    from tools.compile_check.model.launch import predicted_share
    from tools.compile_check.resources import resources

    used, code = resources(launch.kernel.asm, launch.kernel.metadata.shared, target)
    kernel, work = read(code, target), described(launch)
    problem, share = used.problem(target), None
    if work is None:
        problem = problem or f"nothing in tools/compile_check/launches says what {launch.function} handles"
    elif target.name == "sm_90":
        share = round(predicted_share(launch, work, kernel, used), 4)
    told = figures(kernel, work, launch.programs, launch.warps, target).as_json()
    return (
        {"kernel": launch.kernel.metadata.name, "problem": problem}
        | asdict(used)
        | {"shared_limit": target.shared}
        | told
        | {"predicted_share": share}
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[-300:]}"
