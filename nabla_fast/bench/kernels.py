"""The kernel benchmark: ours beside plain PyTorch, straightforward and in place, and ``torch.compile``."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import nabla_fast.ops as ops
from nabla_fast.bench.kernel_cases import Case, Versions
from nabla_fast.bench.machine import Loop, Machine, loop_of
from nabla_fast.bench.measure import give_memory_back, interleaved, peak_bytes, replayed
from nabla_fast.errors import InputError

_FLOOR = 1e-6  # of the largest value of a row: below it, errors are not compared


def chosen(
    cases: Sequence[Case], names: Sequence[str] | None, dtypes: Sequence[str] | None = None
) -> list[Case]:
    """The cases with one of the names in theirs, of one of the dtypes; all where none are given.

    Raises:
        InputError: a name is in none of theirs, or no case is left.
    """
    known = sorted({case.op for case in cases})
    for name in names or ():
        if not any(name in op for op in known):
            raise InputError(f"--op {name!r} is in no name; there are: {'; '.join(known)}")
    named = [case for case in cases if not names or any(name in case.op for name in names)]
    left = [case for case in named if not dtypes or case.dtype in dtypes]
    if not left:
        raise InputError(f"--dtype {' '.join(dtypes or ())}: no case of --op has it")
    return left


def run(
    cases: Sequence[Case],
    backend: str,
    device: torch.device,
    machine: Machine | None,
    *,
    compiled: bool,
    seconds: float | None,
    on_row: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Measure cases, one after the other: inputs of one are gone before those of the next are made.

    Args:
        backend: tried first; an op that it does not have runs as plain PyTorch, and its row says so.
        machine: gives the limits; None where nothing is timed.
        compiled: also time ``torch.compile`` of the straightforward expression.
        seconds: a case; None: results are checked and nothing is timed.
        on_row: called with each row as it is done.
    Returns:
        The rows. ``check`` is "passed", "failed" or "error"; unless it passed, there are no times, and
        after an exception ``error`` has its line.
    Raises:
        BackendUnavailable: the backend is not there.
    """
    rows = []
    for case in cases:
        with ops.use_backend(backend, "torch"):
            row = _row(case, backend, device, machine, compiled, seconds)
        rows.append(row)
        on_row(row)
        if compiled:
            torch.compiler.reset()  # it keeps what it compiled, and the inputs with it
        gc.collect()  # versions refer to each other
        give_memory_back()
    return rows


def _row(
    case: Case,
    backend: str,
    device: torch.device,
    machine: Machine | None,
    compiled: bool,
    seconds: float | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "backend": None}
    row |= {"bytes": case.bytes, "flops": case.flops}
    try:
        torch.manual_seed(0)
        versions = case.prepare()
        row["backend"] = backend_of(versions, backend)
        row |= check(versions)
        if row["check"] == "passed" and machine and seconds is not None:
            row |= limit(case, machine)
            on_gpu = device.type == "cuda"
            options = {"graph": on_gpu and row["backend"] == "triton", "products": on_gpu}
            row |= _times(
                versions, device, compiled, seconds, limiting=limiting_loop(case, machine), **options
            )
    except Exception as error:  # of one case: the others go on
        identity = ("op", "shape", "dtype", "backend", "bytes", "flops")
        return {key: row[key] for key in identity} | {
            "max_error": None,
            "check": "error",
            "error": _line(error),
        }
    return row


def backend_of(versions: Versions, wanted: str) -> str:
    """The backend that ``use_backend(wanted, "torch")`` takes: "torch" if any part of ours needs it."""
    try:
        with ops.use_backend(wanted):
            versions.reset()
            versions.ours()
    except ops.BackendUnavailable:
        return "torch"
    return wanted


def check(versions: Versions) -> dict[str, Any]:
    """Errors against float64, by row and relative to the row's largest value; ours held against naive's.

    Returns:
        ``max_error``, ``naive_error`` and ``eager_error``, the largest of all results; ``checked`` where
        something smaller was checked in the case's place; ``check``, "passed" where each result's error
        is at most twice naive's and a floor.
    """
    checked = versions.checked or versions
    with ops.use_backend("torch"):
        truth = checked.in_float64()
    errors = {}
    for name in ("ours", "naive", "eager"):
        checked.reset()
        errors[name] = _errors(getattr(checked, name)(), truth)
    bounds = [2 * error + _FLOOR for error in errors["naive"]]
    passed = all(error <= bound for error, bound in zip(errors["ours"], bounds, strict=True))
    return {
        "max_error": max(errors["ours"]),
        "naive_error": max(errors["naive"]),
        "eager_error": max(errors["eager"]),
        **({"checked": versions.checked_as} if versions.checked else {}),
        "check": "passed" if passed else "failed",
    }


