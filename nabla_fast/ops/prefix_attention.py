"""Attention of a suffix over a paged, frozen prefix and over itself."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_fast._native import MOST_HEAD_DIM, extension
from nabla_fast.errors import InputError
from nabla_fast.ops.checks import expect
from nabla_fast.ops.limits import triton_backend
from nabla_fast.ops.limits.native_backend import device_refusal, unit_stride_refusal
from nabla_fast.ops.limits.refusals import contiguous_refusal, dtype_refusal
from nabla_fast.ops.registry import floats, integers, op
from nabla_fast.ops.rows import accumulation_dtype, report
from nabla_fast.plans.recording import step

_FLOAT32 = (torch.float32,)
_MOST_TRITON_HEAD_DIM = 256
_MOST_TRITON_SEQUENCES = 65_535  # of a grid's third dimension on NVIDIA's GPUs


class Attention(NamedTuple):
    """What attention gives each query: a mix of values, and the logarithm of what its weights are over."""

    output: Tensor  # [B, Hq, S, D] in the dtype of q; in memory [B, S, Hq, D], as projections read it
    logsumexp: Tensor  # [B, Hq, S] float32 (float64 for float64 inputs) of the scores, the sink's included


class SuffixGradient(NamedTuple):
    """Gradients of the suffix's queries, keys and values; the prefix is constant."""

    q: Tensor  # [B, Hq, S, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, D]


_HEADS = floats("B", "Hkv", "S", "D")
_POOL = floats("blocks", "block_size", "Hkv", "D")
_RULES = {
    "q": floats("B", "Hq", "S", "D"),
    "k": _HEADS,
    "v": _HEADS,
    "key_pool": _POOL,
    "value_pool": _POOL,
    "block_tables": integers("B", "M"),
    "prefix_lengths": integers("B"),
    "sinks": floats("Hq"),
}


@op(arguments=_RULES, reads=())
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Attention:
    """softmax(scale · q·[K_prefix k]ᵀ) · [V_prefix v], causal within the suffix.

    Suffix token s of sequence b is at position prefix_lengths[b] + s and attends to every position up
    to its own, or, with a window, to the last ``window`` of these. Query heads share key-value heads
    in groups (GQA). Suffixes of different lengths are padded on the right: padding is attended to by
    padding alone. The output is differentiable once, in q, k and v; pool and sinks are constant, and the
    logsumexp has no gradient.

    Args:
        q: [B, Hq, S, D], floating point.
        k, v: [B, Hkv, S, D], Hq a multiple of Hkv; floating point.
        key_pool, value_pool: [blocks, block_size, Hkv, D] of one layer.
        block_tables: [B, M] int64, the blocks of each prefix; entries after its end are ignored.
        prefix_lengths: [B] int64, from 0 to M · block_size.
        scale: factor of the scores q·k.
        window: positions a token sees, itself included; None for all.
        softcap: c, positive, where scores s become c·tanh(s/c); None for no cap.
        sinks: [Hq], floating point: the score of a token without a value that all queries of a head see
            beside the others, not capped; None for none.
    Returns:
        output [B, Hq, S, D] in the dtype of q; logsumexp [B, Hq, S] in float32 (float64 where q or k is),
        of all scores that a query sees, the sink among them: attention in parts is joined by it.
    Raises:
        InputError: a shape or dtype does not fit; on the CPU also if a prefix is longer than its table, or
            a block is not in the pool.
        RowError: of these two on a device, by the next :func:`nabla_fast.ops.synchronize`.

    Source: the block table from Kwon et al., "PagedAttention", SOSP 2023; the cap from Gemma Team, "Gemma
    2", 2024; sinks from Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, as
    learnt scores in gpt-oss, 2025.

    Example:
        >>> q, k, v = torch.ones(3, 1, 2, 1, 4).unbind()
        >>> pool = torch.zeros(8, 16, 2, 4)  # 8 blocks of 16 tokens
        >>> block_tables, prefix_lengths = torch.tensor([[5]]), torch.tensor([3])
        >>> output, logsumexp = prefix_attention(
        ...     q, k, v, pool, pool, block_tables, prefix_lengths, scale=0.0
        ... )
        >>> output[0, :, 0, 0], logsumexp[0, :, 0].exp()
        (tensor([0.2500, 0.2500]), tensor([4., 4.]))
    """
    _expect_blocks("prefix_attention", key_pool, block_tables, prefix_lengths)
    keys, values = _gathered(key_pool, value_pool, block_tables, prefix_lengths, k, v)
    seen = _seen(prefix_lengths, keys.shape[2] - k.shape[2], k.shape[2], window)
    queries = q.to(keys.dtype).unflatten(1, (k.shape[1], -1))
    p, logsumexp, _slope = _weights(queries, keys, seen, scale, softcap, sinks)
    output = (p @ values[:, :, None]).flatten(1, 2)
    return Attention(_by_token(output.to(q.dtype)), logsumexp.flatten(1, 2))


