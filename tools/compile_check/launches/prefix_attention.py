"""Launches of prefix_attention and its backward: a decode step, and the suffixes of a gradient pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.prefix_attention import prefix_attention
from nabla_fast.triton_kernels.prefix_attention_backward import prefix_attention_backward
from tools.compile_check.recording import Launch
from tools.compile_check.work import JOINED, Product, Work

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


def backward_arguments(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the forward, and what the backward takes beside them."""
    q = given["q"]
    logsumexp = q.new_empty(q.shape[:3], dtype=torch.float32)
    return {"cotangent": q, "output": torch.empty_like(q), "logsumexp": logsumexp} | given


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    plain = {"scale": 0.1, "window": None}
    for name, dim in (("backward", 128), ("backward of wide heads", 256)):
        given = backward_arguments(arguments(dtype, SUFFIX, dim))
        yield name, lambda given=given: prefix_attention_backward(**given, **plain)
    if dtype == torch.float16:  # attention itself is bfloat16's
        return
    for name, suffix, dim in (("decode", 1, 128), ("pass", SUFFIX, 128), ("wide heads", SUFFIX, 256)):
        given = arguments(dtype, suffix, dim)
        yield name, lambda given=given: prefix_attention(**given, **plain)
    given = arguments(dtype, SUFFIX, 128)
    options = {"window": 1024, "softcap": 50.0, "sinks": torch.empty(HEADS, dtype=dtype, device="meta")}
    yield "window, cap and sinks", lambda: prefix_attention(**given, scale=0.1, **options)


def _product(launch: Launch, count: int, positions: float) -> Product:
    """``count`` products [ROWS, COLUMNS, DIM] a tile, over as many positions in each program."""
    flops = 2 * count * launch["ROWS"] * launch["DIM"]
    return Product(flops * positions * launch.programs, flops * launch["COLUMNS"])


def _keys(launch: Launch) -> tuple[float, float]:
    """Positions of a prefix, all that its table holds, and tokens of the suffix, that a row sees."""
    prefix, suffix = float(launch["table_ptr"].shape[1] * launch["BLOCK"]), launch["suffix"]
    if launch["window"] is not None:
        prefix = min(prefix, max(0.0, launch["window"] - suffix / 2))
    return prefix, (suffix + 1) / 2


def _over_keys(launch: Launch, count: int) -> list[Product]:
    """Of a program's loops: where windows begin, without masks, the prefix's last positions, the suffix.

    The prefix ends with a tile. Of the suffix half a tile more is multiplied than is seen.
    """
    (prefix, suffix), tile = _keys(launch), launch["COLUMNS"]
    begin = []
    if launch["window"] is not None:
        begin = [min(prefix, tile + launch["ROWS"] / launch["GROUPS"])]
        prefix -= begin[0]
    return [_product(launch, count, positions) for positions in (*begin, prefix, 0.0, suffix + tile / 2)]


def _loaded(launch: Launch) -> float:
    """Bytes of keys and values, of those of the prefix what two neighbours load alike once."""
    (prefix, suffix), width = _keys(launch), launch["D"] * launch["q_ptr"].element_size()
    return launch.programs * 2 * width * (prefix / JOINED + suffix)


def _elements(launch: Launch) -> int:
    batch, heads, suffix = launch["q_ptr"].shape[:3]
    return round(batch * heads * suffix * sum(_keys(launch)))


def _spans(launch: Launch) -> Work:
    """Of sequences that have no blocks in common; without a window."""
    prefix, _suffix = _keys(launch)
    batch, heads, suffix = launch["q_ptr"].shape[:3]
    return Work(
        round(batch * heads * suffix * prefix),
        reads=[launch["key_ptr"], launch["value_ptr"]],
        writes=[launch["stats_ptr"], launch["mix_ptr"]],
        products=[_product(launch, 2, min(prefix, launch["LENGTH"])), _product(launch, 2, 0.0)],
    )


def _join(launch: Launch) -> Work:
    given = [launch[name] for name in ("q_ptr", "k_ptr", "v_ptr", "stats_ptr", "mix_ptr")]
    return Work(
        launch["mix_ptr"].numel(),
        reads=given,
        writes=[launch["output_ptr"], launch["logsumexp_ptr"]],
        products=[_product(launch, 2, max(launch["suffix"] / 2, launch["COLUMNS"]))],
        passes=launch["spans"],
    )


def _attention(launch: Launch) -> Work:
    names = ("q_ptr", "k_ptr", "v_ptr", "key_ptr", "value_ptr")
    return Work(
        _elements(launch),
        reads=[launch[name] for name in names],
        writes=[launch["output_ptr"], launch["logsumexp_ptr"]],
        loaded=_loaded(launch),
        products=_over_keys(launch, 2),
    )


def _query_grad(launch: Launch) -> Work:
    names = ("grad_ptr", "q_ptr", "k_ptr", "v_ptr", "output_ptr", "logsumexp_ptr", "key_ptr", "value_ptr")
    return Work(
        _elements(launch),
        reads=[launch[name] for name in names],
        writes=[launch["dq_ptr"], launch["delta_ptr"]],
        loaded=_loaded(launch),
        products=_over_keys(launch, 3),
    )


def _key_grad(launch: Launch) -> Work:
    """A program goes over the rows from its first token on."""
    batch, heads, suffix = launch["q_ptr"].shape[:3]
    names = ("grad_ptr", "q_ptr", "k_ptr", "v_ptr", "logsumexp_ptr", "delta_ptr")
    flops = 8 * launch["ROWS"] * launch["COLUMNS"] * launch["DIM"]
    passes = (suffix + launch["COLUMNS"]) / 2 * launch["GROUPS"] / launch["ROWS"]
    return Work(
        batch * heads * suffix * (suffix // 2),
        reads=[launch[name] for name in names],
        writes=[launch["dk_ptr"], launch["dv_ptr"]],
        loaded=launch.programs * passes * launch["ROWS"] * 2 * launch["D"] * launch["q_ptr"].element_size(),
        products=[Product(flops * passes * launch.programs, flops)],
    )


WORK = {
    "prefix_attention._attention_kernel": _attention,
    "prefix_attention_decode._span_kernel": _spans,
    "prefix_attention_decode._join_kernel": _join,
    "prefix_attention_backward._query_grad_kernel": _query_grad,
    "prefix_attention_backward._key_grad_kernel": _key_grad,
}
