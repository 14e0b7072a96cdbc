"""Both descents by the CUDA kernels on the host, on devices of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from c_structs import DescentArgs
from cuda_kernels import Kernels, matrix, output, rows_contiguous
from ops.harness import Arguments, Results, copied, flatten, map_tensors, mutated
from torch import Tensor

from nabla_fast.ops import dto_descent, dto_descent_latents


@dataclass(frozen=True)
class Device:
    """What launchers are told of a device; 0: what the target has."""

    multiprocessors: int = 0
    shared_bytes: int = 0
    most_cluster: int = 0


ONE_BLOCK = Device(1, 0, 1)
GRID = Device(6, 0, 1)
CLUSTERS = Device(8, 0, 16)


def descend(
    kernels: Kernels, arguments: Arguments, device: Device = CLUSTERS, *, copy: bool = True
) -> tuple[Results, Tensor]:
    """The op's results by name and what it changed, in a copy of the arguments or in them; rows' status.

    Args:
        arguments: of ``dto_descent``, or with ``h`` of ``dto_descent_latents``.
    """
    given: dict[str, Any] = map_tensors(copied, arguments) if copy else arguments
    state, schedule, noise = given["state"], given["schedule"], given.get("noise")
    op, parameter = (dto_descent_latents, "h") if "h" in given else (dto_descent, "z")
    rows, vocabulary = given["grad"].shape
    changed = {
        parameter: given[parameter],
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "step": state.step,
    }
    results = {
        "token": torch.full((rows,), -7),
        "flipped": torch.full((rows,), 7, dtype=torch.uint8),
        "status": torch.full((rows,), -1, dtype=torch.int32),
    }
    keys = (key.contiguous() for key in noise) if noise else (None, None)
    read = {"grad": rows_contiguous(given["grad"].float()), "schedule": schedule.contiguous()}
    read |= {name: given.get(name) for name in ("until", "group")}
    read |= dict(zip(("noise_seed", "noise_position"), keys, strict=True))
    args = DescentArgs(rows=rows, vocab=vocabulary, tau=given.get("tau", 1.0), iters=schedule.shape[-1])
    args.parameter, args.exp_avg, args.exp_avg_sq = (
        output(changed[name]) for name in (parameter, "exp_avg", "exp_avg_sq")
    )
    args.grad = matrix(read["grad"])
    if parameter == "h":
        read["head"] = rows_contiguous(given["head"])
        args.head = matrix(read["head"])
    args.schedule_stride = schedule.shape[-1] if schedule.ndim == 2 else 0
    pointers = {"step": state.step, "row_status": results["status"], **results, **read}
    for name in ("step", "schedule", "until", "group", "noise_seed", "noise_position", "token", "flipped"):
        if pointers[name] is not None:
            setattr(args, name, pointers[name].data_ptr())
    args.row_status = results["status"].data_ptr()
    kernels.limit(device.multiprocessors, device.shared_bytes, device.most_cluster)
    try:
        kernels.run(op.name, args, read, **changed, **results)
    finally:
        kernels.limit(0, 0, 0)
    status = results.pop("status")
    results["flipped"] = results["flipped"].bool()
    flat = flatten(op, given)
    return results | {name: flat[name] for name in mutated(op)}, status
