"""``python -m tools.tune``: time a few configurations of each Triton kernel on this GPU.

With ``--write`` the fastest ones become the entry of this device in
``triton_kernels/common/presets.json``, which says when and with what they were measured. A
configuration whose result is off, or that does not launch, is reported and left out. Kernels whose
rows are promised to be the same in any batch stay so:
one configuration serves all numbers of rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nabla_fast.ops as ops
from nabla_fast._triton import interpreted
from nabla_fast.bench.measure import interleaved
from nabla_fast.cli.output import append_line

_HALF, _SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Task:
    """One entry of the presets: what runs it, and what may be written there."""

    kernel: str
    operands: str
    run: Callable[[], list[Tensor]]
    candidates: list[dict[str, int]]


def _product_configs(*choices: tuple[int, int, int, int, int]) -> list[dict[str, int]]:
    names = ("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages")
    return [dict(zip(names, choice, strict=True)) for choice in choices]


_DESCENT = (
    "TOKENS",
    "MANY_TOKENS",
    "DEPTH",
    "PARTS",
    "WIDTH",
    "PROGRAMS",  # a multiprocessor
    "FEW",
    "FEW_WIDTH",
    "HOLD",
    "num_warps",
    "num_stages",
)
# A warp takes a part, so there are as many of one as of the other. FEW 0 reads the head twice for all rows.
_HALF_DESCENTS = (
    (32, 64, 256, 8, 128, 1, 4, 4096, 2, 8, 2),
    (32, 64, 256, 8, 128, 1, 4, 4096, 0, 8, 2),
    (32, 64, 256, 8, 64, 1, 4, 4096, 2, 8, 2),
    (16, 64, 256, 8, 128, 1, 4, 4096, 2, 8, 2),
    (32, 64, 256, 8, 128, 1, 0, 4096, 0, 8, 4),
    (32, 64, 128, 4, 64, 1, 0, 4096, 0, 4, 3),
    (16, 32, 256, 8, 128, 1, 4, 2560, 0, 8, 2),
)
_SINGLE_DESCENTS = (
    (16, 64, 128, 8, 64, 1, 4, 4096, 0, 8, 2),
    (16, 64, 128, 8, 64, 1, 0, 4096, 0, 8, 2),
    (16, 64, 64, 4, 64, 1, 0, 4096, 0, 4, 2),
    (16, 64, 128, 8, 64, 1, 4, 1024, 0, 8, 2),
    (16, 64, 256, 8, 64, 1, 0, 4096, 0, 8, 2),
)


def _descent_configs(multiprocessors: int, choices: Sequence[tuple[int, ...]]) -> list[dict[str, int]]:
    named = [dict(zip(_DESCENT, choice, strict=True)) for choice in choices]
    return [{"ROWS": 16} | choice | {"PROGRAMS": choice["PROGRAMS"] * multiprocessors} for choice in named]


@dataclass(frozen=True)
class Sizes:
    """Rows N, vocabulary V, and widths of the tables, the first of which hidden states have too."""

    rows: int = 512
    vocabulary: int = 151_936
    widths: tuple[int, int] = (3584, 2560)

    def fewer(self, rows: int) -> Sizes:
        return replace(self, rows=min(rows, self.rows))


QUICK = Sizes(4, 70, (32, 16))


def tasks(device: torch.device, sizes: Sizes) -> Iterator[Task]:
    """The tasks for kernels that have presets, their tensors made when each is reached."""
    from nabla_fast.triton_kernels.common import presets

    defaults = json.loads(presets.PATH.read_text())["default"]["kernels"]
    for (kernel, operands), (make, candidates) in _tasks(device, sizes).items():
        known = defaults.get(kernel, {}).get(operands)
        fitting = [candidate for candidate in candidates if known and candidate.keys() == known.keys()]
        if fitting:
            yield Task(kernel, operands, make(), fitting)


def _tasks(device: torch.device, sizes: Sizes) -> dict[tuple[str, str], tuple[Callable, list]]:
    """By kernel and operands: what makes the function to time, and the configurations."""
    programs = 1
    if device.type == "cuda":
        programs = torch.cuda.get_device_properties(device).multi_processor_count

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def logits(state: torch.dtype, head: torch.dtype, of: Sizes) -> Callable[[], list[Tensor]]:
        width = of.widths[0]
        hidden, table = normal(of.rows, width, dtype=state), normal(of.vocabulary, width, dtype=head)
        return lambda: [ops.lm_logits(hidden, table)]

    def descents(dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        width, vocabulary = sizes.widths[0], sizes.vocabulary
        head = normal(vocabulary, width, dtype=dtype)
        # Rates at which nothing moves: the moments are then sums of the gradient, and h has no say.
        schedule = torch.full((4,), 1e-12, dtype=torch.float64, device=device)
        problems = [
            (normal(rows, width, dtype=_SINGLE) / 20, normal(rows, vocabulary, dtype=_SINGLE))
            for rows in (2, max(5, min(16, sizes.rows)))  # one pass over the head, and two
        ]

        def run() -> list[Tensor]:
            moments = []
            for h, grad in problems:
                state = ops.AdamState.zeros(h)
                ops.dto_descent_latents(h, head, grad, state, schedule)
                moments.append(state.exp_avg)
            return moments

        return run

    product = "vocabulary_product"
    return {
        ("dto_descent_latents", "half"): (
            lambda: descents(_HALF),
            _descent_configs(programs, _HALF_DESCENTS),
        ),
        ("dto_descent_latents", "float32"): (
            lambda: descents(_SINGLE),
            _descent_configs(programs, _SINGLE_DESCENTS),
        ),
        (product, "half"): (
            lambda: logits(_HALF, _HALF, sizes),
            _product_configs(
                (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 256, 64, 4, 3)
            ),
        ),
        (product, "split"): (
            lambda: logits(_SINGLE, _HALF, sizes),
            _product_configs(
                (64, 128, 64, 4, 2), (64, 128, 64, 8, 2), (64, 256, 64, 8, 3), (128, 128, 64, 8, 3)
            ),
        ),
        (product, "float32"): (
            lambda: logits(_SINGLE, _SINGLE, sizes.fewer(64)),
            _product_configs((64, 64, 16, 8, 2), (32, 64, 16, 4, 2), (64, 128, 16, 8, 2)),
        ),
    }


def measure(task: Task, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """One row a candidate: its configuration with ``median_ms``, or with ``problem``."""
    from nabla_fast.triton_kernels.common import presets

    wanted = task.run()
    functions, rows = {}, []
    for number, candidate in enumerate(task.candidates):

        def run(candidate: dict[str, int] = candidate) -> list[Tensor]:
            with presets.forced(task.kernel, task.operands, candidate):
                return task.run()

        row: dict[str, Any] = {"kernel": task.kernel, "operands": task.operands, "config": candidate}
        rows.append(row)
        try:
            error = max(_difference(a, b) for a, b in zip(run(), wanted, strict=True))
        except Exception as failure:  # too much shared memory, say
            row["problem"] = " ".join(str(failure).split())[:200]
            continue
        # The order of a sum may differ, no more.
        if error > 2 * torch.finfo(wanted[0].dtype).eps + 1e-5:
            row["problem"] = f"differs by {error:.1e} of a row's largest value"
        else:
            functions[number] = run
    for number, timing in interleaved(functions, device, seconds=seconds).items() if functions else ():
        rows[number]["median_ms"] = timing.median_ms
    return rows


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the row's largest value."""
    difference = (a.double() - b.double()).abs().amax(dim=1) / b.double().abs().amax(dim=1)
    return float(difference.nan_to_num(nan=torch.inf).max())


