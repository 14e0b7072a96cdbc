"""Statistics of rows in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast._native.loading import check, extension


def token_stats(
    logits: Tensor,  # [N, V] float32 or bfloat16, on the CPU, unit stride along V, any along N
    tau: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of each row of softmax(logits / tau); -inf logits are masked tokens.

    Returns logsumexp, confidence (largest probability) and entropy (nats), each [N] float32; argmax
    [N] int64, the first of equal logits; and status [N] int32: 0, or 1 for a row with a NaN, 2 for
    one with +inf, 3 for one of -inf alone (``extension().status_string`` names them). Where the
    status is not 0 the other results are NaN, and argmax is -1. No gradient.

    Raises ValueError for another shape, dtype, device or stride, or a tau not in [2^-64, 2^64];
    RuntimeError where the extension is missing.
    """
    native = extension()
    dtypes = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
    if logits.dim() != 2 or logits.device.type != "cpu" or logits.dtype not in dtypes:
        raise ValueError(
            "token_stats takes [N, V] float32 or bfloat16 logits on the CPU, "
            f"not {list(logits.shape)} {logits.dtype} on {logits.device}"
        )
    rows, vocab = logits.shape
    if vocab > 1 and logits.stride(1) != 1:
        raise ValueError(f"token_stats needs unit stride along V, not {logits.stride(1)}")
    logsumexp, confidence, entropy = (
        torch.empty(rows, dtype=torch.float32, device="cpu") for _ in range(3)
    )
    argmax = torch.empty(rows, dtype=torch.int64, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    check(
        native.token_stats(
            logits.data_ptr(),
            dtypes[logits.dtype],
            rows,
            vocab,
            logits.stride(0),
            tau,
            logsumexp.data_ptr(),
            confidence.data_ptr(),
            entropy.data_ptr(),
            argmax.data_ptr(),
            status.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return logsumexp, confidence, entropy, argmax, status
