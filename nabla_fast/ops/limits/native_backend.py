"""Limits of the C++ kernels (backend ``cpu``), and copies of arguments within them.

Refusals as :mod:`nabla_fast.ops.limits.refusals` defines them. An element of a list gets its name, as in
``tables[1]``, in a second call, once it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.ops.adam import AdamState
from nabla_fast.ops.limits.refusals import contiguous_refusal, dtype_refusal, stride_refusal

_FLOAT32 = (torch.float32,)
_FLOATS = (torch.float32, torch.bfloat16)


def device_refusal(name: str, tensor: Tensor) -> str | None:
    """A tensor is on the CPU."""
    return None if tensor.is_cpu else f"{name} is on {tensor.device} (the C++ kernels run on the CPU)"


def unit_stride_refusal(name: str, tensor: Tensor) -> str | None:
    """Elements along the last dimension are adjacent, where there are two."""
    return stride_refusal(name, tensor, "C++") if tensor.numel() and tensor.shape[-1] > 1 else None


def matrix_refusal(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> str | None:
    """[N, M] float32 or bfloat16 on the CPU, of unit stride along M and any along N."""
    return (
        device_refusal(name, tensor)
        or dtype_refusal(name, tensor, dtypes, "C++")
        or unit_stride_refusal(name, tensor)
    )


def product_refusal(name: str, rows: Tensor, table_name: str, table: Tensor) -> str | None:
    """rows·tableᵀ: rows [N, H] are copied to float32 where needed, a table [V, H] is read as it is."""
    return (
        device_refusal(name, rows)
        or _float64_refusal(name, rows)
        or dtype_refusal(table_name, table, _FLOATS, "C++")
        or unit_stride_refusal(table_name, table)
    )


def hidden_refusal(hidden: Tensor, head: Tensor, **_: Any) -> str | None:
    """Hidden states [N, H] and an lm_head [V, H]."""
    return product_refusal("hidden", hidden, "head", head)


def onehot_refusal(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **_: Any
) -> str | None:
    """Arguments of ``onehot_grad`` and ``onehot_grad_norm``."""
    for t, (cotangent, table) in enumerate(zip(cotangents, tables, strict=True)):
        if product_refusal("", cotangent, "", table):
            return product_refusal(f"cotangents[{t}]", cotangent, f"tables[{t}]", table)
    return hidden_refusal(hidden, head)


def mix_refusal(
    tables: Sequence[Tensor],
    *,
    cotangents: Sequence[Tensor] = (),
    direct: Tensor | None = None,
    **rows: Tensor,
) -> str | None:
    """Arguments of the mixes and their backward.

    Args:
        tables: [V, H_t] each.
        cotangents: [N, H_t] each.
        direct: [N, V].
        rows: by name, logits [N, V] or hidden states [N, H] and an lm_head [V, H].
    """
    for name, tensor in rows.items():
        if reason := matrix_refusal(name, tensor):
            return reason
    for t, table in enumerate(tables):
        if matrix_refusal("", table):
            return matrix_refusal(f"tables[{t}]", table)
    for t, cotangent in enumerate(cotangents):
        if _float64_refusal("", cotangent):
            return _float64_refusal(f"cotangents[{t}]", cotangent)
    return None if direct is None else _float64_refusal("direct", direct)


def descent_refusal(
    name: str,
    parameter: Tensor,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    *,
    until: Tensor | None,
    group: Tensor | None,
    noise: tuple[Tensor, Tensor] | None,
    **_: Any,
) -> str | None:
    """Arguments of a descent that moves rows of ``parameter`` [N, D], called ``name``."""
    seed, position = noise or (None, None)
    return (
        matrix_refusal(name, parameter, _FLOAT32)
        or matrix_refusal("grad", grad, _FLOAT32)
        or matrix_refusal("state.exp_avg", state.exp_avg, _FLOAT32)
        or matrix_refusal("state.exp_avg_sq", state.exp_avg_sq, _FLOAT32)
        or contiguous_refusal("state.step", state.step, "C++")
        or contiguous_refusal("until", until, "C++")
        or contiguous_refusal("group", group, "C++")
        or contiguous_refusal("noise.seed", seed, "C++")
        or contiguous_refusal("noise.position", position, "C++")
        or unit_stride_refusal("schedule", schedule)
    )


def _float64_refusal(name: str, tensor: Tensor) -> str | None:
    if tensor.dtype != torch.float64:
        return None
    return f"{name} is float64 (the C++ kernels compute in float32)"


def head_map_fields(
    *, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> dict[str, Any]:
    """The field of C++ functions that says what is done to the product of head and hidden states."""
    if bias is None and scale == 1.0 and softcap is None:
        return {}
    return {"head_map": (None if bias is None else bias.float().contiguous(), scale, softcap or 0.0)}


def empty_matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, columns] for a kernel to fill, in large pages where it is large."""
    matrix = torch.empty(rows, columns, dtype=dtype, device="cpu")
    extension().advise_large_pages(matrix.data_ptr(), matrix.nbytes)
    return matrix


def as_native(tensor: Tensor) -> Tensor:
    """A matrix [N, M] as C++ kernels read it: itself, or a float32 copy."""
    return tensor.float().contiguous() if matrix_refusal("", tensor) else tensor


def as_float32(rows: Tensor) -> Tensor:
    """A matrix [N, M] in float32 and with unit stride along M: itself, or a copy."""
    rows = rows.float()
    return rows if rows.stride(1) == 1 else rows.contiguous()
