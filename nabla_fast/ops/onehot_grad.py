"""Rows of the gradient G with respect to the one-hot tokens, from tensors that hold no vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_fast._native import extension
from nabla_fast.ops.checks import expect, expect_rows, expect_tables, expect_vocabulary
from nabla_fast.ops.head_map import BIAS_RULE, check_head_map
from nabla_fast.ops.limits import native_backend, triton_backend
from nabla_fast.ops.lm_logits import lm_logits
from nabla_fast.ops.registry import floats, integers, op
from nabla_fast.ops.rows import accumulation_dtype, report, row_status
from nabla_fast.ops.softmax import onehot_gradient

ONEHOT_RULES = {
    "hidden": floats("N", "H"),
    "head": floats("V", "H"),
    "tables": floats("V_t", "H_t"),
    "token_maps": integers("V"),
    "cotangents": floats("N", "H_t"),
    **BIAS_RULE,
}


@op(arguments=ONEHOT_RULES, reads=("token_maps",))
def onehot_grad(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    *,
    nll_coeff: float,
    token_maps: Sequence[Tensor | None] = (),
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """G[v] = Σ_t ⟨T_t[v], ∂ℒ/∂e_t⟩ − ν log π(v), with log π = log_softmax(z), z = hidden·headᵀ.

    Args:
        cotangents: ∂ℒ/∂e_t [N, H_t], one a table; floating point, like the tables.
        tables: [V, H_t] each, or with a map [V_t, H_t], the rows of another vocabulary.
        hidden: final hidden states [N, H] that predict the rows' tokens over the hard sequence.
        head: the lm_head W [V, H].
        nll_coeff: ν.
        token_maps: none at all, or one a table: None, or int64 [V], the row of the table that stands for
            each token. No copy of the table is made. On a device a number out of range is not reported:
            the nearest row is taken.
        bias, scale, softcap: of the logits, as in ``lm_logits``; without them z = h·headᵀ.
    Returns:
        [N, V], float32 (float64 if an input is). A token of probability exactly 0 is masked: its
        gradient is 0.
    Raises:
        InputError: a shape, dtype or device does not fit; a map on the CPU names a row that its table
            does not have.
        RowError: a row's logits hidden·headᵀ have a NaN or +inf, or no finite value.

    Example:
        >>> table, hidden, head = torch.eye(3), torch.zeros(1, 2), torch.ones(3, 2)
        >>> onehot_grad([torch.tensor([[1.0, 2.0, 3.0]])], [table], hidden, head, nll_coeff=0.0)
        tensor([[1., 2., 3.]])
    """
    head_map = {"bias": bias, "scale": scale, "softcap": softcap}
    grad, status = onehot_rows(cotangents, tables, hidden, head, nll_coeff, token_maps, head_map)
    report("onehot_grad", status)
    return grad


def onehot_rows(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    nll_coeff: float,
    token_maps: Sequence[Tensor | None],
    head_map: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """G [N, V] as :func:`onehot_grad` returns it, and a status [N] int32 of the logits' rows."""
    dtype = accumulation_dtype(hidden, *cotangents)
    grad = onehot_gradient(cotangents, tables, None, dtype, token_maps)
    z = lm_logits(hidden.to(dtype), head, **head_map)
    return masked_gradient(grad, z, nll_coeff), row_status(z)


def masked_gradient(grad: Tensor, z: Tensor, nll_coeff: float) -> Tensor:
    """G − ν log softmax(z), 0 where a token's probability is; [N, V] all of them."""
    log_pi = torch.log_softmax(z, dim=-1)
    return (grad - nll_coeff * log_pi).masked_fill(log_pi == -torch.inf, 0)


