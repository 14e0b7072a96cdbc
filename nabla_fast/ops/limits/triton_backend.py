"""Limits of the Triton kernels. Refusals as :mod:`nabla_fast.ops.limits.refusals` defines them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast._triton import interpreted
from nabla_fast.ops.adam import AdamState
from nabla_fast.ops.head_map import head_map_refusal
from nabla_fast.ops.limits.refusals import contiguous_refusal, dtype_refusal, stride_refusal
from nabla_fast.ops.registry import forced

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def refusal(**arguments: Tensor | Sequence[Tensor] | None) -> str | None:
    """Floats of at most 32 bits, or integers, on a CUDA device.

    On the CPU the kernels run in Triton's interpreter alone, which is for tests: only where the backend
    is asked for by name.

    Args:
        arguments: by name, a tensor, several, or None for one that was left out.
    """
    for name, argument in arguments.items():
        if argument is None:
            continue
        if isinstance(argument, Tensor):
            if reason := _tensor_refusal(name, argument):
                return reason
            continue
        for index, tensor in enumerate(argument):
            if _tensor_refusal(name, tensor):
                return _tensor_refusal(f"{name}[{index}]", tensor)
    return None


def onehot_refusal(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **options: Any
) -> str | None:
    """Arguments of ``onehot_grad`` and ``onehot_grad_norm``."""
    return refusal(cotangents=cotangents, tables=tables, hidden=hidden, head=head) or head_map_refusal(
        "Triton", **options
    )


def descent_refusal(name: str, parameter: Tensor, grad: Tensor, state: AdamState) -> str | None:
    """Arguments of a descent that moves rows of ``parameter`` [N, D], called ``name``."""
    rows = {
        name: parameter,
        "grad": grad,
        "state.exp_avg": state.exp_avg,
        "state.exp_avg_sq": state.exp_avg_sq,
    }
    for key, tensor in rows.items():
        if reason := _tensor_refusal(key, tensor) or stride_refusal(key, tensor, "Triton"):
            return reason
    return dtype_refusal(name, parameter, (torch.float32,), "Triton") or contiguous_refusal(
        "state.step", state.step, "Triton"
    )


def _tensor_refusal(name: str, tensor: Tensor) -> str | None:
    if not tensor.is_cuda and not (tensor.is_cpu and _interpreter_asked_for()):
        where = "the CPU" if tensor.is_cpu else str(tensor.device)
        return f"{name} is on {where} (the Triton kernels run on CUDA devices)"
    return dtype_refusal(name, tensor, _FLOATS, "Triton") if tensor.is_floating_point() else None


def _interpreter_asked_for() -> bool:
    return interpreted() and forced("triton")
