"""Launches of store_keys_values: the new tokens of a decode step, and those of a pass over suffixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.store_keys_values import store_keys_values
from tools.compile_check.launches.prefix_attention import BATCH, arguments
from tools.compile_check.recording import Launch
from tools.compile_check.work import Work


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    for name, suffix in (("decode", 1), ("pass", 512)):
        given = {
            key: value
            for key, value in arguments(dtype, suffix, 128).items()
            if key in ("k", "v", "key_pool", "value_pool")
        }
        slots = torch.empty(BATCH, suffix, dtype=torch.int64, device="meta")
        yield name, lambda given=given, slots=slots: store_keys_values(**given, slots=slots)


def _store(launch: Launch) -> Work:
    k, v, slots = (launch[name] for name in ("k_ptr", "v_ptr", "slot_ptr"))
    written = k.numel() * launch["key_ptr"].element_size()
    return Work(
        elements=2 * k.numel(),
        reads=[k, v, slots],
        writes=[
            (launch["key_ptr"], written),
            (launch["value_ptr"], written),
            launch["stored_ptr"],
            launch["status_ptr"],
        ],
    )


WORK = {"store_keys_values._store_kernel": _store}
