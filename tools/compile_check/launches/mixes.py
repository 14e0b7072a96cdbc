"""Launches of the mixes, the one-hot gradients and the logits, at the sizes of a 7B model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels import embedding_mix, linear_embedding_mix, onehot_grad
from nabla_fast.triton_kernels.common import vocabulary_product
from tools.compile_check.launches._products import chunk_of, vocabulary_tiles
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
    if dtype == torch.bfloat16:
        wide = [cotangent.float() for cotangent in cotangents]
        yield (
            "one-hot gradient, float32 states",
            lambda: onehot_grad.onehot_grad(wide, tables, hidden, head, 1e-3, []),
        )
        yield (
            "norms, float32 states",
            lambda: onehot_grad.onehot_grad_norm(wide, tables, hidden, head, 1e-3, []),
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


def _gradient(launch: Launch) -> list[torch.Tensor]:
    """What G of the slices is read from, but for what is split."""
    reads = (
        []
        if "product_ptr" not in launch.arguments
        else [chunk_of(launch, "product_ptr", launch["product_origin"])]
    )
    return reads + ([chunk_of(launch, "direct_ptr", 0)] if launch["DIRECT"] else [])


def _split(launch: Launch) -> list[torch.Tensor]:
    return [chunk_of(launch, name, 0) for name in ("high_ptr", "rest_ptr")] if launch["SPLIT"] else []


def _survey(launch: Launch) -> Work:
    logits = chunk_of(launch, "logits_ptr", launch["origin"])
    sums = launch["sums_ptr"], 24 * launch.programs
    return Work(logits.numel(), reads=[logits, *_gradient(launch)], writes=[sums, *_split(launch)])


def _joined(launch: Launch) -> Work:
    sums = launch["sums_ptr"]
    return Work(sums.numel(), reads=[sums], writes=[launch["joined_ptr"]])


def _jacobian(launch: Launch) -> Work:
    logits = chunk_of(launch, "logits_ptr", launch["origin"])
    reads = _split(launch) or _gradient(launch)
    return Work(logits.numel(), reads=[logits, *reads], writes=[chunk_of(launch, "result_ptr", 0)])


def _pull_weights(launch: Launch) -> Work:
    logits, product = launch["logits_ptr"], launch["product_ptr"]
    direct = [chunk_of(launch, "direct_ptr", 0)] if launch["DIRECT"] else []
    sums = [] if launch["FIRST"] else [launch["sums_ptr"]]
    return Work(logits.numel(), reads=[logits, product, *direct, *sums], writes=[*launch["weights"], *sums])


def _hidden_grad(launch: Launch) -> Work:
    grad = launch["grad_ptr"]
    return Work(grad.numel(), reads=[(launch["sums_ptr"], 4 * grad.numel())], writes=[grad])


def _onehot_grad(launch: Launch) -> Work:
    logits = launch["logits_ptr"]
    writes = [launch["squares_ptr"] if launch["NORM"] else logits]
    return vocabulary_tiles(launch, reads=[logits], writes=writes)


WORK = {
    "embedding_mix.survey_kernel": _survey,
    "embedding_mix._join_kernel": _joined,
    "embedding_mix.jacobian_kernel": _jacobian,
    "linear_embedding_mix._pull_weights_kernel": _pull_weights,
    "linear_embedding_mix._hidden_grad_kernel": _hidden_grad,
    "onehot_grad._onehot_grad_kernel": _onehot_grad,
}
