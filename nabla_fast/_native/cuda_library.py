"""Calls of ``libnabla_fast_cuda.so`` on tensors: its structs in ctypes, streams, workspaces."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from nabla_fast._native.library import get_cuda_library
from nabla_fast._native.loading import ABI_VERSION

# For tests: a build of the kernels for the CPU, with the host that runs device code.
HOST_VARIABLE = "NABLA_FAST_CUDA_HOST"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_TOKENS = 1 << 30  # of a vocabulary
MOST_COLUMNS = 1 << 13  # of hidden states that descend
_OLDEST = (8, 0)  # compute capability that the library has machine code for
_HOST_TARGET = 90


def _struct(name: str, *fields: tuple[type, str]) -> type[ctypes.Structure]:
    """A struct with fields of each type, by their names."""
    listed = [(field, kind) for kind, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


_CALL = ((c_int64, "size"), (c_void_p, "workspace"), (c_int64, "workspace_bytes"), (c_int32, "num_threads"))
Matrix = _struct("nabla_fast_matrix", (c_void_p, "data"), (c_int64, "width stride"), (c_int32, "dtype"))
MixArgs = _struct(
    "nabla_fast_mix_args",
    *_CALL,
    (c_int64, "rows vocab"),
    (Matrix, "logits hidden head"),
    (c_double, "tau"),
    (c_void_p, "noise_seed noise_position"),
    (c_int64, "table_count"),
    (c_void_p, "tables row_status"),
    (c_int32, "hard"),
    (c_void_p, "mixes cotangents"),
    (Matrix, "direct grad"),
)
DescentArgs = _struct(
    "nabla_fast_descent_args",
    *_CALL,
    (c_int64, "rows vocab"),
    (Matrix, "parameter exp_avg exp_avg_sq"),
    (c_void_p, "step"),
    (Matrix, "head grad"),
    (c_void_p, "schedule"),
    (c_int64, "iters schedule_stride"),
    (c_void_p, "until group"),
    (c_double, "tau"),
    (c_void_p, "noise_seed noise_position token flipped row_status"),
)


def on_host() -> bool:
    """Whether calls go to the host that runs device code on the CPU."""
    return HOST_VARIABLE in os.environ


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the one-line reason why it cannot be called."""
    host = os.environ.get(HOST_VARIABLE)
    try:
        path = host or get_cuda_library()
        if not host and (reason := _why_no_device()):
            return None, reason
        library = ctypes.CDLL(path)
    except (OSError, RuntimeError) as error:
        return None, " ".join(str(error).split())
    if library.nabla_fast_abi_version() != ABI_VERSION:
        return None, f"{path} is stale: `make cuda` builds it anew"
    library.nabla_fast_status_string.restype = ctypes.c_char_p
    library.nabla_fast_cuda_why_no_device.restype = ctypes.c_char_p
    if reason := library.nabla_fast_cuda_why_no_device():
        return None, f"the device does not run {path}: {reason.decode()}"
    if host:
        library.nabla_fast_host_reports.restype = ctypes.c_char_p
        library.nabla_fast_host_register.argtypes = [c_void_p, c_int64, ctypes.c_char_p, c_int32]
    return library, None


def _why_no_device() -> str | None:
    if torch.version.hip or not torch.cuda.is_available():
        return "no CUDA device was found"
    if (capability := torch.cuda.get_device_capability()) < _OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        return f"{name} has compute capability {major}.{minor}; the kernels need 8.0"
    return None


def why_missing() -> str | None:
    """One line that says why the CUDA kernels cannot be called; None where they can."""
    return _load()[1]


def call(function: str, args: Any, tensors: Mapping[str, Tensor | None], device: torch.device) -> None:
    """Put a function's kernels into the device's current stream.

    Args:
        function: of ``nabla_fast_cuda.h``, without ``nabla_fast_cuda_``.
        args: its struct, complete but for size and workspace.
        tensors: what it points to, by name.
        device: where they are.
    Raises:
        RuntimeError: the function has refused the call.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    query = getattr(library, f"nabla_fast_cuda_{function}_workspace")
    query.restype = c_int64
    args.size = ctypes.sizeof(args)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        workspace = torch.empty(query(ctypes.byref(args)), dtype=torch.uint8, device=device)
        args.workspace, args.workspace_bytes = workspace.data_ptr(), len(workspace)
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None
        with _known_to_host(library, {**tensors, "workspace": workspace}):
            status = getattr(library, f"nabla_fast_cuda_{function}")(ctypes.byref(args), c_void_p(stream))
    if status:
        line = library.nabla_fast_status_string(status).decode()
        raise RuntimeError(f"nabla_fast_cuda_{function}: {line}")


@contextlib.contextmanager
def _known_to_host(library: ctypes.CDLL, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Inside, the host lets device code use these tensors; what it reports is an error."""
    if not on_host():
        yield
        return
    library.nabla_fast_host_configure(ctypes.c_uint64(0), _HOST_TARGET)
    library.nabla_fast_host_clear_reports()
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel():
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = (reach + 1) * tensor.element_size()
            library.nabla_fast_host_register(tensor.data_ptr(), size, name.encode(), 0)
    try:
        yield
    finally:
        library.nabla_fast_host_forget()
    if reports := library.nabla_fast_host_reports().decode():
        raise RuntimeError(reports)


def matrix(tensor: Tensor) -> Any:
    """A matrix [.., width] whose rows have unit stride, read or written."""
    return Matrix(tensor.data_ptr(), tensor.shape[1], tensor.stride(0), DTYPES[tensor.dtype])


def matrices(tensors: Sequence[Tensor]) -> Any:
    return (Matrix * len(tensors))(*map(matrix, tensors))


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it whose rows have unit stride."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
