"""Rows of the one-hot gradient, their norms, and statistics of a softmax, from small tensors in C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast._native.loading import check, extension
from nabla_fast._native.mixes import matrix

# Matrices are float32 or bfloat16 on the CPU, with unit stride along their second dimension.


def _inputs(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    nll_coeff: float,
    token_maps: Sequence[Tensor | None],
) -> Any:
    return extension().Onehot(
        hidden.shape[0],
        head.shape[0],
        [matrix(cotangent) for cotangent in cotangents],
        [matrix(table) for table in tables],
        matrix(hidden),
        matrix(head),
        nll_coeff,
        [0 if token_map is None else token_map.data_ptr() for token_map in token_maps],
        [len(table) for table in tables[: len(token_maps)]],
    )


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def onehot_grad(
    cotangents: Sequence[Tensor],  # [N, H_t] each
    tables: Sequence[Tensor],  # [V, H_t] each, or [V_t, H_t] with a map
    hidden: Tensor,  # [N, H]
    head: Tensor,  # [V, H]
    nll_coeff: float,
    token_maps: Sequence[Tensor | None] = (),  # none, or None or [V] int64 of unit stride each
) -> tuple[Tensor, Tensor]:
    """Σ_t cotangent_t·table_tᵀ − nll_coeff·log_softmax(hidden·headᵀ), [N, V] float32; status [N] int32.

    With a map, row map[v] of the table stands for token v. 0 where the logit is −inf. A row of another
    status than 0 (``extension().status_string`` names them) is NaN. No gradient. Raises RuntimeError
    where the extension is missing, ValueError for a map that names a row that there is not.
    """
    native = extension()
    rows, vocab = hidden.shape[0], head.shape[0]
    inputs = _inputs(cotangents, tables, hidden, head, nll_coeff, token_maps)
    grad = torch.empty(rows, vocab, dtype=torch.float32, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    workspace = _bytes(native.onehot_grad_workspace(inputs))
    check(
        native.onehot_grad(
            inputs,
            grad.data_ptr(),
            vocab,
            status.data_ptr(),
            workspace.data_ptr(),
            len(workspace),
            torch.get_num_threads(),
        )
    )
    return grad, status


def onehot_grad_norm(
    cotangents: Sequence[Tensor],  # [N, H_t] each
    tables: Sequence[Tensor],  # [V, H_t] each, or [V_t, H_t] with a map
    hidden: Tensor,  # [N, H]
    head: Tensor,  # [V, H]
    nll_coeff: float,
    token_maps: Sequence[Tensor | None] = (),  # none, or None or [V] int64 of unit stride each
) -> tuple[Tensor, Tensor]:
    """Euclidean norms of the rows of :func:`onehot_grad`, [N] float32, without the rows; status [N].

    No gradient. Raises RuntimeError where the extension is missing.
    """
    native = extension()
    rows = hidden.shape[0]
    inputs = _inputs(cotangents, tables, hidden, head, nll_coeff, token_maps)
    norm = torch.empty(rows, dtype=torch.float32, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    workspace = _bytes(native.onehot_grad_norm_workspace(inputs))
    check(
        native.onehot_grad_norm(
            inputs,
            norm.data_ptr(),
            status.data_ptr(),
            workspace.data_ptr(),
            len(workspace),
            torch.get_num_threads(),
        )
    )
    return norm, status


def linear_token_stats(
    hidden: Tensor,  # [N, H]
    head: Tensor,  # [V, H]
    tau: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics as of :func:`token_stats` of the logits hidden·headᵀ, which are not stored.

    Raises ValueError for a tau not in [2^-64, 2^64]; RuntimeError where the extension is missing.
    """
    native = extension()
    rows, vocab = hidden.shape[0], head.shape[0]
    logsumexp, confidence, entropy = (
        torch.empty(rows, dtype=torch.float32, device="cpu") for _ in range(3)
    )
    argmax = torch.empty(rows, dtype=torch.int64, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    sizes = (matrix(hidden), rows, matrix(head), vocab)
    workspace = _bytes(native.linear_token_stats_workspace(*sizes))
    check(
        native.linear_token_stats(
            *sizes,
            tau,
            logsumexp.data_ptr(),
            confidence.data_ptr(),
            entropy.data_ptr(),
            argmax.data_ptr(),
            status.data_ptr(),
            workspace.data_ptr(),
            len(workspace),
            torch.get_num_threads(),
        )
    )
    return logsumexp, confidence, entropy, argmax, status
