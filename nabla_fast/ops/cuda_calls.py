"""Ops by the CUDA kernels of ``libnabla_fast_cuda.so``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast._native import cuda_library as cuda
from nabla_fast.ops.adam import AdamState
from nabla_fast.ops.descent_loop import Descent, reported
from nabla_fast.ops.gumbel_noise import GumbelNoise
from nabla_fast.ops.rows import report


def mix_by_cuda(
    name: str,
    rows: Tensor,
    head: Tensor | None,
    tables: Sequence[Tensor],
    tau: float,
    noise: GumbelNoise | None,
    hard: bool,
) -> list[Tensor]:
    """The mixes of the op ``name``: ``rows`` are logits, or with a head [V, H] hidden states."""
    status = rows.new_empty(len(rows), dtype=torch.int32)
    mixes = [table.new_empty(len(rows), table.shape[1]) for table in tables]
    args, tensors = _mix_args(rows, head, tables, tau, noise, status)
    outputs = cuda.matrices(mixes)
    args.hard, args.mixes = hard, ctypes.addressof(outputs)
    tensors |= {f"mixes[{t}]": mix for t, mix in enumerate(mixes)}
    cuda.call("embedding_mix", args, tensors, rows.device)
    report(name, status)
    return mixes


def mix_backward_by_cuda(
    cotangents: Sequence[Tensor],
    rows: Tensor,
    head: Tensor | None,
    tables: Sequence[Tensor],
    tau: float,
    noise: GumbelNoise | None,
    direct: Tensor | None,
) -> Tensor:
    """∂ℒ/∂rows, of logits in their dtype, of hidden states in float32."""
    status = rows.new_empty(len(rows), dtype=torch.int32)
    grad = rows.new_empty(rows.shape, dtype=rows.dtype if head is None else torch.float32)
    cotangents = [cuda.with_unit_stride(cotangent) for cotangent in cotangents]
    args, tensors = _mix_args(rows, head, tables, tau, noise, status)
    states = cuda.matrices(cotangents)
    args.cotangents, args.grad = ctypes.addressof(states), cuda.matrix(grad)
    tensors |= {"grad": grad, **{f"cotangents[{t}]": each for t, each in enumerate(cotangents)}}
    if direct is not None:
        tensors["direct"] = direct = cuda.with_unit_stride(direct)
        args.direct = cuda.matrix(direct)
    cuda.call("embedding_mix_backward", args, tensors, rows.device)
    return grad


def _mix_args(
    rows: Tensor,
    head: Tensor | None,
    tables: Sequence[Tensor],
    tau: float,
    noise: GumbelNoise | None,
    status: Tensor,
) -> tuple[cuda.MixArgs, dict[str, Tensor | None]]:
    """What forward and backward read, and its tensors by name, which must outlive the call."""
    rows, tables = cuda.with_unit_stride(rows), [cuda.with_unit_stride(table) for table in tables]
    head = None if head is None else cuda.with_unit_stride(head)
    seed, position = noise or (None, None)
    vocabulary = rows.shape[1] if head is None else len(head)
    args = cuda.MixArgs(rows=len(rows), vocab=vocabulary, tau=tau, table_count=len(tables))
    if head is None:
        args.logits = cuda.matrix(rows)
    else:
        args.hidden, args.head = cuda.matrix(rows), cuda.matrix(head)
    args.kept = cuda.matrices(tables)
    args.tables, args.row_status = ctypes.addressof(args.kept), status.data_ptr()
    args.noise_seed, args.noise_position = cuda.address(seed), cuda.address(position)
    tensors = {"rows": rows, "head": head, "seed": seed, "position": position, "status": status}
    return args, tensors | {f"tables[{t}]": table for t, table in enumerate(tables)}


def descend_by_cuda(
    name: str,
    parameter: Tensor,
    head: Tensor | None,
    grad: Tensor,
    state: AdamState,
    schedule: Tensor,
    *,
    until: Tensor | None,
    group: Tensor | None,
    tau: float,
    noise: GumbelNoise | None,
) -> Descent:
    """The descent ``name`` in place, of logits, or of hidden states under a head; a bad row stays."""
    rows, vocabulary = grad.shape
    token, flipped, status = (
        parameter.new_empty(rows, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.int32)
    )
    seed, position = noise or (None, None)
    written = {"parameter": parameter, "step": state.step}
    written |= {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    written |= {"token": token, "flipped": flipped, "row_status": status}
    read = {"grad": cuda.with_unit_stride(grad.float()), "schedule": schedule.contiguous()}
    read |= {"head": head, "until": until, "group": group}
    read |= {"noise_seed": seed, "noise_position": position}
    read = {
        field: None if tensor is None else cuda.with_unit_stride(tensor) for field, tensor in read.items()
    }
    args = cuda.DescentArgs(rows=rows, vocab=vocabulary, tau=tau, iters=schedule.shape[-1])
    args.parameter, args.grad = cuda.matrix(parameter), cuda.matrix(read["grad"])
    if head is not None:
        args.head = cuda.matrix(read["head"])
    args.exp_avg, args.exp_avg_sq = cuda.matrix(state.exp_avg), cuda.matrix(state.exp_avg_sq)
    args.schedule_stride = read["schedule"].stride(0) if schedule.ndim == 2 else 0
    for field in ("step", "token", "flipped", "row_status"):
        setattr(args, field, written[field].data_ptr())
    for field in ("schedule", "until", "group", "noise_seed", "noise_position"):
        setattr(args, field, cuda.address(read[field]))
    cuda.call(name, args, {**read, **written}, parameter.device)
    return reported(name, token, flipped, status)