_BACKWARD_RULES = {
    "cotangent": floats("B", "Hq", "S", "D"),
    "output": floats("B", "Hq", "S", "D"),
    "logsumexp": floats("B", "Hq", "S"),
    **_RULES,
}


@op(arguments=_BACKWARD_RULES, reads=())
def prefix_attention_backward(
    cotangent: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> SuffixGradient:
    """∂ℒ/∂q, ∂ℒ/∂k and ∂ℒ/∂v of :func:`prefix_attention`.

    Args:
        cotangent: ∂ℒ/∂output [B, Hq, S, D].
        output, logsumexp: of the forward with the same arguments. Backends may read them in place of a
            pass over the prefix; this body computes both again.
        q, k, v, key_pool, value_pool, block_tables, prefix_lengths: as in the forward, as are all others.
    Returns:
        ∂ℒ/∂q [B, Hq, S, D], ∂ℒ/∂k and ∂ℒ/∂v [B, Hkv, S, D], in memory by token as the output.
    """
    suffix, groups = k.shape[2], q.shape[1] // k.shape[1]
    _expect_blocks("prefix_attention_backward", key_pool, block_tables, prefix_lengths)
    keys, values = _gathered(key_pool, value_pool, block_tables, prefix_lengths, k, v)
    seen = _seen(prefix_lengths, keys.shape[2] - suffix, suffix, window)
    queries = q.to(keys.dtype).unflatten(1, (-1, groups))  # [B, Hkv, G, S, D]
    p, _logsumexp, slope = _weights(queries, keys, seen, scale, softcap, sinks)
    upstream = cotangent.to(p.dtype).unflatten(1, (-1, groups))
    dp = upstream @ values[:, :, None].mT
    # The softmax's Jacobian spans prefix and suffix: its mean is over both.
    ds = scale * p * (dp - (p * dp).sum(dim=-1, keepdim=True))
    if slope is not None:
        ds = ds * slope
    dq = (ds @ keys[:, :, None]).flatten(1, 2)
    dk = (ds[..., -suffix:].mT @ queries).sum(dim=2)
    dv = (p[..., -suffix:].mT @ upstream).sum(dim=2)
    return SuffixGradient(*map(_by_token, (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))))