def write(name: str, rows: list[dict[str, Any]], path: Path | None = None) -> None:
    """Make the fastest configurations this device's entry, in presets.json or in a copy at ``path``."""
    import triton

    from nabla_fast.triton_kernels.common import presets

    entries = json.loads(presets.PATH.read_text())
    entry = entries.setdefault(name, {"kernels": {}})
    entry["measured"] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    timed = [row for row in rows if "median_ms" in row]
    for row in sorted(timed, key=lambda row: row["median_ms"], reverse=True):
        entry["kernels"].setdefault(row["kernel"], {})[row["operands"]] = row["config"]
    (path or presets.PATH).write_text(json.dumps(entries, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--write", action="store_true", help="change presets.json")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a changed copy there")
    parser.add_argument("--rows", metavar="FILE", help="append each row to this file when it is done")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each kernel")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, also in Triton's interpreter: does it work?"
    )
    arguments = parser.parse_args(argv)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
    elif arguments.quick and interpreted() and not arguments.write:
        device, name = torch.device("cpu"), "interpreter"
    else:
        print("tuning needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    rows = []
    with ops.use_backend("triton"):
        for task in tasks(device, QUICK if arguments.quick else Sizes()):
            if arguments.quick:
                task = replace(task, candidates=task.candidates[:1])
            for row in measure(task, device, arguments.seconds):
                rows.append(row)
                if arguments.rows:
                    append_line(arguments.rows, row)
                outcome = f"{row['median_ms']:.3f} ms" if "median_ms" in row else row["problem"]
                said = f"{row['kernel']} {row['operands']} {row['config']}: {outcome}"
                print(said, file=sys.stderr, flush=True)
            if arguments.output:
                write(name, rows, arguments.output)  # what there is, if the rest is cut off
    if arguments.write:
        write(name, rows)
    if arguments.json:
        print(json.dumps({"device": name, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
