"""Constants of the GPU that predictions are for: an NVIDIA H200."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


def _constant(value: float, unit: float, name: str, source: str) -> float:
    """A field of :class:`Hardware`: its value in SI units, and how a table shows it."""
    return field(default=value, metadata={"unit": unit, "name": name, "source": source})


@dataclass(frozen=True)
class Hardware:
    """What a time is computed with. Rates are a second and device, unless they say otherwise."""

    product_flops: float = _constant(
        790e12,
        1e12,
        "products, TFLOP/s",
        "bf16 with float32 sums by cuBLAS: 769 to 798 measured on an H200, 8192³, random data",
    )
    warp_product_flops: float = _constant(
        620e12,
        1e12,
        "products of single warps, TFLOP/s",
        "assumed: 63 % of 989, the datasheet's rate; only those of warp groups reach it (arXiv:2402.13499)",
    )
    bandwidth: float = _constant(
        4.3e12,
        1e12,
        "memory, TB/s",
        "a device-to-device copy measured on an H200, reads and writes counted",
    )
    l2_bandwidth: float = _constant(
        5.5e12, 1e12, "L2 cache, TB/s", "assumed: no measurement of it is at hand"
    )
    clock: float = _constant(
        1.755e9, 1e9, "clock, GHz", "assumed under load; 1.98 was read just after products on an H200"
    )
    launch_seconds: float = _constant(
        1.5e-6,
        1e-6,
        "a launch in a graph, µs",
        "assumed: from the end of one kernel to the first results of the next",
    )
    barrier_cycles: float = _constant(
        20.0, 1.0, "a barrier, cycles", "assumed: where no other block of the multiprocessor can run"
    )


MULTIPROCESSORS = 132  # read off an H200
SLOTS = 4  # warps that a multiprocessor issues for in a cycle
SHARED_BYTES = 128  # of shared memory a cycle and multiprocessor: 32 banks of 4
# What a multiprocessor holds, from the CUDA C++ Programming Guide, compute capability 9.0.
REGISTERS, WARPS, BLOCKS, SHARED, SHARED_RESERVED = 65_536, 64, 32, 233_472, 1024
# Of 60 MB that an H200 reports; assumed usable before what is used again has been displaced.
L2_BYTES = 45_000_000

H200 = Hardware()


def constants() -> list[tuple[str, float, float, str, str]]:
    """(field, value in SI units, unit, name, source) of every constant."""
    return [
        (f.name, f.default, f.metadata["unit"], f.metadata["name"], f.metadata["source"])
        for f in fields(Hardware)
    ]