def _weights(
    queries: Tensor,
    keys: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Softmax weights [B, Hkv, G, S, P + S] of queries [B, Hkv, G, S, D], those of sinks left out; the
    logsumexp [B, Hkv, G, S]; and the slope of the capped scores."""
    scores = scale * (queries @ keys[:, :, None].mT)
    slope = None
    if softcap is not None:
        capped = (scores / softcap).tanh()
        scores, slope = softcap * capped, 1 - capped * capped
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, *queries.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    return scores.softmax(dim=-1)[..., : keys.shape[2]], scores.logsumexp(dim=-1), slope


def _by_token(heads: Tensor) -> Tensor:
    """[B, heads, S, D], laid out in memory as [B, S, heads, D], as projections write and read it."""
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


def _used(key_pool: Tensor, block_tables: Tensor, prefix_lengths: Tensor) -> Tensor:
    """[B, M], which entries of a block table stand before the end of its prefix."""
    first = torch.arange(block_tables.shape[1], device=block_tables.device) * key_pool.shape[1]
    return first < prefix_lengths[:, None]


def _expect_blocks(name: str, key_pool: Tensor, block_tables: Tensor, prefix_lengths: Tensor) -> None:
    """Every prefix fits its block table, its blocks the pool; on a device, the device asserts it."""
    blocks, block_size = key_pool.shape[:2]
    outside = _used(key_pool, block_tables, prefix_lengths) & (
        (block_tables < 0) | (block_tables >= blocks)
    )
    too_long = (prefix_lengths < 0) | (prefix_lengths > block_tables.shape[1] * block_size)
    good = ~(outside.any() | too_long.any())
    if key_pool.device.type == "cpu":
        expect(bool(good), f"{name}: a prefix does not fit its block table, or a block the pool")
    else:
        torch._assert_async(good)


def _gathered(
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys and values of prefix and suffix, [B, Hkv, P + S, D] in the accumulation dtype."""
    dtype = accumulation_dtype(k)
    blocks = len(key_pool)
    block_tables = block_tables.where(_used(key_pool, block_tables, prefix_lengths), 0)
    slots = torch.arange(block_tables.shape[1] * key_pool.shape[1], device=key_pool.device)
    behind = (slots >= prefix_lengths[:, None])[:, None, :, None]

    def joined(pool: Tensor, own: Tensor) -> Tensor:
        # Where a pool has no blocks, no prefix has a token.
        taken = pool[block_tables] if blocks else pool.new_zeros(*block_tables.shape, *pool.shape[1:])
        # What lies behind a prefix may be NaN of another sequence, which a weight of 0 would let through.
        prefix = taken.flatten(1, 2).transpose(1, 2).masked_fill(behind, 0)
        return torch.cat([prefix.to(dtype), own.to(dtype)], dim=2)

    return joined(key_pool, k), joined(value_pool, v)


def _seen(prefix_lengths: Tensor, width: int, suffix: int, window: int | None) -> Tensor:
    """Mask [B, S, width + S]: the slots of the block table, then the suffix tokens, that a query sees."""
    lengths = prefix_lengths[:, None, None]
    slot = torch.arange(width, device=prefix_lengths.device)
    own = torch.arange(suffix, device=prefix_lengths.device)
    distance = own[:, None] - own  # [S, S], from key to query within the suffix
    prefix = (slot < lengths).expand(-1, suffix, -1)
    causal = distance >= 0
    if window is not None:
        prefix = prefix & (lengths + own[:, None] - slot < window)
        causal = causal & (distance < window)
    return torch.cat([prefix, causal.expand(len(prefix), -1, -1)], dim=2)


@prefix_attention.check
def check_prefix_attention(
    q: Tensor,
    k: Tensor,
    *_: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    _check("prefix_attention", q.shape[1], k.shape[1], window, scale, softcap)


@prefix_attention_backward.check
def check_prefix_attention_backward(
    cotangent: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    *_: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    _check("prefix_attention_backward", q.shape[1], k.shape[1], window, scale, softcap)


def _check(
    name: str, heads: int, kv_heads: int, window: int | None, scale: float, softcap: float | None
) -> None:
    # Messages are written on failure alone: attention of one token takes less time than to write them.
    if kv_heads == 0 or heads % kv_heads != 0:
        raise InputError(
            f"{name}: query heads must be a multiple of key-value heads, got {heads} and {kv_heads}"
        )
    if window is not None and window < 1:
        raise InputError(f"{name}: window must be at least 1, got {window}")
    if not math.isfinite(scale):
        raise InputError(f"{name}: scale must be finite, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InputError(f"{name}: softcap must be positive and finite, got {softcap}")


@prefix_attention.fake
def fake_prefix_attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> Attention:
    return Attention(
        _by_token(q.new_empty(q.shape)), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(k))
    )


@prefix_attention_backward.fake
def fake_prefix_attention_backward(
    cotangent: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *_: Any,
    **__: Any,
) -> SuffixGradient:
    return SuffixGradient(*(_by_token(tensor.new_empty(tensor.shape)) for tensor in (q, k, v)))


@prefix_attention.gradient("q", "k", "v", constant=("logsumexp",))
def prefix_attention_gradient(
    arguments: dict[str, Any], outputs: Attention, cotangents: list[Tensor]
) -> SuffixGradient:
    return prefix_attention_backward(cotangents[0], *outputs, **arguments)


def _cpu_refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **_: Any,
) -> str | None:
    if softcap is not None and not 2.0**-64 <= softcap <= 2.0**64:
        return f"softcap is {softcap} (the C++ kernels take 2⁻⁶⁴ to 2⁶⁴)"
    if q.shape[-1] > MOST_HEAD_DIM:
        return f"q has head dimension {q.shape[-1]} (the C++ kernels take at most {MOST_HEAD_DIM})"
    return (
        _float_refusal("q", q)
        or _float_refusal("k", k)
        or _float_refusal("v", v)
        or _float_refusal("key_pool", key_pool)
        or _float_refusal("value_pool", value_pool)
        or (None if sinks is None else _float_refusal("sinks", sinks))
        or unit_stride_refusal("block_tables", block_tables)
        or contiguous_refusal("prefix_lengths", prefix_lengths, "C++")
    )


def _float_refusal(name: str, tensor: Tensor) -> str | None:
    """Queries, keys, values, their pools and sinks: float32 on the CPU with unit stride along D."""
    return (
        device_refusal(name, tensor)
        or dtype_refusal(name, tensor, _FLOAT32, "C++")
        or unit_stride_refusal(name, tensor)
    )


@prefix_attention.backend("cpu", refuses=_cpu_refusal)
def prefix_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Attention:
    batch, heads, suffix, dim = q.shape
    output = torch.empty(batch, suffix, heads, dim, dtype=torch.float32, device="cpu").transpose(1, 2)
    logsumexp = torch.empty(batch, heads, suffix, dtype=torch.float32, device="cpu")
    extension().prefix_attention(
        num_threads=torch.get_num_threads(),
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        q=q,
        k=k,
        v=v,
        key_pool=key_pool,
        value_pool=value_pool,
        block_tables=block_tables,
        table_stride=block_tables.stride()[0],
        prefix_lengths=prefix_lengths,
        output=output,
        logsumexp=logsumexp,
    )
    return Attention(output, logsumexp)


def _cpu_backward_refusal(
    cotangent: Tensor, output: Tensor, logsumexp: Tensor, *inputs: Tensor, **options: Any
) -> str | None:
    return (
        _cpu_refusal(*inputs, **options)
        or device_refusal("cotangent", cotangent)
        or dtype_refusal("cotangent", cotangent, _FLOAT32, "C++")
    )


@prefix_attention_backward.backend("cpu", refuses=_cpu_backward_refusal)
def prefix_attention_backward_cpu(
    cotangent: Tensor, output: Tensor, logsumexp: Tensor, *inputs: Tensor, **options: Any
) -> SuffixGradient:
    # A sum's cotangent is one number, expanded; the kernel reads unit stride along D.
    cotangent = cotangent if cotangent.stride(-1) == 1 else cotangent.contiguous()
    return prefix_attention_backward_native(cotangent, *inputs, **options)


def prefix_attention_backward_native(
    cotangent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> SuffixGradient:
    """The gradients by the C++ kernel, which computes the softmax anew: scores in the backward's order of
    summation, beside a logsumexp of the forward's, would be off by what two orders differ by."""
    (batch, heads, suffix, dim), kv_heads = q.shape, k.shape[1]
    dq, dk, dv = (
        torch.empty(batch, suffix, count, dim, dtype=torch.float32, device="cpu").transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )
    extension().prefix_attention_backward(
        num_threads=torch.get_num_threads(),
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        q=q,
        k=k,
        v=v,
        key_pool=key_pool,
        value_pool=value_pool,
        block_tables=block_tables,
        table_stride=block_tables.stride()[0],
        prefix_lengths=prefix_lengths,
        cotangent=cotangent,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return SuffixGradient(dq, dk, dv)


def _triton_refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    prefix_lengths: Tensor,
    *,
    sinks: Tensor | None = None,
    **_: Any,
) -> str | None:
    if q.shape[-1] > _MOST_TRITON_HEAD_DIM:
        return (
            f"q has head dimension {q.shape[-1]} (the Triton kernels take at most {_MOST_TRITON_HEAD_DIM})"
        )
    if len(q) > _MOST_TRITON_SEQUENCES:
        return f"q has {len(q)} sequences (the Triton kernels take at most {_MOST_TRITON_SEQUENCES})"
    return triton_backend.refusal(
        q=q,
        k=k,
        v=v,
        key_pool=key_pool,
        value_pool=value_pool,
        block_tables=block_tables,
        prefix_lengths=prefix_lengths,
        sinks=sinks,
    ) or contiguous_refusal("prefix_lengths", prefix_lengths, "Triton")


@prefix_attention.backend("triton", refuses=_triton_refusal)
def prefix_attention_triton(q: Tensor, *inputs: Tensor, **options: Any) -> Attention:
    from nabla_fast.triton_kernels import prefix_attention as kernels

    if q.is_cpu:  # interpreted
        _, _, key_pool, _, block_tables, prefix_lengths = inputs
        step(_expect_blocks, "prefix_attention", key_pool, block_tables, prefix_lengths)
    output, logsumexp, status = kernels.prefix_attention(q, *inputs, **options)
    report("prefix_attention", status)
    return Attention(output, logsumexp)


def _triton_backward_refusal(
    cotangent: Tensor, output: Tensor, logsumexp: Tensor, *inputs: Tensor, **options: Any
) -> str | None:
    return triton_backend.refusal(
        cotangent=cotangent, output=output, logsumexp=logsumexp
    ) or _triton_refusal(*inputs, **options)


@prefix_attention_backward.backend("triton", refuses=_triton_backward_refusal)
def prefix_attention_backward_triton(
    cotangent: Tensor, output: Tensor, logsumexp: Tensor, q: Tensor, *inputs: Tensor, **options: Any
) -> SuffixGradient:
    from nabla_fast.triton_kernels import prefix_attention_backward as kernels

    if q.is_cpu:  # interpreted
        _, _, key_pool, _, block_tables, prefix_lengths = inputs
        step(_expect_blocks, "prefix_attention_backward", key_pool, block_tables, prefix_lengths)
    *gradients, status = kernels.prefix_attention_backward(
        cotangent, output, logsumexp, q, *inputs, **options
    )
    report("prefix_attention_backward", status)
    return SuffixGradient(*gradients)
