"""The functions of nabla_fast_cuda.h on tensors of the CPU, by the host that runs device code."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from c_structs import I32, I64, POINTER, Matrix, MixArgs, Output
from torch import Tensor

from nabla_fast.ops import GumbelNoise

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OK, NAN, INFINITE, ALL_MASKED = range(4)
POISON = 0xFF  # bytes of NaN, in every dtype
GAP = 3  # elements after each row of a result


class Refused(Exception):
    """A call was answered by this status."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of bytes that nobody has written, with a gap after each row."""
    *outer, columns = shape
    element = torch.empty(0, dtype=dtype).element_size()
    memory = torch.full((*outer, (columns + GAP) * element), POISON, dtype=torch.uint8)
    return memory.view(dtype)[..., :columns]


def gaps(tensor: Tensor) -> Tensor:
    """The bytes between the rows of a tensor of :func:`poisoned`."""
    rows, columns = tensor.shape
    whole = tensor.as_strided((rows, columns + GAP), (columns + GAP, 1))
    return whole[:, columns:].contiguous().view(torch.uint8)


class Kernels:
    """A library that host.mk has built.

    Args:
        path: of the library.
        seed: of the order in which threads run.
    """

    def __init__(self, path: Path, seed: int = 0):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.nabla_fast_host_reports.restype = ctypes.c_char_p
        self.library.nabla_fast_host_launches.restype = ctypes.c_char_p
        self.library.nabla_fast_host_register.argtypes = [POINTER, I64, ctypes.c_char_p, I32]
        self.seed = seed

    @contextlib.contextmanager
    def _memory(self, given: dict[str, Tensor | None], written: dict[str, Tensor]) -> Iterator[None]:
        """Inside, device code may use these tensors; nothing may be reported."""
        library = self.library
        assert library.nabla_fast_host_configure(ctypes.c_uint64(self.seed), 90)
        library.nabla_fast_host_clear_reports()
        for name, tensor in {**given, **written}.items():
            if tensor is not None:
                constant = name in given
                library.nabla_fast_host_register(tensor.data_ptr(), span(tensor), name.encode(), constant)
        try:
            yield
        finally:
            library.nabla_fast_host_forget()
        reports = library.nabla_fast_host_reports().decode()
        assert not reports, reports

    def limit(self, multiprocessors: int, shared_bytes: int, most_cluster: int) -> None:
        """What launchers are told of the device from now on; 0: what the target has."""
        self.library.nabla_fast_host_limit(multiprocessors, ctypes.c_int64(shared_bytes), most_cluster)

    def launches(self, call: Callable[[], object]) -> list[tuple[str, int]]:
        """Kernels that a call launches, and their blocks."""
        self.library.nabla_fast_host_list_launches(1)
        call()
        self.library.nabla_fast_host_list_launches(0)
        lines = self.library.nabla_fast_host_launches().decode().splitlines()
        return [(name, int(blocks)) for name, blocks in map(str.split, lines)]

    def run(self, name: str, args: Any, given: dict[str, Tensor | None], **written: Tensor) -> None:
        """Call a function with a workspace of poison, as large as it asks for."""
        args.size = ctypes.sizeof(args)
        function = getattr(self.library, f"nabla_fast_cuda_{name}")
        query = getattr(self.library, f"nabla_fast_cuda_{name}_workspace")
        query.restype = I64
        workspace = torch.full((query(ctypes.byref(args)),), POISON, dtype=torch.uint8)
        args.workspace, args.workspace_bytes = workspace.data_ptr(), len(workspace)
        with self._memory(given, {"workspace": workspace, **written}):
            status = function(ctypes.byref(args), None)
        if status:
            raise Refused(status)

    def embedding_mix(
        self,
        logits: Tensor,
        tables: Sequence[Tensor],
        *,
        tau: float = 1.0,
        hard: bool = True,
        noise: GumbelNoise | None = None,
        direct: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The mixes, in ``dtype`` or the tables' own, and the rows' status."""
        del direct  # of the backward
        return self._mix({"logits": logits}, tables, tau, hard, noise, dtype)

    def linear_embedding_mix(
        self,
        hidden: Tensor,
        head: Tensor,
        tables: Sequence[Tensor],
        *,
        tau: float = 1.0,
        hard: bool = True,
        noise: GumbelNoise | None = None,
        direct: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The same of hidden states under a head."""
        del direct  # of the backward
        return self._mix({"hidden": hidden, "head": head}, tables, tau, hard, noise, None)

    def _mix(
        self,
        source: dict[str, Tensor],
        tables: Sequence[Tensor],
        tau: float,
        hard: bool,
        noise: GumbelNoise | None,
        dtype: torch.dtype | None,
    ) -> tuple[list[Tensor], Tensor]:
        rows = len(next(iter(source.values())))
        mixes = [poisoned(rows, table.shape[1], dtype=dtype or table.dtype) for table in tables]
        status = torch.full((rows,), -1, dtype=torch.int32)
        args, given = _mix_args(source, tables, tau, noise, status)
        outputs = (Output * len(mixes))(*map(output, mixes))
        args.hard, args.mixes = hard, ctypes.addressof(outputs)
        written = {f"mixes[{t}]": mix for t, mix in enumerate(mixes)}
        self.run("embedding_mix", args, given, status=status, **written)
        assert all((gaps(mix) == POISON).all() for mix in mixes)
        return mixes, status

    def embedding_mix_backward(
        self,
        cotangents: Sequence[Tensor],
        logits: Tensor,
        tables: Sequence[Tensor],
        *,
        tau: float = 1.0,
        noise: GumbelNoise | None = None,
        direct: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """∂ℒ/∂logits and the rows' status."""
        grad = poisoned(*logits.shape, dtype=logits.dtype)
        return self._backward({"logits": logits}, grad, cotangents, tables, tau, noise, direct)

    def linear_embedding_mix_backward(
        self,
        cotangents: Sequence[Tensor],
        hidden: Tensor,
        head: Tensor,
        tables: Sequence[Tensor],
        *,
        tau: float = 1.0,
        noise: GumbelNoise | None = None,
        direct: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """∂ℒ/∂hidden in float32 and the rows' status."""
        source, grad = {"hidden": hidden, "head": head}, poisoned(*hidden.shape, dtype=torch.float32)
        return self._backward(source, grad, cotangents, tables, tau, noise, direct)

    def _backward(
        self,
        source: dict[str, Tensor],
        grad: Tensor,
        cotangents: Sequence[Tensor],
        tables: Sequence[Tensor],
        tau: float,
        noise: GumbelNoise | None,
        direct: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        status = torch.full((len(grad),), -1, dtype=torch.int32)
        args, given = _mix_args(source, tables, tau, noise, status)
        cotangents = [rows_contiguous(cotangent) for cotangent in cotangents]
        states = (Matrix * len(cotangents))(*map(matrix, cotangents))
        args.cotangents, args.grad = ctypes.addressof(states), output(grad)
        given |= {f"cotangents[{t}]": cotangent for t, cotangent in enumerate(cotangents)}
        if direct is not None:
            given["direct"] = rows_contiguous(direct)
            args.direct = matrix(given["direct"])
        self.run("embedding_mix_backward", args, given, status=status, grad=grad)
        assert (gaps(grad) == POISON).all()
        return grad, status


def matrix(tensor: Tensor) -> Matrix:
    return Matrix(tensor.data_ptr(), tensor.shape[1], tensor.stride(0), DTYPES[tensor.dtype])


def output(tensor: Tensor) -> Output:
    return Output(tensor.data_ptr(), tensor.shape[1], tensor.stride(0), DTYPES[tensor.dtype])


def _mix_args(
    source: dict[str, Tensor],
    tables: Sequence[Tensor],
    tau: float,
    noise: GumbelNoise | None,
    status: Tensor,
) -> tuple[MixArgs, dict[str, Tensor | None]]:
    """What forward and backward read, and its tensors by name, which must outlive the call.

    Args:
        source: ``logits``, or ``hidden`` and ``head``.
    """
    given: dict[str, Tensor | None] = {name: rows_contiguous(tensor) for name, tensor in source.items()}
    tables = [rows_contiguous(table) for table in tables]
    seed, position = (key.contiguous() for key in noise) if noise else (None, None)
    rows = len(next(iter(source.values())))
    vocab = len(source["head"]) if "head" in source else source["logits"].shape[1]
    args = MixArgs(rows=rows, vocab=vocab, tau=tau, table_count=len(tables))
    for name, tensor in given.items():
        setattr(args, name, matrix(tensor))
    args.row_status = status.data_ptr()
    args.kept = (Matrix * len(tables))(*map(matrix, tables))
    args.tables = ctypes.addressof(args.kept)
    if noise:
        args.noise_seed, args.noise_position = seed.data_ptr(), position.data_ptr()
    given |= {"noise_seed": seed, "noise_position": position}
    return args, given | {f"tables[{t}]": table for t, table in enumerate(tables)}


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it whose rows have unit stride."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] < 2 else tensor.contiguous()
