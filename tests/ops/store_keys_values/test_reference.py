"""Keys and values in the slots of a pool, and nothing anywhere else."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.errors import InputError
from nabla_fast.ops import backend_status, prefix_attention, store_keys_values, use_backend

from ..contract import BackendContract, LibraryContract
from ..inputs import F64, Draw
from .cases import LAYOUTS, STORE_KEYS_VALUES, pools, store_arguments

BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(bool(backend_status()["triton"]), reason="no Triton")),
]


class TestContract(BackendContract):
    tested, backend = STORE_KEYS_VALUES, "torch"


class TestLibrary(LibraryContract):
    tested = STORE_KEYS_VALUES


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_in_its_slot_and_all_else_as_it_was(backend: str, layout: str, draw: Draw):
    given = store_arguments(draw, batch=3, suffix=4, layout=layout)
    expected = {name: given[name].clone() for name in ("key_pool", "value_pool")}
    for b, row in enumerate(given["slots"].tolist()):
        for s, slot in enumerate(row):
            if slot >= 0:
                expected["key_pool"][slot // 4, slot % 4] = given["k"][b, :, s]
                expected["value_pool"][slot // 4, slot % 4] = given["v"][b, :, s]
    with use_backend(backend):
        stored = store_keys_values(**given)
    assert torch.equal(stored, given["slots"] >= 0)
    for name, pool in expected.items():
        assert torch.equal(given[name], pool), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "cpu", BACKENDS[1]])
def test_attention_reads_pools_of_every_layout(backend: str, layout: str, draw: Draw):
    """Stored in another engine's pool and read from there: as of two plain tensors, to the bit."""
    if backend == "cpu" and backend_status()["cpu"]:
        pytest.skip(backend_status()["cpu"])
    blocks, block_size, heads, dim, length = 6, 4, 2, 8, 10
    table = draw.uniform(blocks).argsort()[:3].view(1, 3)
    at = torch.arange(length)
    slots = (table[0, at // block_size] * block_size + at % block_size).view(1, length)
    k, v = draw.normal(2, 1, heads, length, dim).unbind()
    q, own_k, own_v = draw.normal(1, 4, 2, dim), *draw.normal(2, 1, heads, 2, dim).unbind()
    found = []
    for kind in ("two tensors", layout):
        key_pool, value_pool = pools(draw, kind, (blocks, block_size, heads, dim), torch.float32)
        with use_backend("torch"):
            store_keys_values(k, v, key_pool, value_pool, slots)
        arguments = (q, own_k, own_v, key_pool, value_pool, table, torch.tensor([length]))
        with use_backend(backend):
            found.append(prefix_attention(*arguments, scale=0.3).output)
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot", [-2, 28, 2**40])
def test_a_slot_outside_the_pool_is_refused(backend: str, slot: int, draw: Draw):
    given = store_arguments(draw, batch=2, suffix=2, missing=0.0)
    given["slots"][1, 0] = slot
    with use_backend(backend), pytest.raises(InputError, match="slots must be −1, or from 0 to 27"):
        store_keys_values(**given)


def test_pools_that_overlap_are_refused(draw: Draw):
    given = store_arguments(draw, batch=2, suffix=2)
    given["value_pool"] = given["key_pool"]
    with pytest.raises(InputError, match=r"store_keys_values: .*value_pool"):
        store_keys_values(**given)


def test_a_pool_without_blocks_takes_nothing():
    pool = torch.empty(0, 4, 2, 8, dtype=F64)
    k, v = torch.ones(2, 1, 2, 3, 8, dtype=F64).unbind()
    stored = store_keys_values(k, v, pool, pool.clone(), torch.full((1, 3), -1))
    assert not stored.any()
