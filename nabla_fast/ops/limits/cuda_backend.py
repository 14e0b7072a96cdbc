"""Limits of the CUDA kernels. Refusals as :mod:`nabla_fast.ops.limits.refusals` defines them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast._native.cuda_library import DTYPES, MOST_COLUMNS, MOST_TOKENS, on_host
from nabla_fast.ops.adam import AdamState
from nabla_fast.ops.head_map import head_map_refusal
from nabla_fast.ops.limits.refusals import contiguous_refusal, dtype_refusal, stride_refusal
from nabla_fast.ops.registry import forced


def refusal(vocabulary: int, **arguments: Tensor | Sequence[Tensor] | None) -> str | None:
    """Floats of at most 32 bits, or integers, on a CUDA device; at most 2³⁰ tokens.

    On the CPU they run on a host of device code, which is for tests: only where the backend is asked for by
    name.

    Args:
        vocabulary: tokens.
        arguments: by name, a tensor, several, or None for one that was left out.
    """
    if vocabulary > MOST_TOKENS:
        return f"the vocabulary has {vocabulary} tokens (the CUDA kernels take 2^30)"
    for name, argument in arguments.items():
        several = (argument,) if argument is None or isinstance(argument, Tensor) else argument
        for index, tensor in enumerate(several):
            if tensor is not None and _tensor_refusal(name, tensor):
                return _tensor_refusal(name if several[0] is argument else f"{name}[{index}]", tensor)
    return None


def descent_refusal(name: str, parameter: Tensor, grad: Tensor, state: AdamState) -> str | None:
    """Arguments of a descent that moves rows of ``parameter`` [N, D], called ``name``."""
    rows = {name: parameter, "state.exp_avg": state.exp_avg, "state.exp_avg_sq": state.exp_avg_sq}
    for key, tensor in rows.items():
        reason = dtype_refusal(key, tensor, (torch.float32,), "CUDA")
        if reason := reason or stride_refusal(key, tensor, "CUDA"):
            return reason
    reason = contiguous_refusal("state.step", state.step, "CUDA")
    return reason or refusal(grad.shape[1], **{name: parameter}, grad=grad)


def latents_refusal(
    h: Tensor, head: Tensor, grad: Tensor, state: AdamState, *_: Any, **options: Any
) -> str | None:
    """Arguments of ``dto_descent_latents``."""
    if h.shape[1] > MOST_COLUMNS:
        return f"h has {h.shape[1]} columns (the CUDA kernel takes {MOST_COLUMNS})"
    return (
        refusal(len(head), head=head)
        or descent_refusal("h", h, grad, state)
        or head_map_refusal("CUDA", **options)
    )


def _tensor_refusal(name: str, tensor: Tensor) -> str | None:
    if not tensor.is_cuda and not (tensor.is_cpu and on_host() and forced("cuda")):
        where = "the CPU" if tensor.is_cpu else str(tensor.device)
        return f"{name} is on {where} (the CUDA kernels run on CUDA devices)"
    return dtype_refusal(name, tensor, tuple(DTYPES), "CUDA") if tensor.is_floating_point() else None
