"""The C++ kernels (``nabla_fast._C``) behind plain functions on CPU tensors.

The extension is optional. Nothing here loads it, or torch, before the first call.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# NABLA_FAST_ABI_VERSION that this file is written against.
ABI_VERSION = 4

# The widest head that attention takes: NABLA_FAST_MOST_HEAD_DIM.
MOST_HEAD_DIM = 512

# nabla_fast_isa of nabla_fast.h, by value.
ISA_NAMES = ("baseline", "avx2", "avx512")


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or None and the one-line reason why there is none."""
    # torch brings a libgomp; loaded first, the extension shares it, and its threads.
    import torch  # noqa: F401

    try:
        module = importlib.import_module("nabla_fast._C")
    except ModuleNotFoundError:
        return None, (
            "nabla_fast._C is not built: no working C++ compiler was found when the package was installed"
        )
    except ImportError as error:
        return None, f"nabla_fast._C does not load: {' '.join(str(error).split())}"
    if module.abi_version() != ABI_VERSION:
        return None, (
            f"nabla_fast._C is stale: it has ABI version {module.abi_version()}, "
            f"this package needs {ABI_VERSION}; install the package again"
        )
    return module, None


def available() -> bool:
    """Whether the C++ kernels can be called."""
    return _load()[0] is not None


def why_missing() -> str | None:
    """One line that says why the C++ kernels cannot be called; None where they can."""
    return _load()[1]


