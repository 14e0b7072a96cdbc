"""What a launch executes: passes through its kernel's loops, and the numbers that a row shows of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tools.compile_check.costs import Costs, Pass, passes
from tools.compile_check.flow import stretches
from tools.compile_check.machine_code import READERS
from tools.compile_check.targets import Target
from tools.compile_check.work import Product, Work


@dataclass(frozen=True)
class Figures:
    """Numbers of one kernel in one launch.

    Attributes:
        instructions_per_element: executed by all threads together, a thread's predicated-off ones too,
            divided by the elements that the launch handles; None where nothing says how many.
        loop_instructions: of the main loop, a thread and pass; of the whole kernel if it has none.
        barriers: of all threads of a block in the main loop; in the whole kernel if it has none.
        tensor_instructions: there.
        asynchronous: whether products of one pass go on while the next begins: no loop waits for all of
            them. None where no loop has products of warp groups.
    """

    instructions_per_element: float | None
    loop_instructions: int
    barriers: int
    tensor_instructions: int
    asynchronous: bool | None

    def as_json(self) -> dict:
        count = self.instructions_per_element
        return asdict(self) | {"instructions_per_element": None if count is None else round(count, 2)}


def read(code: str, target: Target) -> Pass:
    """Passes and their costs from a kernel's machine code."""
    return passes(stretches(READERS[target.backend](code)))


def main_loop(kernel: Pass) -> Pass:
    """The innermost loop with the most products, else the loop of the most instructions, else all."""
    inner = kernel.everything()[1:]
    if not inner:
        return kernel
    products = [loop for loop in inner if loop.costs.tensor]
    if products:
        return max(products, key=lambda loop: loop.costs.tensor_flops or loop.costs.tensor)
    return max(inner, key=lambda loop: loop.costs.instructions)


def executed(kernel: Pass, work: Work, programs: int) -> list[tuple[Costs, float]]:
    """Every stretch of a kernel and how often a program goes through it.

    No compiler has unrolled a loop of products of ours so far; one that did would be counted too often.
    """
    times = {id(loop): work.passes for loop in kernel.everything()[1:]}
    times[id(kernel)] = 1.0
    for loop, product in _product_loops(kernel, work):
        times[id(loop)] = 0.0
        if product is not None:
            times[id(loop)] = product.flops / (programs * product.step)
    return [(loop.costs, times[id(loop)]) for loop in kernel.everything()]


def _product_loops(kernel: Pass, work: Work) -> list[tuple[Pass, Product | None]]:
    """Loops that multiply, and which of the work's products each takes: None for those that another
    stands for."""
    if not work.products:
        return []
    inner = kernel.everything()[1:]
    candidates = [loop for loop in inner if loop.costs.tensor]
    if not candidates:
        # Products in float32 are multiply-adds, many to a few other instructions.
        candidates = [loop for loop in inner if 4 * loop.costs.multiply_adds > loop.costs.instructions]
    if len(work.products) == 1 and candidates:
        hottest = max(candidates, key=lambda loop: loop.costs.tensor or loop.costs.multiply_adds)
        return [(loop, work.products[0] if loop is hottest else None) for loop in candidates]
    return list(zip(candidates, work.products, strict=False))


def figures(kernel: Pass, work: Work | None, programs: int, warps: int, target: Target) -> Figures:
    """Of one launch: ``programs`` of ``warps`` warps each."""
    main, count = main_loop(kernel).costs, None
    if work is not None:
        instructions = sum(c.instructions * times for c, times in executed(kernel, work, programs))
        count = instructions * programs * warps * target.warp_size / work.elements
    return Figures(
        count,
        main.instructions,
        main.barriers,
        main.tensor,
        asynchronous(kernel),
    )


def asynchronous(kernel: Pass) -> bool | None:
    """As of :class:`Figures`."""
    drained = [loop.costs.drained for loop in kernel.everything()[1:] if loop.costs.drained is not None]
    return not any(drained) if drained else None