def _errors(outputs: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest error of each result, NaN being infinite."""
    errors = []
    for output, exact in zip(outputs, truth, strict=True):
        exact = exact.reshape(exact.shape[0], -1)
        scale = exact.abs().amax(dim=1).clamp(min=1e-30)
        difference = (output.double().reshape(exact.shape) - exact).abs().amax(dim=1) / scale
        errors.append(float(difference.nan_to_num(nan=torch.inf).max()))
    return errors


def _times(
    versions: Versions,
    device: torch.device,
    compiled: bool,
    seconds: float,
    *,
    graph: bool,
    products: bool,
    limiting: tuple[Loop, float] | None = None,
) -> dict[str, Any]:
    """Times of all versions.

    Args:
        graph: also time ours as a CUDA graph, without what launching costs.
        products: also time the products alone, by the library at the case's own shapes.
        limiting: what :func:`limiting_loop` gives; its time beside the versions makes ``limit_ms``.
    """
    functions = {"ours": versions.ours, "naive": versions.naive, "eager": versions.eager}
    failure = graph_failure = None
    if graph:
        try:
            versions.reset()
            functions["graph"] = replayed(versions.ours)
        except Exception as error:  # ours runs without it
            graph_failure = _line(error)
    if products and versions.products:
        functions["products"] = versions.products
    if compiled:
        function = torch.compile(versions.naive)
        try:
            versions.reset()
            function()
            functions["compile"] = function
        except Exception as error:  # torch.compile's own: ours is measured all the same
            failure = _line(error)
    if limiting:
        functions["limit"] = limiting[0].run
    times = interleaved(functions, device, seconds=seconds, reset=versions.reset)
    ours, compile_time = times["ours"], times.get("compile")
    beside = {f"{name}_ms": times[name].median_ms for name in ("graph", "products") if name in times}
    peaks = {}
    for name in ("ours", "naive"):
        versions.reset()
        peaks[name] = peak_bytes(functions[name], device, in_place=versions.in_place)
    return {
        "median_ms": ours.median_ms,
        "p20_ms": ours.p20_ms,
        "p80_ms": ours.p80_ms,
        "eager_ms": times["eager"].median_ms,
        "naive_ms": times["naive"].median_ms,
        "compile_ms": compile_time.median_ms if compile_time else None,
        **({"compile_error": failure} if failure else {}),
        **beside,
        **({"graph_error": graph_failure} if graph_failure else {}),
        **({"limit_ms": limiting[1] * times["limit"].median_ms} if limiting else {}),
        "peak_bytes": peaks["ours"],
        "naive_peak_bytes": peaks["naive"],
    }


def limit(case: Case, machine: Machine) -> dict[str, Any]:
    """``limit_ms``, at the rates of :class:`Machine`, and which ``limit`` that is.

    Where there is a :func:`limiting_loop`, the row has the time at the rates beside it instead.
    """
    memory = 1e3 * case.bytes / machine.bandwidth
    matmul = 1e3 * case.flops / machine.rate(case.bf16_terms)
    return {"limit_ms": max(memory, matmul), "limit": "memory" if memory >= matmul else "matmul"}


def limiting_loop(case: Case, machine: Machine) -> tuple[Loop, float] | None:
    """The loop that the limit comes from, and how many runs of it do what the case does.

    A virtual machine has two cores one minute and the two halves of one the next: timed in turn with the
    versions, the loop says what was to be had in the minute of the row. None where torch gave the limit.
    """
    if machine.source != "loops":
        return None
    if limit(case, machine)["limit"] == "memory":
        name, amount = machine.fastest_transfer(), case.bytes
    else:
        name, parts = machine.fastest_product(case.bf16_terms)
        amount = case.flops * parts
    loop = loop_of(name, machine.threads)
    return (loop, amount / loop.amount) if loop else None


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
