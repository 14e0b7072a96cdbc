"""python -m tools.pass_speed: CPU time of a decoder's passes by dtype of the weights, on one thread.

Layers have the shape of Qwen2.5-0.5B's. A step reads one token of each sequence after 32; a pass reads a
suffix and takes its gradient, beside torch's float32 products of the same matrices by themselves. CPU time
is less disturbed by other programs than wall-clock time; dtypes take turns, and medians count.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from nabla_fast.bench.shape_speed import _SHAPE
from nabla_fast.models.reader import PagedReader

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure(shape: dict[str, Any], sequences: list[int], tokens: list[int], repeats: int) -> dict[str, Any]:
    """Milliseconds of steps, and GFLOP/s of passes and of products alone."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).eval().requires_grad_(False)
    weights = [p for p in model.model.layers.parameters() if p.dim() == 2]
    readers = {
        str(dtype).removeprefix("torch."): PagedReader(copy.deepcopy(model).to(dtype)) for dtype in DTYPES
    }
    memory = torch.ones(1 << 26)
    read = _median(memory.sum, repeats)
    result: dict[str, Any] = {
        "weights": sum(weight.numel() for weight in weights),
        "read_gb_s": 4e-9 * memory.numel() / read,
        "step_ms": {},
        "pass_gflop_s": {},
    }
    for count in sequences:
        runs = {name: _step(reader, count) for name, reader in readers.items()}
        result["step_ms"][count] = _in_turns(runs, repeats)
    for count in tokens:
        rows = [torch.randn(count, max(weight.shape)) for weight in weights]
        pairs = [(x, w) for x, w in zip(rows, weights, strict=True)]
        runs = {name: _gradient(reader, count) for name, reader in readers.items()}
        runs["torch's products, float32"] = lambda pairs=pairs: [
            (x[:, : w.shape[1]] @ w.T, x[:, : w.shape[0]] @ w) for x, w in pairs
        ]
        work = 4 * count * result["weights"]
        ms = _in_turns(runs, repeats)
        result["pass_gflop_s"][count] = {name: 1e-6 * work / value for name, value in ms.items()}
    return result


def _step(reader: PagedReader, count: int) -> Callable[[], object]:
    pool = reader.pool(64 * count)
    sequences = [pool.sequence() for _ in range(count)]
    reader.read(sequences, [32] * count, ids=torch.ones(count, 32, dtype=torch.int64), store=True)
    ids = torch.ones(count, 1, dtype=torch.int64)
    return lambda: reader.read(sequences, [1] * count, ids=ids, store=True)


def _gradient(reader: PagedReader, count: int) -> Callable[[], object]:
    width = reader.passes._table.shape[1]
    embeddings = torch.randn(1, count, width).to(reader.dtype).requires_grad_()

    def run() -> object:
        states = reader.read([reader.pool(1).sequence()], [count], embeddings=embeddings)
        return torch.autograd.grad(states, embeddings, torch.ones_like(states))

    return run


def _in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_median(run, 1))
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _median(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = _SHAPE | {"vocab_size": 1000}
    print(json.dumps(measure(shape, arguments.sequences, arguments.tokens, arguments.repeats)))


if __name__ == "__main__":
    main()
