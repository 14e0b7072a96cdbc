"""``python -m tools.compile_check.model.cuda``: predictions of the mixes of csrc/cuda, by nvcc's code.

The cases are those of the Triton kernels. ``--write`` keeps the counts and writes docs/gpu_predictions.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch

from tools.compile_check.model import document, hardware, predictions, timing
from tools.compile_check.model.cases import HIDDEN, ROWS, VOCABULARY, WIDTH, WIDTHS
from tools.compile_check.model.cuda_code import Kernel, kernels
from tools.compile_check.model.cuda_launches import LAUNCHES, WARPS, Launch, Mix
from tools.compile_check.model.l2_cache import L2Cache
from tools.compile_check.model.predictions import Prediction
from tools.compile_check.model.timing import Counts
from tools.compile_check.model.trace import together
from tools.compile_check.work import size

SOURCES = ("embedding_mix.cu", "embedding_mix_backward.cu", "linear_embedding_mix_backward.cu")
_GOALS = {"forward": 0.85, "backward": 0.75}
_FEW_ROWS = 0.70  # of memory's rate
# Loops of these are passed by few warps, over at most 37 slices, or where a row's maximum grows.
_RARE_LOOPS = ("weights_kernel", "pull_weights_kernel")


def make() -> list[Prediction]:
    """Compile the kernels, and count what the cases launch."""
    code = {name: kernel for source in SOURCES for name, kernel in kernels(source).items()}
    return [_prediction(how, mix, code) for mix in _mixes() for how in _ways(mix)]


def _mixes() -> Iterator[Mix]:
    for rows in ROWS:
        yield Mix(rows, VOCABULARY, WIDTHS)
        yield Mix(rows, VOCABULARY, WIDTHS, logits=torch.bfloat16)
        yield Mix(rows, VOCABULARY, WIDTHS, hidden=HIDDEN)


def _ways(mix: Mix) -> tuple[str, ...]:
    return ("backward",) if mix.logits == torch.bfloat16 else ("forward", "backward")


def _prediction(how: str, mix: Mix, code: dict[str, Kernel]) -> Prediction:
    of = {"forward": "soft, forward", "backward": "backward"}[how]
    logits = str(mix.logits).removeprefix("torch.")
    flops = 2.0 * mix.rows * mix.vocabulary * WIDTH
    moved = 2.0 * mix.vocabulary * WIDTH
    if mix.hidden:
        products = 1 if how == "forward" else 2
        flops += products * 2.0 * mix.rows * mix.vocabulary * mix.hidden
        moved += 2.0 * mix.vocabulary * mix.hidden
    else:
        moved += (1 if how == "forward" else 2) * mix.logits.itemsize * mix.rows * mix.vocabulary
    return Prediction(
        "cuda",
        "linear_embedding_mix" if mix.hidden else "embedding_mix",
        f"{of}, bfloat16" if mix.hidden else f"{of}, {logits} logits",
        mix.rows,
        flops,
        moved,
        _goal(how, mix),
        None,
        tuple(_counts(LAUNCHES[how](mix), code)),
    )


def _goal(how: str, mix: Mix) -> float | None:
    if mix.rows == 512:
        return _GOALS[how]
    return _FEW_ROWS if mix.rows <= 8 else None


def counted(launch: Launch, code: dict[str, Kernel], cache: L2Cache) -> Counts:
    """The counts of a launch that finds in the cache what those before it have left there."""
    memory = float(sum(cache.missed(tensor) for tensor in (*launch.reads, *launch.writes)))
    moved = float(size(*launch.reads, *launch.writes))
    if not launch.kernel:
        return Counts("cublasLtMatmul", 1, memory, moved, products=launch.flops)
    kernel = code[launch.kernel]
    name = launch.kernel.split("<")[0]
    rare = name in _RARE_LOOPS
    costs = [kernel.code] if rare else kernel.code.everything()
    return Counts(
        name,
        1,
        memory,
        moved,
        launch.programs,
        WARPS,
        timing.resident(kernel.registers, kernel.shared, WARPS, launch.programs),
        instructions=float(sum(one.costs.instructions for one in costs)),
        issue=float(sum(one.costs.slots for one in costs)),
        shared=32.0 * WARPS * sum(one.costs.shared for one in costs),
        barriers=float(sum(one.costs.barriers for one in costs)),
    )


def _counts(launches: Iterable[Launch], code: dict[str, Kernel]) -> list[Counts]:
    cache = L2Cache(hardware.L2_BYTES)
    return together([counted(launch, code, cache) for launch in launches])


def _nvcc() -> str:
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', printed)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_check.model.cuda", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--write", action="store_true", help="keep the counts, and write the page")
    arguments = parser.parse_args(argv)
    made = make()
    print(document.shares_table(made, []))
    if arguments.write:
        predictions.store(made, predictions.CUDA, _nvcc())
        document.PAGE.write_text(document.written())
    return 0


if __name__ == "__main__":
    sys.exit(main())
