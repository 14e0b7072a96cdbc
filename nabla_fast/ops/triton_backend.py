"""Which tensors the Triton kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast import _triton
from nabla_fast.ops.registry import forced


def takes(*tensors: Tensor | None) -> bool:
    """Whether Triton kernels run on tensors like these: floats of at most 32 bits, on a CUDA device.

    On the CPU they run in the interpreter alone, which is for tests: only where the backend is asked
    for by name. None among the tensors stands for an argument that was left out.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    on_device = all(tensor.is_cuda for tensor in given) or (
        _triton.interpreted() and forced("triton") and all(tensor.device.type == "cpu" for tensor in given)
    )
    return on_device and all(
        tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for tensor in given
        if tensor.is_floating_point()
    )


def contiguous(tensors: Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
    """The tensors with unit strides; None stays None."""
    return None if tensors is None else tuple(tensor.contiguous() for tensor in tensors)