def check_onehot_inputs(
    name: str,
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    *,
    token_maps: Sequence[Tensor | None],
    nll_coeff: float,
    **head_map: Any,
) -> None:
    """Raise InputError for arguments that neither rows of G nor their norms can be computed from."""
    expect_vocabulary(name, len(head))
    expect_tables(name, tables, cotangents)
    check_head_map(name, **head_map)
    expect(
        len(token_maps) in (0, len(tables)),
        f"{name}: one token map a table is needed, or none, got {len(token_maps)} for {len(tables)}",
    )
    for t, table in enumerate(tables):
        if not token_maps or token_maps[t] is None:
            expect(
                len(table) == len(head),
                f"{name}: tables[{t}] must have {len(head)} rows or a token map, got {len(table)}",
            )
        elif token_maps[t].is_cpu:  # for one on a device nobody waits
            expect_rows(f"{name}: token_maps[{t}]", token_maps[t], len(table))


@onehot_grad.check
def check_onehot_grad(*inputs: Any, **options: Any) -> None:
    check_onehot_inputs("onehot_grad", *inputs, **options)


@onehot_grad.fake
def fake_onehot_grad(
    cotangents: Sequence[Tensor], tables: Sequence[Tensor], hidden: Tensor, head: Tensor, **_: Any
) -> Tensor:
    return hidden.new_empty((hidden.shape[0], head.shape[0]), dtype=accumulation_dtype(hidden, *cotangents))


def run_kernel(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    *,
    nll_coeff: float,
    token_maps: Sequence[Tensor | None],
    convert: Callable[[Tensor], Tensor] = lambda rows: rows,
    **head_map: Any,
) -> tuple[Tensor, Tensor]:
    """Result and status [N] int32 of a kernel of G, given the arguments of the op.

    Args:
        convert: makes of cotangents [N, H_t] and hidden states [N, H] what the kernel reads.
        head_map: of the logits; handed on where the kernel takes it.
    """
    rows = [convert(cotangent) for cotangent in cotangents]
    maps = [token_map if token_map is None else token_map.contiguous() for token_map in token_maps]
    return kernel(rows, list(tables), convert(hidden), head, nll_coeff, maps, **head_map)


def onehot_fields(
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    nll_coeff: float,
    token_maps: Sequence[Tensor | None] = (),
    **head_map: Any,
) -> dict[str, Any]:
    """What both C++ kernels read, of tensors that they take."""
    return {
        "num_threads": torch.get_num_threads(),
        "rows": hidden.shape[0],
        "vocab": head.shape[0],
        "hidden": hidden,
        "head": head,
        "nll_coeff": nll_coeff,
        "cotangents": cotangents,
        "tables": tables,
        "token_maps": token_maps or None,
        "table_rows": [table.shape[0] for table in tables] if token_maps else None,
        **native_backend.head_map_fields(**head_map),
    }


def onehot_grad_native(*inputs: Any, **head_map: Any) -> tuple[Tensor, Tensor]:
    """G [N, V] of :func:`onehot_fields`, and a status [N] int32: a row with another one than 0 is NaN."""
    fields = onehot_fields(*inputs, **head_map)
    grad = native_backend.empty_matrix(fields["rows"], fields["vocab"])
    status = torch.empty(fields["rows"], dtype=torch.int32, device="cpu")
    extension().onehot_grad(**fields, row_status=status, grad=grad)
    return grad, status


@onehot_grad.backend("cpu", refuses=native_backend.onehot_refusal)
def onehot_grad_cpu(*inputs: Any, **options: Any) -> Tensor:
    grad, status = run_kernel(onehot_grad_native, *inputs, **options, convert=native_backend.as_native)
    report("onehot_grad", status)
    return grad


@onehot_grad.backend("triton", refuses=triton_backend.onehot_refusal)
def onehot_grad_triton(
    *inputs: Any, nll_coeff: float, token_maps: Sequence[Tensor | None], **_: Any
) -> Tensor:
    from nabla_fast.triton_kernels import onehot_grad as kernels

    grad, status = run_kernel(kernels.onehot_grad, *inputs, nll_coeff=nll_coeff, token_maps=token_maps)
    report("onehot_grad", status)
    return grad
