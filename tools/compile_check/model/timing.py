"""From counts to seconds: the time of a launch, and of an op as the sum of its launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from tools.compile_check.model import hardware
from tools.compile_check.model.hardware import Hardware


@dataclass(frozen=True)
class Counts:
    """One kind of launch of an op, and how often it occurs.

    Attributes:
        name: the kernel, or torch's operator.
        launches: how often.
        memory: bytes from and to memory, those that the L2 cache holds left out.
        l2: bytes between the L2 cache and the multiprocessors.
        programs, warps: of a grid, and of a program.
        resident: blocks that a multiprocessor holds at a time, from registers, shared memory and grid.
        instructions: a warp, all loops counted as often as they run.
        issue: cycles of the issue slot, or of the slowest unit in each stretch, a warp.
        products: operations of products by warp groups (HGMMA), or by cuBLAS, a program; 1 program there.
        warp_products: of single warps (HMMA), a program.
        shared: bytes read from and written to shared memory, a program.
        barriers: a program.
        asynchronous: whether products go on while the next pass begins.
        elements: of the launch; 0 where nothing says what it handles.
    """

    name: str
    launches: int
    memory: float
    l2: float
    programs: int = 0
    warps: int = 0
    resident: int = 0
    instructions: float = 0.0
    issue: float = 0.0
    products: float = 0.0
    warp_products: float = 0.0
    shared: float = 0.0
    barriers: float = 0.0
    asynchronous: bool = False
    elements: int = 0

    def as_json(self) -> dict:
        """Its attributes, those left out that have their default."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {
            name: round(value, 3) if isinstance(value, float) else value for name, value in kept.items()
        }


@dataclass(frozen=True)
class Times:
    """Of one launch, in seconds: of each thing that it needs, and of the whole."""

    memory: float
    l2: float
    issue: float
    products: float
    shared: float
    barriers: float
    total: float

    @property
    def longest(self) -> str:
        """What takes most of it."""
        parts = asdict(self)
        del parts["total"]
        return max(parts, key=lambda name: parts[name])


def resident(registers: int, shared: int, warps: int, programs: int) -> int:
    """Blocks of a kernel that a multiprocessor holds at a time; at least 1."""
    by_registers = hardware.REGISTERS // (32 * warps * 8 * math.ceil(registers / 8))
    by_shared = hardware.SHARED // (shared + hardware.SHARED_RESERVED)
    by_grid = math.ceil(programs / hardware.MULTIPROCESSORS)
    return max(1, min(by_registers, by_shared, hardware.WARPS // warps, hardware.BLOCKS, by_grid))


def times(counts: Counts, constants: Hardware) -> Times:
    """Of one launch.

    The busiest multiprocessor has ⌈programs / 132⌉ of them. Where it holds several at a time, one waits
    while another works, and the launch takes as long as what takes longest. Where it holds one, what
    follows each other is added: instructions or shared memory, whichever takes longer, barriers, and
    products that are waited for. Memory comes before them, unless there are products: what these read is
    copied ahead.
    """
    own = math.ceil(counts.programs / hardware.MULTIPROCESSORS)
    memory, l2 = counts.memory / constants.bandwidth, counts.l2 / constants.l2_bandwidth
    if counts.programs == 0:  # of torch
        products = counts.products / constants.product_flops
        busy = max(memory, l2, products)
        return Times(memory, l2, 0.0, products, 0.0, 0.0, busy + constants.launch_seconds)
    warps = max(1.0, own * counts.warps / hardware.SLOTS)
    issue = warps * counts.issue / constants.clock
    products = own * hardware.MULTIPROCESSORS * (
        counts.products / constants.product_flops + counts.warp_products / constants.warp_product_flops
    )  # fmt: skip
    shared = own * counts.shared / (hardware.SHARED_BYTES * constants.clock)
    barriers = own * counts.barriers * constants.barrier_cycles / constants.clock
    if counts.resident > 1:
        barriers = 0.0
        busy = max(memory, l2, issue, products, shared)
    else:
        others = max(issue, shared) + barriers
        busy = max(others, products) if counts.asynchronous else others + products
        busy = max(busy, memory, l2) if counts.products or counts.warp_products else busy + max(memory, l2)
    return Times(memory, l2, issue, products, shared, barriers, busy + constants.launch_seconds)


def seconds(launches: Sequence[Counts], constants: Hardware) -> float:
    """Of an op: its launches one after the other, as in a graph."""
    return sum(counts.launches * times(counts, constants).total for counts in launches)


def limit(flops: float, bytes_moved: float, constants: Hardware) -> float:
    """The time that no version of an op is below: its products by cuBLAS, or its bytes through memory."""
    return max(flops / constants.product_flops, bytes_moved / constants.bandwidth)
