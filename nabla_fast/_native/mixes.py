"""The embedding mixes in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_fast._native.loading import check, extension


def matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """``tensor`` [M, H] float32 or bfloat16, unit stride along H, as the extension takes it."""
    native = extension()
    dtype = native.FLOAT32 if tensor.dtype == torch.float32 else native.BFLOAT16
    return tensor.data_ptr(), dtype, tensor.shape[1], tensor.stride(0)


class Mix:
    """Relaxed one-hot rows and the tables they mix, for a forward or a backward.

    Raises ValueError for what the C interface refuses; RuntimeError where the extension is missing.
    """

    def __init__(
        self,
        rows: Tensor,  # logits [N, V] or, with a head, hidden states [N, H]; float32 or bfloat16
        head: Tensor | None,  # [V, H] float32 or bfloat16
        tables: Sequence[Tensor],  # [V, H_t] float32 or bfloat16 each; all with unit stride along H
        tau: float,
        noise: tuple[Tensor, Tensor] | None,  # seed [N] and position [N] int64, contiguous
    ):
        self._rows, self._head, self._tables, self._noise = rows, head, tables, noise  # kept alive
        self._call = extension().Mix(
            rows=rows.shape[0],
            vocab=rows.shape[1] if head is None else head.shape[0],
            logits=matrix(rows) if head is None else None,
            hidden=None if head is None else matrix(rows),
            head=None if head is None else matrix(head),
            tau=tau,
            noise_seed=0 if noise is None else noise[0].data_ptr(),
            noise_position=0 if noise is None else noise[1].data_ptr(),
            tables=[matrix(table) for table in tables],
        )

    def forward(self, hard: bool) -> tuple[list[Tensor], Tensor]:
        """The mixes, [N, H_t] in each table's dtype, and the status [N] int32 of the rows."""
        n = self._rows.shape[0]
        mixes = [torch.empty(n, t.shape[1], dtype=torch.float32, device="cpu") for t in self._tables]
        status = torch.empty(n, dtype=torch.int32, device="cpu")
        check(
            self._call.forward(
                hard, [mix.data_ptr() for mix in mixes], status.data_ptr(), torch.get_num_threads()
            )
        )
        return [mix.to(table.dtype) for mix, table in zip(mixes, self._tables, strict=True)], status

    def backward(
        self,
        cotangents: Sequence[Tensor],  # [N, H_t] float32 or bfloat16, unit stride along H_t
        direct: Tensor | None,  # [N, V] float32 or bfloat16, unit stride along V
    ) -> tuple[Tensor, Tensor]:
        """∂ℒ/∂logits [N, V] in their dtype or ∂ℒ/∂hidden [N, H] float32; status [N] int32."""
        dtype = self._rows.dtype if self._head is None else torch.float32
        grad = torch.empty(self._rows.shape, dtype=dtype, device="cpu")
        status = torch.empty(self._rows.shape[0], dtype=torch.int32, device="cpu")
        check(
            self._call.backward(
                [matrix(cotangent) for cotangent in cotangents],
                None if direct is None else matrix(direct),
                grad.data_ptr(),
                grad.shape[1],
                status.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return grad, status
