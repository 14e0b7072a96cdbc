"""What the page on CUDA kernels counts is what the mixes launch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cuda_kernels import Kernels
from ops.inputs import BF16, F16, F32, Draw
from ops.shared.mixes import backward_arguments, mix_arguments

from tools.compile_check.model.cuda_launches import Launch, Mix, backward, forward

SMALL = {"chunk_bytes": 32768, "most_rows": 2}  # as host.mk builds kernels-small.so
ROWS, VOCABULARY, WIDTHS = 3, 2 * 4096 + 77, (12, 8)


def seen(kernels: Kernels, call: partial) -> list[tuple[str, int]]:
    """Products are ("", 0), whatever kernel makes them."""
    launches = kernels.launches(call)
    return [("", 0) if name.endswith("product_kernel") else (name, blocks) for name, blocks in launches]


def counted(launch: Launch) -> tuple[str, int]:
    return launch.kernel.split("<")[0], launch.programs


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize(("dtype", "logits"), [(BF16, F32), (BF16, BF16), (F16, F16), (F32, F32)])
def test_launches_of_the_mixes(
    dtype: torch.dtype, logits: torch.dtype, hidden: int, kernels: Kernels, draw: Draw
):
    constants = SMALL if "small" in kernels.path.name else {}
    mix = Mix(ROWS, VOCABULARY, WIDTHS, dtype, logits, hidden, **constants)
    sizes = {"rows": ROWS, "vocabulary": VOCABULARY, "tables": tuple((width, dtype) for width in WIDTHS)}
    sizes |= {"hidden": hidden, "dtype": dtype} if hidden else {"dtype": logits}
    arguments = mix_arguments(draw, **sizes, hard=False)
    name = "linear_embedding_mix" if hidden else "embedding_mix"
    call = partial(getattr(kernels, name), **arguments)
    assert seen(kernels, call) == list(map(counted, forward(mix)))
    call = partial(getattr(kernels, f"{name}_backward"), **backward_arguments(draw, **sizes))
    assert seen(kernels, call) == list(map(counted, backward(mix)))
