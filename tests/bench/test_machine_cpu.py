"""The loops that measure the machine do the work that they are timed for."""

from __future__ import annotations

import torch

from nabla_fast import _native
from nabla_fast.bench.machine import _fastest


def test_loops_do_the_work_they_are_timed_for(isa: str):
    native = _native.extension()
    n, threads = 100_003, 2
    x = torch.arange(n, dtype=torch.float32) % 7
    for length in (0, 1, 15, 16, 127, 128, 5_000, n):
        assert native.machine_read(x.data_ptr(), length, threads) == x[:length].double().sum().item()
    a, b = torch.full((n + 16,), -1.0), torch.ones(n)
    native.machine_triad(a.data_ptr(), b.data_ptr(), x.data_ptr(), 3.0, n, threads)
    assert torch.equal(a[:n], b + 3 * x)
    assert torch.equal(a[n:], torch.full((16,), -1.0))
    one = native.machine_multiply_adds(10, 1)
    assert native.machine_multiply_adds(20, 1) == 2 * one > 0
    assert native.machine_multiply_adds(10, threads) == threads * one
    dots = native.machine_dot_products(10, 1)
    assert dots == (2 * one if isa in ("avx512_bf16", "amx") else 0)
    tiles = native.machine_tile_products(10, 1)
    assert (tiles > 0) == (isa == "amx")
    assert native.machine_tile_products(20, threads) == 2 * threads * tiles


def test_arithmetic_takes_as_long_as_there_is_of_it(isa: str):
    # A loop that the compiler had removed would take no time.
    native = _native.extension()
    rounds = 200_000
    # More than a core does in vectors, and in tiles: 64 a cycle of 5 GHz, and 1024.
    for work, most in (
        (native.machine_multiply_adds, 1e12),
        (native.machine_dot_products, 2e12),
        (native.machine_tile_products, 1e13),
    ):
        if work(1, 1) == 0:
            continue
        operations = work(rounds, 1)
        seconds = _fastest(lambda work=work: work(rounds, 1))
        assert operations / seconds < most
