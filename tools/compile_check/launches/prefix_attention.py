"""Launches of prefix_attention and its backward: a decode step, and the suffixes of a gradient pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.prefix_attention import prefix_attention
from nabla_fast.triton_kernels.prefix_attention_backward import prefix_attention_backward
from tools.compile_check.recording import Launch
from tools.compile_check.work import Product, Work

BATCH, PREFIX, SUFFIX, HEADS, KV_HEADS, BLOCK = 8, 4096, 512, 28, 4, 16


def arguments(dtype: torch.dtype, suffix: int, dim: int, batch: int = BATCH) -> dict[str, torch.Tensor]:
    """Tensors of the device ``meta``."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    pool = batch * PREFIX // BLOCK, BLOCK, KV_HEADS, dim
    return {
        "q": empty(batch, HEADS, suffix, dim),
        "k": empty(batch, KV_HEADS, suffix, dim),
        "v": empty(batch, KV_HEADS, suffix, dim),
        "key_pool": empty(*pool),
        "value_pool": empty(*pool),
        "block_tables": empty(batch, PREFIX // BLOCK, kind=torch.int64),
        "prefix_lengths": empty(batch, kind=torch.int64),
    }


def backward_arguments(read: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the forward, and what the backward takes beside them."""
    q = read["q"]
    logsumexp = q.new_empty(q.shape[:3], dtype=torch.float32)
    return {"cotangent": q, "output": torch.empty_like(q), "logsumexp": logsumexp} | read


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    plain = {"scale": 0.1, "window": None}
    for name, dim in (("backward", 128), ("backward of wide heads", 256)):
        read = arguments(dtype, SUFFIX, dim)
        given = backward_arguments(read)
        yield name, lambda given=given: prefix_attention_backward(**given, **plain)
    if dtype == torch.float16:  # attention itself is bfloat16's
        return
    for name, suffix, dim in (("decode", 1, 128), ("pass", SUFFIX, 128), ("wide heads", SUFFIX, 256)):
        given = arguments(dtype, suffix, dim)
        yield name, lambda given=given: prefix_attention(**given, **plain)
    given = arguments(dtype, SUFFIX, 128)
    options = {"window": 1024, "softcap": 50.0, "sinks": torch.empty(HEADS, dtype=dtype, device="meta")}
    yield "window, cap and sinks", lambda: prefix_attention(**given, scale=0.1, **options)


def _passes(launch: Launch) -> tuple[int, int]:
    """Positions of a prefix, all that its table holds, and tokens of the suffix that a row sees at most."""
    return launch["table_ptr"].shape[1] * launch["block_size"], launch["suffix"]


def _product(launch: Launch, count: int, positions: float) -> Product:
    """``count`` products [ROWS, COLUMNS, DIM] a tile, over as many positions in each program."""
    flops = 2 * count * launch["ROWS"] * launch["DIM"]
    return Product(flops * positions * launch.programs, flops * launch["COLUMNS"])


def _spans(launch: Launch) -> Work:
    prefix, suffix = _passes(launch)
    batch, heads = launch["q_ptr"].shape[:2]
    pools = [launch["key_ptr"], launch["value_ptr"]]
    product = _product(launch, 2, prefix / launch["spans"])
    parts = [launch["stats_ptr"], launch["mix_ptr"]]
    return Work(batch * heads * suffix * prefix, reads=pools, writes=parts, products=[product])


def _attention(launch: Launch) -> Work:
    prefix, suffix = _passes(launch)
    batch, heads = launch["q_ptr"].shape[:2]
    given = [launch[name] for name in ("q_ptr", "k_ptr", "v_ptr")]
    own = _product(launch, 2, suffix / 2)
    if launch["stats_ptr"] is not None:
        given += [launch["stats_ptr"], launch["mix_ptr"]]
        return Work(
            batch * heads * suffix * suffix,
            reads=given,
            writes=[launch["output_ptr"], launch["logsumexp_ptr"]],
            products=[own],
            passes=launch["spans"],
        )
    pools = [launch["key_ptr"], launch["value_ptr"]]
    loaded = launch.programs * prefix * 2 * launch["dim"] * pools[0].element_size()
    return Work(
        batch * heads * suffix * (prefix + suffix // 2),
        reads=[*given, *pools],
        writes=[launch["output_ptr"], launch["logsumexp_ptr"]],
        loaded=loaded,
        products=[_product(launch, 2, prefix), own],
        passes=launch["spans"],
    )


def _query_grad(launch: Launch) -> Work:
    prefix, suffix = _passes(launch)
    batch, heads = launch["q_ptr"].shape[:2]
    names = ("grad_ptr", "q_ptr", "k_ptr", "v_ptr", "output_ptr", "logsumexp_ptr", "key_ptr", "value_ptr")
    pools = launch["key_ptr"].element_size()
    return Work(
        batch * heads * suffix * (prefix + suffix // 2),
        reads=[launch[name] for name in names],
        writes=[launch["dq_ptr"], launch["delta_ptr"]],
        loaded=launch.programs * prefix * 2 * launch["dim"] * pools,
        products=[_product(launch, 3, prefix), _product(launch, 3, suffix / 2)],
    )


def _key_grad(launch: Launch) -> Work:
    suffix = launch["suffix"]
    batch, heads = launch["q_ptr"].shape[:2]
    names = ("grad_ptr", "q_ptr", "k_ptr", "v_ptr", "logsumexp_ptr", "delta_ptr")
    flops = 8 * launch["ROWS"] * launch["COLUMNS"] * launch["DIM"]
    passes = suffix * launch["GROUPS"] / launch["ROWS"] / 2
    return Work(
        batch * heads * suffix * (suffix // 2),
        reads=[launch[name] for name in names],
        writes=[launch["dk_ptr"], launch["dv_ptr"]],
        products=[Product(flops * passes * launch.programs, flops)],
    )


WORK = {
    "prefix_attention._span_kernel": _spans,
    "prefix_attention._attention_kernel": _attention,
    "prefix_attention_backward._query_grad_kernel": _query_grad,
    "prefix_attention_backward._key_grad_kernel": _key_grad,
}
