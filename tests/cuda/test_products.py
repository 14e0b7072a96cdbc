"""Mixes whose products are a vendor's library's: by one that stands for it and holds us to its rules."""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch
from cuda_kernels import OK, Kernels
from ops.harness import check
from ops.inputs import BF16, F16, F32, Case, Draw
from ops.shared.mixes import backward_arguments, mix_arguments

from nabla_fast.ops import embedding_mix, linear_embedding_mix
from nabla_fast.ops.embedding_mix import embedding_mix_backward
from nabla_fast.ops.linear_embedding_mix import linear_embedding_mix_backward


@pytest.fixture(scope="session")
def kernels(built) -> Kernels:
    return Kernels(built("kernels-products.so"))


@pytest.fixture(scope="session")
def own(built) -> Kernels:
    return Kernels(built("kernels.so"))


@pytest.fixture
def library(built) -> ctypes.CDLL:
    built("kernels-products.so")
    library = ctypes.CDLL(str(built("libcublas_lt.so")))
    library.fake_products.restype = library.fake_heuristics.restype = ctypes.c_int64
    return library


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_mixes_by_the_library(dtype: torch.dtype, kernels: Kernels, library: ctypes.CDLL, draw: Draw):
    def mixed(arguments):
        mixes, status = kernels.embedding_mix(**arguments)
        assert (status == OK).all()
        return {f"result[{t}]": mix for t, mix in enumerate(mixes)}

    def make(draw: Draw):
        return mix_arguments(draw, 3, 4099, ((8, dtype), (70, dtype)), hard=False)

    before = library.fake_products()
    check(embedding_mix, Case("by the library", make), draw, "cpu", mixed)
    assert library.fake_products() >= before + 2


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_gradients_by_the_library(
    dtype: torch.dtype, kernels: Kernels, own: Kernels, library: ctypes.CDLL, draw: Draw
):
    z, tables = draw.logits(3, 300, dtype), draw.tables(300, [(8, dtype), (6, dtype)])
    cotangents = [draw.normal(3, table.shape[1], dtype=dtype) for table in tables]
    before = library.fake_products()
    grad, status = kernels.embedding_mix_backward(cotangents, z, tables, tau=0.7)
    assert (status == OK).all()
    assert library.fake_products() == before + 2
    expected, _ = own.embedding_mix_backward(cotangents, z, tables, tau=0.7)
    torch.testing.assert_close(grad, expected, rtol=2e-2 if dtype != F32 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_hidden_states_by_the_library(
    dtype: torch.dtype, rows: int, kernels: Kernels, own: Kernels, library: ctypes.CDLL, draw: Draw
):
    hidden, head = draw.normal(rows, 24, dtype=dtype), draw.normal(300, 24, dtype=dtype)
    tables, cotangent = draw.tables(300, [(8, dtype)]), draw.normal(rows, 8, dtype=dtype)
    before = library.fake_products()
    found = kernels.linear_embedding_mix(hidden, head, tables, hard=False)[0]
    assert library.fake_products() == before + 2
    expected = own.linear_embedding_mix(hidden, head, tables, hard=False)[0]
    torch.testing.assert_close(found, expected)
    grad, _ = kernels.linear_embedding_mix_backward([cotangent], hidden, head, tables)
    # Logits, G, and the head's rows.
    assert library.fake_products() == before + 2 + 3
    torch.testing.assert_close(
        grad, own.linear_embedding_mix_backward([cotangent], hidden, head, tables)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("hidden", [0, 5], ids=["logits", "hidden states"])
def test_a_row_of_a_whole_vocabulary(hidden: int, kernels: Kernels, draw: Draw):
    """By the library's stand-in, as ours make whole tiles of a single row: minutes on this host."""

    def mixed(arguments):
        mixes, _ = getattr(kernels, forward.name)(**arguments)
        return {f"result[{t}]": mix for t, mix in enumerate(mixes)}

    def graded(arguments):
        grad, _ = getattr(kernels, backward.name)(**arguments)
        return {"result": grad}

    forward = linear_embedding_mix if hidden else embedding_mix
    backward = linear_embedding_mix_backward if hidden else embedding_mix_backward
    sizes = {"rows": 1, "vocabulary": 151_936, "tables": ((3, F32),), "hidden": hidden}
    case = Case("soft", partial(mix_arguments, **sizes, hard=False))
    check(forward, case, draw, "cpu", mixed)
    case = Case("backward", partial(backward_arguments, **sizes, direct=True))
    check(backward, case, draw, "cpu", graded)


def test_what_the_library_does_not_take_is_ours(
    kernels: Kernels, own: Kernels, library: ctypes.CDLL, draw: Draw
):
    """An odd number of columns, and two dtypes."""
    z = draw.logits(2, 300)
    before = library.fake_products()
    odd = draw.tables(300, [(7, F32)])
    assert torch.equal(
        kernels.embedding_mix(z, odd, hard=False)[0][0], own.embedding_mix(z, odd, hard=False)[0][0]
    )
    table = draw.tables(300, [(8, BF16)])
    cotangent = draw.normal(2, 8)
    assert torch.equal(
        kernels.embedding_mix_backward([cotangent], z, table)[0],
        own.embedding_mix_backward([cotangent], z, table)[0],
    )
    assert library.fake_products() == before


def test_an_algorithm_is_asked_for_once(kernels: Kernels, library: ctypes.CDLL, draw: Draw):
    z, tables = draw.logits(2, 311), draw.tables(311, [(24, F32)])
    kernels.embedding_mix(z, tables, hard=False)
    asked, before = library.fake_heuristics(), library.fake_products()
    kernels.embedding_mix(z, tables, hard=False)
    assert library.fake_products() == before + 1
    # Memory may be aligned otherwise at another time.
    assert library.fake_heuristics() <= asked + 1
