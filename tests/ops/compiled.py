"""``python -m tests.ops.compiled OP``: how kernels that must not depend on their launch are compiled.

Prints a JSON list of what each compiled kernel of an op has in it, where rows begin at multiples of 16
bytes and where they do not. In a process of its own, since a test's interprets its kernels.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor

from nabla_fast.triton_kernels.common import presets
from nabla_fast.triton_kernels.common.softmax_sums import softmax_sums
from nabla_fast.triton_kernels.dto_descent import dto_descent
from nabla_fast.triton_kernels.dto_descent_latents import dto_descent_latents
from nabla_fast.triton_kernels.token_stats import token_stats
from tools.compile_check.recording import recorded
from tools.compile_check.targets import TARGETS

TARGET = "sm_90"
WIDTHS = {"aligned": 20_480, "odd": 20_481}
HIDDEN = 256


def rows(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(3, width, dtype=dtype, device="meta")


def descent(op: str, width: int, dtype: torch.dtype) -> None:
    """A step of 3 rows, or of few and of more latents; G is as the dtype says, or the head."""
    step = torch.empty(3, dtype=torch.int64, device="meta")
    schedule = torch.empty(1, dtype=torch.float64, device="meta")
    plain = {"until": None, "group": None, "tau": 0.7, "noise": None}
    if op == "dto_descent":
        dto_descent(rows(width), rows(width, dtype), rows(width), rows(width), step, schedule, **plain)
        return
    head = torch.empty(width, HIDDEN, dtype=dtype, device="meta")
    for count in (3, 6):
        h, first, second = (torch.empty(count, HIDDEN, device="meta") for _ in range(3))
        grad, step = torch.empty(count, width, device="meta"), torch.empty_like(h[:, 0], dtype=torch.int64)
        dto_descent_latents(h, head, grad, first, second, step, schedule, **plain)


def launches(op: str, width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.float32, torch.bfloat16):
        z = rows(width, dtype)
        if op == "token_stats":
            yield str(dtype), lambda z=z: token_stats(z, None, 0.7)
        if op == "softmax_sums":
            yield str(dtype), lambda z=z: softmax_sums(z, 0.7)
        if op.startswith("dto_descent"):
            yield str(dtype), lambda dtype=dtype: descent(op, width, dtype)


def float_reductions(ttgir: str) -> list[str]:
    """Operands of the reductions that add numbers, with their layouts written out."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = []
    pattern = r'"tt\.reduce"\(.*?\) <\{axis = (\d+) : i32\}> \(\{(.*?)\}\) : \((.*?)\) ->'
    for axis, body, operands in re.findall(pattern, ttgir, re.DOTALL):
        if "addf" in body:
            for _ in layouts:  # a layout may be one of another's parts
                operands = re.sub(r"#\w+", lambda m: layouts.get(m[0], m[0]), operands)
            found.append(f"axis {axis} of {operands}")
    return found


def waits_first(ptx: str) -> bool:
    """Whether a kernel waits for the one ahead before it reads or writes any memory but its arguments."""
    code = re.findall(r"griddepcontrol\.wait|(?:ld|st|atom|red|cp\.async)\.(?!param)", ptx)
    return bool(code) and code[0] == "griddepcontrol.wait"


def compiled(op: str) -> list[dict[str, object]]:
    found = []
    for alignment, width in WIDTHS.items():
        for launch, call in launches(op, width):
            with presets.assumed(TARGET), recorded(TARGETS[TARGET]) as kernels:
                call()
            found += [
                {
                    "launch": launch,
                    "alignment": alignment,
                    "kernel": kernel.metadata.name,
                    "contracts": kernel.metadata.enable_fp_fusion,
                    "sums": float_reductions(kernel.asm["ttgir"]),
                    "early": kernel.metadata.launch_pdl,
                    "waits_first": waits_first(kernel.asm["ptx"]),
                    "vector_loads": len(re.findall(r"ld\.global\.v[248]", kernel.asm["ptx"])),
                }
                for kernel in kernels.values()
            ]
    return found


if __name__ == "__main__":
    print(json.dumps(compiled(sys.argv[1])))
