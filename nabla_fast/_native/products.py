"""Products of hidden states with a head in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast._native.loading import check, extension


def lm_logits(
    hidden: Tensor,  # [N, H] float32 on the CPU, unit stride along H
    head: Tensor,  # [V, H] float32 or bfloat16 on the CPU, unit stride along H
) -> Tensor:
    """hidden·headᵀ, [N, V] float32. No gradient. The same bits in a row whatever the other rows.

    Raises RuntimeError where the extension is missing.
    """
    native = extension()
    logits = torch.empty(hidden.shape[0], head.shape[0], dtype=torch.float32, device="cpu")
    check(
        native.lm_logits(
            hidden.data_ptr(),
            hidden.shape[0],
            hidden.stride(0),
            head.data_ptr(),
            native.FLOAT32 if head.dtype == torch.float32 else native.BFLOAT16,
            head.shape[0],
            head.shape[1],
            head.stride(0),
            logits.data_ptr(),
            head.shape[0],
            torch.get_num_threads(),
        )
    )
    return logits


def nll_grad(
    hidden: Tensor,  # [N, H] float32 on the CPU, unit stride along H
    head: Tensor,  # [V, H] float32 or bfloat16 on the CPU, unit stride along H
    tokens: Tensor,  # [N] int64 on the CPU, contiguous
) -> tuple[Tensor, Tensor]:
    """∂/∂hidden of −Σ log softmax(hidden·headᵀ)[tokens], [N, H] float32; status [N] int32.

    Raises ValueError for a token that the head does not have; RuntimeError where the extension is
    missing.
    """
    native = extension()
    (rows, width), vocab = hidden.shape, head.shape[0]
    grad = torch.empty(rows, width, dtype=torch.float32, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    workspace = torch.empty(native.nll_grad_workspace(rows, vocab, width), dtype=torch.uint8, device="cpu")
    check(
        native.nll_grad(
            hidden.data_ptr(),
            rows,
            hidden.stride(0),
            head.data_ptr(),
            native.FLOAT32 if head.dtype == torch.float32 else native.BFLOAT16,
            vocab,
            width,
            head.stride(0),
            tokens.data_ptr(),
            grad.data_ptr(),
            status.data_ptr(),
            workspace.data_ptr(),
            len(workspace),
            torch.get_num_threads(),
        )
    )
    return grad, status
