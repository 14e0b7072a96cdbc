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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_fast.bench.measure import interleaved

_ROWS, _VOCABULARY, _WIDTHS = 512, 151_936, (3584, 2560)
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


def _mix_configs(programs: int, *choices: tuple[int, int, int, int, int]) -> list[dict[str, int]]:
    names = ("ROWS", "COLUMNS", "WIDTH", "num_warps", "num_stages")
    return [dict(zip(names, choice, strict=True)) | {"PROGRAMS": programs} for choice in choices]


# TOKENS, MANY_TOKENS, DEPTH, PARTS, WIDTH, programs a multiprocessor, FEW, warps, stages.
_HALF_DESCENTS = (
    (32, 64, 256, 8, 128, 1, 4, 8, 4),
    (32, 64, 256, 8, 64, 1, 4, 8, 3),
    (32, 64, 128, 4, 64, 1, 4, 4, 3),
    (32, 64, 256, 8, 128, 1, 1, 8, 4),
    (16, 64, 256, 8, 128, 2, 2, 8, 3),
)
_SINGLE_DESCENTS = ((16, 64, 128, 8, 64, 1, 4, 8, 2), (16, 64, 64, 4, 64, 1, 2, 4, 2))


def _descent_configs(multiprocessors: int, choices: Sequence[tuple[int, ...]]) -> list[dict[str, int]]:
    names = (
        "TOKENS",
        "MANY_TOKENS",
        "DEPTH",
        "PARTS",
        "WIDTH",
        "PROGRAMS",
        "FEW",
        "num_warps",
        "num_stages",
    )
    named = [dict(zip(names, choice, strict=True)) for choice in choices]
    return [{"ROWS": 16} | choice | {"PROGRAMS": choice["PROGRAMS"] * multiprocessors} for choice in named]


def tasks(device: torch.device) -> Iterator[Task]:
    """The tasks, their tensors made when each is reached."""
    from nabla_fast.triton_kernels import (
        dto_descent_latents,
        embedding_mix,
        scratch,
        vocabulary_product,
        weighted_rows,
    )

    programs = torch.cuda.get_device_properties(device).multi_processor_count

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def logits(state: torch.dtype, head: torch.dtype, rows: int) -> Callable[[], list[Tensor]]:
        hidden, table = normal(rows, _WIDTHS[0], dtype=state), normal(_VOCABULARY, _WIDTHS[0], dtype=head)
        return lambda: [vocabulary_product.vocabulary_product([hidden], [table])]

    def mixes(dtype: torch.dtype, rows: int) -> Callable[[], list[Tensor]]:
        z = normal(rows, _VOCABULARY, dtype=torch.float32)
        tables = [normal(_VOCABULARY, width, dtype=dtype) for width in _WIDTHS]
        return lambda: embedding_mix.embedding_mix(z, tables, tau=1.0, hard=False, noise=None)[0]

    def weighted(dtype: torch.dtype, rows: int) -> Callable[[], list[Tensor]]:
        weights = normal(rows, _VOCABULARY, dtype=torch.float32)
        table = normal(_VOCABULARY, _WIDTHS[0], dtype=dtype)

        def run() -> list[Tensor]:
            out = [torch.empty(rows, _WIDTHS[0], device=device)]
            weighted_rows.weighted_rows(weights, [table], out=out, scratch=scratch.share(4))
            return out

        return run

    def descents(dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        head = normal(_VOCABULARY, _WIDTHS[0], dtype=dtype)
        # Rates at which nothing moves: the moments are then sums of the gradient, and h has no say.
        schedule = torch.full((4,), 1e-12, dtype=torch.float64, device=device)
        problems = [
            (normal(rows, _WIDTHS[0], dtype=_SINGLE) / 20, normal(rows, _VOCABULARY, dtype=_SINGLE))
            for rows in (2, 16)
        ]

        def run() -> list[Tensor]:
            moments = []
            for h, grad in problems:
                first, second = torch.zeros_like(h), torch.zeros_like(h)
                step = torch.zeros(len(h), dtype=torch.int64, device=device)
                dto_descent_latents.dto_descent_latents(
                    h,
                    head,
                    grad,
                    first,
                    second,
                    step,
                    schedule,
                    until=None,
                    group=None,
                    tau=1.0,
                    noise=None,
                )
                moments.append(first)
            return moments

        return run

    yield Task("dto_descent_latents", "half", descents(_HALF), _descent_configs(programs, _HALF_DESCENTS))
    yield Task(
        "dto_descent_latents", "float32", descents(_SINGLE), _descent_configs(programs, _SINGLE_DESCENTS)
    )
    yield Task(
        "vocabulary_product",
        "half",
        logits(_HALF, _HALF, _ROWS),
        _product_configs(
            (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 256, 64, 4, 3)
        ),
    )
    yield Task(
        "vocabulary_product",
        "split",
        logits(_SINGLE, _HALF, _ROWS),
        _product_configs((64, 128, 64, 4, 2), (128, 128, 32, 8, 2), (128, 128, 64, 8, 2)),
    )
    yield Task(
        "vocabulary_product",
        "float32",
        logits(_SINGLE, _SINGLE, 64),
        _product_configs((64, 64, 16, 8, 2), (32, 64, 16, 4, 2), (64, 128, 16, 8, 2)),
    )
    yield Task(
        "weighted_rows",
        "half",
        mixes(_HALF, _ROWS),
        _mix_configs(
            programs, (128, 64, 128, 8, 2), (128, 64, 128, 8, 3), (128, 32, 256, 8, 4), (128, 32, 256, 8, 3)
        ),
    )
    yield Task(
        "weighted_rows",
        "split",
        weighted(_HALF, 128),
        _mix_configs(programs, (64, 64, 128, 4, 2), (128, 32, 128, 8, 2), (128, 64, 128, 8, 2)),
    )
    yield Task(
        "weighted_rows",
        "float32",
        weighted(_SINGLE, 64),
        _mix_configs(programs, (64, 16, 64, 8, 2), (32, 16, 64, 4, 2), (64, 16, 128, 8, 2)),
    )


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


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Make the fastest configurations this device's entry."""
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
    presets.PATH.write_text(json.dumps(entries, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--write", action="store_true", help="change presets.json")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each kernel")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tuning needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    rows = []
    for task in tasks(device):
        for row in measure(task, device, arguments.seconds):
            rows.append(row)
            outcome = f"{row['median_ms']:.3f} ms" if "median_ms" in row else row["problem"]
            print(f"{row['kernel']} {row['operands']} {row['config']}: {outcome}", file=sys.stderr)
    if arguments.write:
        write(name, rows)
    if arguments.json:
        print(json.dumps({"device": name, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
