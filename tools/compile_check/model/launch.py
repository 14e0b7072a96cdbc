"""From a recorded launch to its counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.compile_check.costs import Pass
from tools.compile_check.figures import asynchronous, executed
from tools.compile_check.model import timing
from tools.compile_check.model.hardware import H200
from tools.compile_check.model.timing import Counts
from tools.compile_check.resources import Resources
from tools.compile_check.work import Work, size

if TYPE_CHECKING:
    from tools.compile_check.recording import Launch


def counted(launch: Launch, work: Work, kernel: Pass, used: Resources, memory: float) -> Counts:
    """The counts of one launch that moves ``memory`` bytes between memory and the L2 cache."""
    stretches = executed(kernel, work, launch.programs)

    def total(of) -> float:
        return float(sum(of(costs) * times for costs, times in stretches))

    loaded = size(*work.reads) if work.loaded is None else work.loaded
    return Counts(
        launch.function,
        1,
        memory,
        float(loaded + size(*work.writes)),
        launch.programs,
        launch.warps,
        timing.resident(used.registers, used.shared, launch.warps, launch.programs),
        instructions=total(lambda costs: costs.instructions),
        issue=total(lambda costs: costs.slots),
        products=launch.warps * total(lambda costs: (costs.tensor_flops or 0.0) - costs.warp_flops),
        warp_products=launch.warps * total(lambda costs: costs.warp_flops),
        shared=32 * launch.warps * total(lambda costs: costs.shared),
        barriers=total(lambda costs: costs.barriers),
        asynchronous=bool(asynchronous(kernel)),
        elements=work.elements,
    )


def predicted_share(launch: Launch, work: Work, kernel: Pass, used: Resources) -> float:
    """Of the time that what the launch itself multiplies or moves needs, its inputs in no cache.

    Padding and the terms of a split operand count as products: an op's share, which is smaller, is on the
    page of predictions. The time of launching is left out.
    """
    moved = float(size(*work.reads) + size(*work.writes))
    counts = counted(launch, work, kernel, used, moved)
    flops = sum(product.flops for product in work.products)
    took = timing.times(counts, H200).total - H200.launch_seconds
    return timing.limit(flops, moved, H200) / took
