"""Launches of the mixes, the one-hot gradients and the logits, at the sizes of a 7B model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels import embedding_mix, linear_embedding_mix, onehot_grad
from nabla_fast.triton_kernels.common import vocabulary_product
from tools.compile_check.launches._products import vocabulary_tiles
from tools.compile_check.recording import Launch
from tools.compile_check.work import Work

_ROWS, _VOCABULARY, _WIDTHS = 512, 151_936, (3584, 2560)


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    tables = [empty(_VOCABULARY, width) for width in _WIDTHS]
    cotangents = [empty(_ROWS, width) for width in _WIDTHS]
    logits = empty(_ROWS, _VOCABULARY, dtype=torch.float32)
    hidden, head = empty(_ROWS, _WIDTHS[0], dtype=torch.float32), tables[0]
    key = empty(_ROWS, dtype=torch.int64)
    options = {"tau": 1.0, "noise": None}
    noisy = {"tau": 0.7, "noise": (key, key)}

    yield "soft mix", lambda: embedding_mix.embedding_mix(logits, tables, hard=False, **options)
    yield (
        "backward to logits",
        lambda: embedding_mix.embedding_mix_backward(cotangents, logits, tables, direct=logits, **options),
    )
    if dtype != torch.float32:
        narrow_logits = empty(_ROWS, _VOCABULARY)
        yield (
            "backward to half-precision logits",
            lambda: embedding_mix.embedding_mix_backward(
                cotangents, narrow_logits, tables, direct=None, **options
            ),
        )
    yield "logits", lambda: vocabulary_product.vocabulary_product(cotangents[:1], [head])
    yield (
        "backward to hidden states",
        lambda: linear_embedding_mix.linear_embedding_mix_backward(
            cotangents, hidden, head, tables, direct=None, **options
        ),
    )
    yield "one-hot gradient", lambda: onehot_grad.onehot_grad(cotangents, tables, hidden, head, 1e-3, [])
    yield "norms", lambda: onehot_grad.onehot_grad_norm(cotangents, tables, hidden, head, 1e-3, [])
    # The second table is another model's, of other rows.
    mapped = [tables[0], empty(_VOCABULARY // 2, _WIDTHS[1])]
    maps = [None, empty(_VOCABULARY, dtype=torch.int64)]
    yield (
        "one-hot gradient, mapped",
        lambda: onehot_grad.onehot_grad(cotangents, mapped, hidden, head, 1e-3, maps),
    )
    yield (
        "norms, mapped",
        lambda: onehot_grad.onehot_grad_norm(cotangents, mapped, hidden, head, 1e-3, maps),
    )
    if dtype != torch.bfloat16:
        return

    yield (
        "soft mix, noise",
        lambda: embedding_mix.embedding_mix(logits, tables, hard=False, **noisy),
    )
    yield (
        "backward to logits, noise",
        lambda: embedding_mix.embedding_mix_backward(cotangents, logits, tables, direct=None, **noisy),
    )
    # Rows that no vector load fits.
    odd = [empty(_VOCABULARY + 1, width - 1) for width in _WIDTHS]
    narrow = [empty(_ROWS, width - 1) for width in _WIDTHS]
    other = empty(_ROWS, _VOCABULARY + 1, dtype=torch.float32)
    yield "soft mix, odd", lambda: embedding_mix.embedding_mix(other, odd, hard=False, **options)
    yield (
        "backward to logits, odd",
        lambda: embedding_mix.embedding_mix_backward(narrow, other, odd, direct=None, **options),
    )


def _hard_grad(launch: Launch) -> Work:
    states, tables = launch["states"], launch["tables"]
    rows = len(states[0])
    gathered = [(table, rows * table.shape[1] * table.element_size()) for table in tables]
    elements = rows * sum(launch["widths"])
    # The tables' loops are two; a program goes through each.
    passes = max(-(-width // launch["DEPTH"]) for width in launch["widths"])
    return Work(elements, reads=[*states, *gathered], writes=[launch["grad_ptr"]], passes=passes)


def _centred(launch: Launch) -> list[torch.Tensor]:
    """What the two passes over the product read."""
    reads = [launch["product_ptr"], launch["logits_ptr"]]
    if launch["SPLIT"]:
        reads.append(launch["rest_ptr"])
    if launch["DIRECT"]:
        reads.append(launch["direct_ptr"])
    return reads


def _tilt(launch: Launch) -> Work:
    return Work(launch["logits_ptr"].numel(), reads=_centred(launch), writes=[launch["tilt_ptr"]])


def _jacobian(launch: Launch) -> Work:
    return Work(launch["logits_ptr"].numel(), reads=_centred(launch), writes=[launch["result_ptr"]])


def _onehot_grad(launch: Launch) -> Work:
    logits = launch["logits_ptr"]
    writes = [launch["squares_ptr"] if launch["NORM"] else logits]
    return vocabulary_tiles(launch, reads=[logits], writes=writes)


WORK = {
    "embedding_mix._hard_grad_kernel": _hard_grad,
    "embedding_mix._tilt_kernel": _tilt,
    "embedding_mix._jacobian_kernel": _jacobian,
    "onehot_grad._onehot_grad_kernel": _onehot_grad,
}
