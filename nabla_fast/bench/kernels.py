"""The kernel benchmark: ours beside plain PyTorch, straightforward and in place, and ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nabla_fast import ops
from nabla_fast.bench.kernel_cases import Case, cases
from nabla_fast.bench.measure import copy_bandwidth, interleaved, matmul_rate, peak_bytes

_FLOOR = 1e-6  # of the largest value of a row: below it, errors are not compared


def run(
    backend: str, device: torch.device, *, compiled: bool, seconds: float, on_row: Callable[[dict], None]
) -> list[dict[str, Any]]:
    """Measure every case.

    Args:
        backend: tried first; an op that it does not have runs as plain PyTorch, and its row says so.
        compiled: also time ``torch.compile`` of the straightforward expression.
        seconds: a case.
        on_row: called with each row as it is done.
    Returns:
        The rows. One whose check fails has no times.
    """
    bandwidth = copy_bandwidth(device)
    rates = {d: matmul_rate(getattr(torch, d), device) for d in ("float32", "bfloat16")}
    rows = []
    for make in cases(device):
        case = make()
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": case.dtype}
        row |= {"backend": _backend(case, backend)}
        with ops.use_backend(backend, "torch"):
            row |= _check(case)
            if row["check"] == "passed":
                row |= _times(case, device, compiled, seconds)
                row |= _limit(case, bandwidth, rates[case.dtype])
        rows.append(row)
        on_row(row)
    return rows


def _backend(case: Case, wanted: str) -> str:
    """The backend that ``use_backend(wanted, "torch")`` takes for a case."""
    if wanted == "torch":
        return "torch"
    try:
        with ops.use_backend(wanted):
            case.ours()
    except ops.BackendUnavailable:
        return "torch"
    return wanted


def _check(case: Case) -> dict[str, Any]:
    """Error against float64, by row and relative to the row's largest value; held against naive's."""
    with ops.use_backend("torch"):
        truth = case.in_float64()
    ours, naive = _error(case.ours(), truth), _error(case.naive(), truth)
    return {"max_error": ours, "check": "passed" if ours <= 2 * naive + _FLOOR else "failed"}


def _error(outputs: list[Tensor], truth: list[Tensor]) -> float:
    worst = 0.0
    for output, exact in zip(outputs, truth, strict=True):
        exact = exact.reshape(exact.shape[0], -1)
        scale = exact.abs().amax(dim=1).clamp(min=1e-30)
        difference = (output.double().reshape(exact.shape) - exact).abs().amax(dim=1) / scale
        worst = max(worst, float(difference.nan_to_num(nan=torch.inf).max()))
    return worst


def _times(case: Case, device: torch.device, compiled: bool, seconds: float) -> dict[str, Any]:
    functions = {"ours": case.ours, "naive": case.naive}
    if case.eager:
        functions["eager"] = case.eager
    if compiled:
        functions["compile"] = torch.compile(case.naive)
    times = interleaved(functions, device, seconds=seconds)
    ours = times["ours"]
    return {
        "median_ms": ours.median_ms,
        "p20_ms": ours.p20_ms,
        "p80_ms": ours.p80_ms,
        "eager_ms": times["eager" if case.eager else "naive"].median_ms,
        "naive_ms": times["naive"].median_ms,
        "compile_ms": times["compile"].median_ms if compiled else None,
        "peak_bytes": peak_bytes(case.ours, device),
        "naive_peak_bytes": peak_bytes(case.naive, device),
    }


def _limit(case: Case, bandwidth: float, rate: float) -> dict[str, Any]:
    memory, matmul = 1e3 * case.bytes / bandwidth, 1e3 * case.flops / rate
    return {"limit_ms": max(memory, matmul), "limit": "memory" if memory >= matmul else "matmul"}