def extension() -> ModuleType:
    """``nabla_fast._C``. Raises RuntimeError with ``why_missing()`` where there is none."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def cpu_isa() -> str:
    """The instruction set that kernels use: ``"baseline"``, ``"avx2"`` or ``"avx512"``."""
    return ISA_NAMES[extension().cpu_isa()]


def include_dir() -> str:
    """The directory of ``nabla_fast.h``, installed or in a source tree."""
    package = Path(__file__).resolve().parent
    installed = package / "include"
    return str(installed if installed.is_dir() else package.parent / "csrc" / "include")


def _check(status: int) -> None:
    if status != 0:
        raise ValueError(extension().status_string(status))


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
    import torch

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
    _check(
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


def lm_logits(
    hidden: Tensor,  # [N, H] float32 on the CPU, unit stride along H
    head: Tensor,  # [V, H] float32 or bfloat16 on the CPU, unit stride along H
) -> Tensor:
    """hidden·headᵀ, [N, V] float32. No gradient. The same bits in a row whatever the other rows.

    Raises RuntimeError where the extension is missing.
    """
    import torch

    native = extension()
    logits = torch.empty(hidden.shape[0], head.shape[0], dtype=torch.float32, device="cpu")
    _check(
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


def dto_descent_(
    z: Tensor,  # [N, V] float32 like all of [N, V], on the CPU, unit stride along V, any along N
    grad: Tensor,  # [N, V]
    exp_avg: Tensor,  # [N, V]
    exp_avg_sq: Tensor,  # [N, V]
    step: Tensor,  # [N] int64 like all of [N], contiguous
    schedule: Tensor,  # [K] or [N, K] float64, unit stride along K
    *,
    until: Tensor | None = None,  # [N]
    group: Tensor | None = None,  # [N]
    tau: float = 1.0,
    noise: tuple[Tensor, Tensor] | None = None,  # seed [N] and position [N]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps of ``nabla_fast.ops.dto_descent`` in place; arguments as of the op, right as they are.

    Returns the hard tokens [N] int64; which of them the last step moved, [N] bool; and None, or the
    status [N] int32 of the rows as of :func:`token_stats`, if one is not 0: then nothing has changed.

    Raises ValueError for a step beyond the schedule or a tau not in [2^-64, 2^64]; RuntimeError where
    the extension is missing.
    """
    import torch

    native = extension()
    rows, vocab = z.shape
    token = torch.empty(rows, dtype=torch.int64, device="cpu")
    flipped = torch.empty(rows, dtype=torch.bool, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    seed, position = (0, 0) if noise is None else (noise[0].data_ptr(), noise[1].data_ptr())
    code = native.dto_descent(
        z.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        step.data_ptr(),
        rows,
        vocab,
        z.stride(0),
        grad.stride(0),
        exp_avg.stride(0),
        exp_avg_sq.stride(0),
        schedule.data_ptr(),
        schedule.shape[-1],
        schedule.stride(0) if schedule.ndim == 2 else 0,
        0 if until is None else until.data_ptr(),
        # A row alone has nothing to wait for.
        0 if group is None or rows == 1 else group.data_ptr(),
        tau,
        seed,
        position,
        token.data_ptr(),
        flipped.data_ptr(),
        status.data_ptr(),
        torch.get_num_threads(),
    )
    if code == native.BAD_ROWS:
        return token, flipped, status
    _check(code)
    return token, flipped, None


def nll_grad(
    hidden: Tensor,  # [N, H] float32 on the CPU, unit stride along H
    head: Tensor,  # [V, H] float32 or bfloat16 on the CPU, unit stride along H
    tokens: Tensor,  # [N] int64 on the CPU, contiguous
) -> tuple[Tensor, Tensor]:
    """∂/∂hidden of −Σ log softmax(hidden·headᵀ)[tokens], [N, H] float32; status [N] int32.

    Raises ValueError for a token that the head does not have; RuntimeError where the extension is
    missing.
    """
    import torch

    native = extension()
    (rows, width), vocab = hidden.shape, head.shape[0]
    grad = torch.empty(rows, width, dtype=torch.float32, device="cpu")
    status = torch.empty(rows, dtype=torch.int32, device="cpu")
    workspace = torch.empty(native.nll_grad_workspace(rows, vocab, width), dtype=torch.uint8, device="cpu")
    _check(
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


def prefix_attention(
    q: Tensor,  # [B, Hq, S, D] float32 on the CPU, unit stride along D, any along the others
    k: Tensor,  # [B, Hkv, S, D] likewise
    v: Tensor,  # [B, Hkv, S, D] likewise
    key_pool: Tensor,  # [blocks, block_size, Hkv, D] likewise
    value_pool: Tensor,  # [blocks, block_size, Hkv, D] likewise
    block_tables: Tensor,  # [B, M] int64, unit stride along M
    prefix_lengths: Tensor,  # [B] int64, contiguous
    scale: float,
    window: int | None,
) -> Tensor:
    """The forward of ``nabla_fast.ops.prefix_attention``: [B, Hq, S, D], in memory [B, S, Hq, D].

    Raises ValueError for D above 512, a prefix longer than its table or a block not in the pool;
    RuntimeError where the extension is missing.
    """
    import torch

    native = extension()
    batch, heads, suffix, dim = q.shape
    output = torch.empty(batch, suffix, heads, dim, dtype=torch.float32, device="cpu").transpose(1, 2)
    code = native.prefix_attention(
        *_attention(q, k, v, key_pool, value_pool, block_tables, prefix_lengths, scale, window),
        output.data_ptr(),
        output.stride(),
        torch.get_num_threads(),
    )
    if code:
        _check(code)
    return output


def prefix_attention_backward(
    cotangent: Tensor,  # [B, Hq, S, D] float32 on the CPU, unit stride along D, any along the others
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, Hq, S, D], dk and dv [B, Hkv, S, D], in memory [B, S, heads, D].

    Other arguments and errors as of the forward.
    """
    import torch

    native = extension()
    batch, _, suffix, dim = q.shape
    heads = q.shape[1], k.shape[1], k.shape[1]
    dq, dk, dv = (
        torch.empty(batch, suffix, count, dim, dtype=torch.float32, device="cpu").transpose(1, 2)
        for count in heads
    )
    code = native.prefix_attention_backward(
        *_attention(q, k, v, key_pool, value_pool, block_tables, prefix_lengths, scale, window),
        cotangent.data_ptr(),
        cotangent.stride(),
        dq.data_ptr(),
        dq.stride(),
        dk.data_ptr(),
        dk.stride(),
        dv.data_ptr(),
        dv.stride(),
        torch.get_num_threads(),
    )
    if code:
        _check(code)
    return dq, dk, dv


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Any, ...]:
    """The inputs as the extension's attentions take them."""
    return (
        q.data_ptr(),
        q.shape,
        q.stride(),
        k.data_ptr(),
        k.stride(),
        v.data_ptr(),
        v.stride(),
        key_pool.data_ptr(),
        key_pool.shape,
        key_pool.stride(),
        value_pool.data_ptr(),
        value_pool.stride(),
        block_tables.data_ptr(),
        block_tables.shape[1],
        block_tables.stride(0),
        prefix_lengths.data_ptr(),
        scale,
        window or 0,
    )
