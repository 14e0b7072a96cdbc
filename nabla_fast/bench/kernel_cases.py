"""What the kernel benchmark runs: inputs, the straightforward expression, the least work there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nabla_fast import ops


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op, shape, dtype: for the report.
        ours: the op, through whatever backend is forced.
        naive: the straightforward expression in plain PyTorch.
        in_float64: ``ours`` on the same inputs in float64, on the plain-PyTorch backend.
        bytes: least memory traffic.
        flops: least arithmetic of matrix products, 0 if there are none.
        eager: the same in plain PyTorch as one writes it to be fast, in place, if that differs from
            ``naive``.
    """

    op: str
    shape: str
    dtype: str
    ours: Callable[[], list[Tensor]]
    naive: Callable[[], list[Tensor]]
    in_float64: Callable[[], list[Tensor]]
    bytes: int
    flops: int
    eager: Callable[[], list[Tensor]] | None = None


def _normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def token_stats(n: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    logits = _normal(n, v, dtype=dtype, device=device, scale=3.0)

    def naive() -> list[Tensor]:
        logp = torch.log_softmax(logits.float(), dim=-1)
        p = logp.exp()
        return [torch.logsumexp(logits.float(), dim=-1), p.amax(dim=-1), -(p * logp).sum(dim=-1)]

    return Case(
        "token_stats",
        f"N={n} V={v}",
        str(dtype).removeprefix("torch."),
        lambda: list(ops.token_stats(logits)[:3]),
        naive,
        lambda: list(ops.token_stats(logits.double())[:3]),
        logits.numel() * logits.element_size(),
        0,
    )


def embedding_mix(
    n: int,
    v: int,
    h: int,
    h_r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    hard: bool,
    backward: bool,
) -> Case:
    z = _normal(n, v, dtype=dtype, device=device, scale=3.0)
    tables = [_normal(v, width, dtype=dtype, device=device) for width in (h, h_r)]
    cotangents = [_normal(n, width, dtype=dtype, device=device) for width in (h, h_r)]
    size = z.element_size()
    table_bytes = v * (h + h_r) * size

    def ours(z: Tensor, tables: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        z = z.detach().requires_grad_(backward)
        mixes = ops.embedding_mix(z, tables, hard=hard)
        return list(torch.autograd.grad(mixes, z, cotangents)) if backward else mixes

    def naive() -> list[Tensor]:
        leaf = z.detach().requires_grad_(backward)
        y = torch.softmax(leaf.float(), dim=-1)
        if hard:
            onehot = F.one_hot(leaf.argmax(dim=-1), v).to(y.dtype)
            y = onehot + y - y.detach()
        mixes = [y.to(table.dtype) @ table for table in tables]
        return list(torch.autograd.grad(mixes, leaf, cotangents)) if backward else mixes

    def in_float64() -> list[Tensor]:
        return ours(z.double(), [t.double() for t in tables], [c.double() for c in cotangents])

    name = (
        f"embedding_mix {'straight-through' if hard else 'soft'}{' forward+backward' if backward else ''}"
    )
    products = (not hard) + backward
    return Case(
        name,
        f"N={n} V={v} H={h} H_r={h_r}",
        str(dtype).removeprefix("torch."),
        lambda: ours(z, tables, cotangents),
        naive,
        in_float64,
        z.numel() * size * (3 if backward else 1) + table_bytes * products,
        2 * n * v * (h + h_r) * products,
    )


def dto_descent(n: int, v: int, steps: int, device: torch.device) -> Case:
    z = _normal(n, v, dtype=torch.float32, device=device, scale=3.0)
    grad = _normal(n, v, dtype=torch.float32, device=device)
    # The hard token leads by far: no row flips, so that every version takes every step.
    z.scatter_(1, z.argmax(dim=-1, keepdim=True), 30.0)
    schedule = ops.cosine_schedule(steps, 0.01, min_ratio=0.1).to(device)

    def ours(z: Tensor, grad: Tensor) -> list[Tensor]:
        z = z.clone()
        ops.dto_descent(z, grad, ops.AdamState.zeros(z), schedule)
        return [z]

    def naive() -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        optimizer = torch.optim.Adam([leaf], lr=0.01)
        for rate in schedule.tolist():
            optimizer.param_groups[0]["lr"] = rate
            p = torch.softmax(leaf.detach(), dim=-1)
            centred = grad - grad.gather(1, leaf.detach().argmax(dim=-1, keepdim=True))
            leaf.grad = p * (centred - (p * centred).sum(dim=-1, keepdim=True))
            optimizer.step()
        return [leaf.detach()]

    def eager() -> list[Tensor]:
        moved, first, second = z.clone(), torch.zeros_like(z), torch.zeros_like(z)
        token = moved.argmax(dim=-1, keepdim=True)
        centred, work = grad - grad.gather(1, token), torch.empty_like(z)
        for step, rate in enumerate(schedule.tolist(), start=1):
            p = torch.softmax(moved, dim=-1)
            mean = torch.mul(p, centred, out=work).sum(dim=-1, keepdim=True)
            g = torch.sub(centred, mean, out=work).mul_(p)
            first.lerp_(g, 0.1)
            second.mul_(0.999).addcmul_(g, g, value=0.001)
            torch.sqrt(second, out=work).mul_((1 - 0.999**step) ** -0.5).add_(1e-8)
            moved.addcdiv_(first, work, value=-rate / (1 - 0.9**step))
            if not torch.equal(moved.argmax(dim=-1, keepdim=True), token):
                break
        return [moved]

    return Case(
        "dto_descent",
        f"N={n} V={v} K={steps}",
        "float32",
        lambda: ours(z, grad),
        naive,
        lambda: ours(z.double(), grad.double()),
        12 * n * v,
        0,
        eager,
    )


def prefix_attention(
    batch: int,
    prefix: int,
    suffix: int,
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    backward: bool,
    device: torch.device,
) -> Case:
    block_size = 16
    tables = -(-prefix // block_size)
    pool = 2, batch * tables, block_size, kv_heads, dim
    key_pool, value_pool = _normal(*pool, dtype=torch.float32, device=device)
    block_tables = torch.randperm(batch * tables, device=device).view(batch, tables)
    lengths = torch.full((batch,), prefix, device=device)
    # As a model makes them: by token, all heads of a token side by side.
    states = _normal(batch, suffix, heads + 2 * kv_heads, dim, dtype=torch.float32, device=device)
    inputs = [part.transpose(1, 2) for part in states.split([heads, kv_heads, kv_heads], dim=2)]
    cotangent = _normal(batch, suffix, heads, dim, dtype=torch.float32, device=device).transpose(1, 2)
    options = {"scale": dim**-0.5, "window": None}

    def differentiated(
        attend: Callable[[list[Tensor], Tensor, Tensor], Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        leaves = [part.detach().to(dtype).requires_grad_(backward) for part in inputs]
        output = attend(leaves, key_pool.to(dtype), value_pool.to(dtype))
        gradients = torch.autograd.grad(output, leaves, cotangent.to(dtype)) if backward else ()
        return [output.detach(), *gradients]

    def ours(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return differentiated(
            lambda qkv, keys, values: ops.prefix_attention(
                *qkv, keys, values, block_tables, lengths, **options
            ),
            dtype,
        )

    def naive() -> list[Tensor]:
        # Blocks are gathered into one tensor, which torch's attention then reads.
        seen = torch.ones(suffix, prefix + suffix, dtype=torch.bool, device=device).tril(prefix)

        def joined(pool: Tensor, own: Tensor) -> Tensor:
            before = pool[block_tables].flatten(1, 2)[:, :prefix].transpose(1, 2)
            return torch.cat([before, own], dim=2)

        return differentiated(
            lambda qkv, keys, values: F.scaled_dot_product_attention(
                qkv[0], joined(keys, qkv[1]), joined(values, qkv[2]), seen, enable_gqa=True
            ),
            torch.float32,
        )

    product = 2 * batch * heads * suffix * dim  # multiplied by the keys that a query sees
    seen, own = prefix + (suffix + 1) // 2, (suffix + 1) // 2
    # Backward: scores, products with the values and dq over all keys, dk and dv over the suffix's own.
    flops = product * ((2 * seen) + (3 * seen + 2 * own if backward else 0))
    kv_bytes = 8 * batch * (prefix + suffix) * kv_heads * dim
    return Case(
        f"prefix_attention{' forward+backward' if backward else ''}",
        f"B={batch} P={prefix} S={suffix} H={heads}/{kv_heads} D={dim}",
        "float32",
        ours,
        naive,
        lambda: ours(torch.float64),
        (2 if backward else 1) * (kv_bytes + 8 * batch * suffix * heads * dim),
        flops,
    )


def cases(device: torch.device) -> list[Callable[[], Case]]:
    """Makers of the cases for a device: inputs exist only while their case runs."""
    v = 151_936
    if device.type == "cuda":
        n, h, h_r, dtypes = 512, 3584, 2560, (torch.bfloat16,)
    else:
        n, h, h_r, dtypes = 16, 896, 512, (torch.float32, torch.bfloat16)
    makers: list[Callable[[], Case]] = []
    for dtype in dtypes:
        makers.append(lambda dtype=dtype: token_stats(max(n, 64), v, dtype, device))
        for hard, backward in ((False, False), (True, True)):
            makers.append(
                lambda dtype=dtype, hard=hard, backward=backward: embedding_mix(
                    n, v, h, h_r, dtype, device, hard=hard, backward=backward
                )
            )
    makers += [lambda rows=rows: dto_descent(rows, v, 20, device) for rows in (1, max(n, 64))]
    # A step of a decode, a draft that is read at once, and a gradient of a trajectory.
    for batch, suffix, backward in ((1, 1, False), (16, 1, False), (4, 16, False), (1, 128, True)):
        makers.append(
            lambda batch=batch, suffix=suffix, backward=backward: prefix_attention(
                batch, 600, suffix, 14, 2, 64, backward=backward, device=device
            )
        )
    return makers
