"""``python -m tools.gpu_run.calls``: a few calls of the ops, for a profiler or a checker to look at.

``profiled`` makes one call of each of four ops at real sizes between the start and the stop of the CUDA
profiler, after another that compiles. ``descents`` makes descents of few rows at small sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from nabla_fast.bench.kernel_cases import Case
from nabla_fast.bench.kernel_cases.descents import dto_descent, dto_descent_latents
from nabla_fast.bench.kernel_cases.mixes import embedding_mix
from nabla_fast.bench.kernel_cases.statistics import token_stats
from nabla_fast.ops import synchronize, use_backend


def profiled(device: torch.device) -> Iterator[Case]:
    n, v, bf16 = 512, 151_936, torch.bfloat16
    yield token_stats(n, v, bf16, device)
    yield embedding_mix(n, v, [3584, 2560], bf16, device, hard=False, backward=False)
    yield dto_descent(1, v, 3, device)
    yield dto_descent_latents(1, v, 3584, 2, bf16, device)


def descents(device: torch.device) -> Iterator[Case]:
    yield dto_descent(3, 5_001, 3, device)
    for rows in (2, 6):  # one pass over the head, and two
        for dtype in (torch.bfloat16, torch.float32):
            yield dto_descent_latents(rows, 3_001, 256, 2, dtype, device)


SETS = {"profiled": profiled, "descents": descents}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_run.calls")
    parser.add_argument("calls", choices=SETS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    for case in SETS[arguments.calls](device):
        print(f"{case.op} {case.shape} {case.dtype}", flush=True)
        versions = case.prepare()
        with use_backend(arguments.backend):
            versions.ours()
            versions.reset()
            if arguments.calls == "profiled" and device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                versions.ours()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
