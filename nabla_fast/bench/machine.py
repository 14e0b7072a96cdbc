"""The ceilings of this machine, measured: what times are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import nabla_fast._native as _native
from nabla_fast.bench.measure import interleaved

_READ_BYTES = 1 << 30  # far beyond any last-level cache
_READ_ONCE_BYTES = 1 << 27  # after the caches have been filled with something else
_SECONDS = 0.5  # a measure
_ROUNDS = 20_000  # of arithmetic in registers: some milliseconds
_SLOW_RATE = 5e9  # operations a second


@dataclass(frozen=True)
class Machine:
    """Bytes a second through memory and floating-point operations a second; None: not measured.

    Attributes:
        source: "loops" of the C++ extension on the CPU; "torch" on a GPU, or where there is no extension.
        why: one line that says why it is torch on a CPU.
        threads: that the CPU's figures are of.
        read: large reads and nothing else.
        triad: a = b + s·c, two reads and a write past the caches.
        copy: torch's copy, read and written bytes counted.
        multiply_add: float32 multiply-adds in registers.
        dot_product: bf16 dot products (VDPBF16PS) in registers, if the instruction set in force has them.
        tile_product: bf16 products of tiles (AMX's TDPBF16PS) in registers, likewise.
        float32_matmul, bfloat16_matmul: torch's product of large square matrices.
    """

    source: str
    threads: int
    why: str | None = None
    read: float | None = None
    triad: float | None = None
    copy: float | None = None
    multiply_add: float | None = None
    dot_product: float | None = None
    tile_product: float | None = None
    float32_matmul: float | None = None
    bfloat16_matmul: float | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes a second that nothing exceeds."""
        return getattr(self, self.fastest_transfer())

    def fastest_transfer(self) -> str:
        """The attribute that is the bandwidth."""
        return max(("read", "triad", "copy"), key=lambda name: getattr(self, name) or 0.0)

    def rate(self, bf16_terms: int) -> float:
        """Operations a second that products are held against; see ``Case.bf16_terms``."""
        name, parts = self.fastest_product(bf16_terms)
        return getattr(self, name) / parts

    def fastest_product(self, bf16_terms: int) -> tuple[str, int]:
        """The attribute that products are held against, and how many of its operations make one of theirs.

        Where both sides are bf16, what multiplies bf16 counts if the instruction set in force has it,
        though float32 may be faster: a CPU with tiles may take two cycles for the dot product that stands
        for one without. Torch's products stand beside the loops for where there are none, and for units
        that no loop uses.
        """
        parts = {"dot_product": bf16_terms, "tile_product": bf16_terms, "bfloat16_matmul": bf16_terms}
        if bf16_terms != 1 or not (self.dot_product or self.tile_product):
            parts = (parts if bf16_terms else {}) | {"multiply_add": 1, "float32_matmul": 1}
        rates = {name: (getattr(self, name) or 0.0) / count for name, count in parts.items()}
        name = max(rates, key=rates.__getitem__)
        return name, parts[name]

    def to_json(self) -> dict[str, Any]:
        """The attributes, rates as ``..._per_s``."""
        words = ("source", "why", "threads")
        return {key if key in words else f"{key}_per_s": value for key, value in asdict(self).items()}


def measure_machine(device: torch.device) -> Machine:
    """Measure ``device`` with as many threads as torch uses."""
    matmuls = {f"{name}_matmul": matmul_rate(getattr(torch, name), device) for name in _DTYPES}
    threads = torch.get_num_threads()
    if device.type == "cpu" and _native.available():
        return Machine("loops", threads, **_loops(threads), **matmuls)
    why = _native.why_missing() if device.type == "cpu" else None
    return Machine("torch", threads, why, copy=copy_bandwidth(device), **matmuls)


_DTYPES = "float32", "bfloat16"


def _loops(threads: int) -> dict[str, float | None]:
    native = _native.extension()
    n = _READ_BYTES // 4
    # Pages that were never written all lie in one place.
    memory = torch.ones(n)
    third = n // 3 // 16 * 16
    a, b, c = (memory[start : start + third].data_ptr() for start in range(0, 3 * third, third))
    read = _fastest(lambda: native.machine_read(memory.data_ptr(), n, threads))
    triad = _fastest(lambda: native.machine_triad(a, b, c, 0.5, third, threads))
    return {
        "read": 4 * n / read,
        "triad": 12 * third / triad,
        "multiply_add": _rate(native.machine_multiply_adds, threads),
        "dot_product": _rate(native.machine_dot_products, threads),
        "tile_product": _rate(native.machine_tile_products, threads),
    }


@dataclass(frozen=True)
class Loop:
    """What a figure of :class:`Machine` is measured with: ``run`` once moves or computes ``amount``."""

    run: Callable[[], object]
    amount: float


def loop_of(name: str, threads: int) -> Loop | None:
    """The loop behind an attribute of :class:`Machine`; None for those that are torch's."""
    native = _native.extension()
    if name == "read":
        memory = torch.ones(_READ_ONCE_BYTES // 4)
        return Loop(
            lambda: native.machine_read(memory.data_ptr(), memory.numel(), threads), _READ_ONCE_BYTES
        )
    function = {
        "multiply_add": native.machine_multiply_adds,
        "dot_product": native.machine_dot_products,
        "tile_product": native.machine_tile_products,
    }.get(name)
    if function is None:
        return None
    return Loop(lambda: function(_ROUNDS, threads), function(_ROUNDS, threads))


def _rate(loop: Callable[[int, int], float], threads: int) -> float | None:
    """Operations a second of a loop of arithmetic; None where the instruction set in force has none."""
    operations = loop(_ROUNDS, threads)
    return operations / _fastest(lambda: loop(_ROUNDS, threads)) if operations else None


def _fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of repeated runs: other programs only ever slow a machine down."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < end:
        function()
        best = min(best, time.perf_counter() - start)
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes counted."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=_SECONDS)["copy"]
    return 2 * size / (timing.median_ms / 1e3)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product in ``dtype``."""
    # Of a small one where a large one would take seconds: bf16 on a CPU without instructions for it.
    for size in (8192,) if device.type == "cuda" else (256, 1024):
        left, right = (torch.empty(size, size, device=device).normal_().to(dtype) for _ in range(2))
        timing = interleaved({"matmul": lambda a=left, b=right: a @ b}, device, seconds=_SECONDS)["matmul"]
        rate = 2 * size**3 / (timing.median_ms / 1e3)
        if rate < _SLOW_RATE:
            break
    return rate
