"""Cases of ``prefix_attention``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import nabla_fast.ops as ops
from nabla_fast.bench.kernel_cases.case import Case, Outputs, Versions, name_of, normal

_BLOCK_SIZE = 16  # tokens of a block of the pool


def prefix_attention(
    batch: int,
    prefix: int,
    suffix: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    backward: bool,
    device: torch.device,
) -> Case:
    """Suffixes [B, H, S, D] after paged prefixes of one length; with ``backward`` gradients as well."""

    def prepare() -> Versions:
        return _versions(batch, prefix, suffix, heads, kv_heads, dim, dtype, backward, device)

    product = 2 * batch * heads * suffix * dim  # multiplied by the keys that a query sees
    seen, own = prefix + (suffix + 1) // 2, (suffix + 1) // 2
    # Backward: scores, products with the values and dq over all keys, dk and dv over the suffix's own.
    flops = product * ((2 * seen) + (3 * seen + 2 * own if backward else 0))
    kv = 2 * batch * (prefix + suffix) * kv_heads * dim
    return Case(
        f"prefix_attention {'forward+backward' if backward else 'forward'}",
        f"B={batch} P={prefix} S={suffix} H={heads}/{kv_heads} D={dim}",
        name_of(dtype),
        (2 if backward else 1) * dtype.itemsize * (kv + 2 * batch * suffix * heads * dim),
        flops,
        prepare,
        0 if dtype == torch.float32 else 1,
    )


def _versions(
    batch: int,
    prefix: int,
    suffix: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    backward: bool,
    device: torch.device,
) -> Versions:
    tables = -(-prefix // _BLOCK_SIZE)
    pool = 2, batch * tables, _BLOCK_SIZE, kv_heads, dim
    key_pool, value_pool = normal(*pool, dtype=dtype, device=device)
    block_tables = torch.randperm(batch * tables, device=device).view(batch, tables)
    lengths = torch.full((batch,), prefix, device=device)
    # As a model makes them: by token, all heads of a token side by side.
    states = normal(batch, suffix, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    inputs = [part.transpose(1, 2) for part in states.split([heads, kv_heads, kv_heads], dim=2)]
    cotangent = normal(batch, suffix, heads, dim, dtype=dtype, device=device).transpose(1, 2)
    seen = torch.ones(suffix, prefix + suffix, dtype=torch.bool, device=device).tril(prefix)

    def attended(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, given: Tensor | None
    ) -> Outputs:
        """By the op; gradients, where there is a cotangent."""
        leaves = [part.detach().requires_grad_(given is not None) for part in (q, k, v)]
        output = ops.prefix_attention(
            *leaves, keys, values, block_tables, lengths, scale=dim**-0.5, window=None
        ).output
        return [output.detach(), *(torch.autograd.grad(output, leaves, given) if backward else ())]

    def ours() -> Outputs:
        return attended(*inputs, key_pool, value_pool, cotangent if backward else None)

    def in_float64() -> Outputs:
        given = (*inputs, key_pool, value_pool)
        return attended(*(each.double() for each in given), cotangent.double() if backward else None)

    def naive() -> Outputs:
        # Blocks are gathered into one tensor, which torch's attention then reads.
        def joined(pool: Tensor, own: Tensor) -> Tensor:
            before = pool[block_tables].flatten(1, 2)[:, :prefix].transpose(1, 2)
            return torch.cat([before, own], dim=2)

        leaves = [part.detach().requires_grad_(backward) for part in inputs]
        q, k, v = leaves
        output = F.scaled_dot_product_attention(
            q, joined(key_pool, k), joined(value_pool, v), seen, enable_gqa=True
        )
        return [output.detach(), *(torch.autograd.grad(output, leaves, cotangent) if backward else ())]

    # Room for the suffix after each prefix, so that one gather brings every prefix to its place.
    width = -(-(prefix + suffix) // _BLOCK_SIZE)
    padded_tables = F.pad(block_tables, (0, width - tables)).flatten()
    room = [torch.empty(batch * width, *pool[2:], dtype=dtype, device=device) for _ in range(2)]
    mask = None if suffix == 1 else seen

    def eager() -> Outputs:
        joined = []
        for part, paged, own in zip(room, (key_pool, value_pool), inputs[1:], strict=True):
            torch.index_select(paged, 0, padded_tables, out=part)
            whole = part.view(batch, width * _BLOCK_SIZE, kv_heads, dim)[:, : prefix + suffix]
            whole[:, prefix:].copy_(own.transpose(1, 2))
            joined.append(whole.transpose(1, 2).detach().requires_grad_(backward))
        q = inputs[0].detach().requires_grad_(backward)
        output = F.scaled_dot_product_attention(q, *joined, attn_mask=mask, enable_gqa=True)
        if not backward:
            return [output]
        # Leaves that hold prefix and suffix: no concatenation has to be taken apart again.
        dq, dk, dv = torch.autograd.grad(output, [q, *joined], cotangent)
        return [output.detach(), dq, dk[:, :, prefix:], dv[:, :, prefix:]]

    return Versions(ours, naive, eager, in_float64)
