"""python -m tools.half_precision: decodes of the bundled models in half precision, beside a float32 copy.

The batched loop's tokens are compared with its own on a float32 copy of the rounded weights, with those of
one prompt at a time, with the sequential loop's on that copy, and with the sequential loop's on the models'
own modules, which round between layers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

from nabla_fast.bench.decode_cases import Case, bundled_models, bundled_problems
from nabla_fast.bench.decode_runs import Run, decode
from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.reference.loop import SequentialLoop


def measure(dtype: torch.dtype, prompts: int, batch_size: int, config: DTOConfig) -> dict[str, Any]:
    """How many prompts are answered with the same tokens, by what the batched loop is compared with."""
    lm, rm = bundled_models(torch.device("cpu"), dtype)
    case = Case("", lm, rm, config, bundled_problems(lm, prompts), batch_size)
    copied = case.in_dtype(torch.float32)
    found = _batched(case)
    others = {
        "batched, float32 copy": _batched(copied),
        "batched, one prompt at a time": _batched(replace(case, batch_size=1)),
        "sequential, float32 copy": _sequential(copied),
        "sequential, modules": _sequential(case),
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": len(found.tokens),
        "generations": found.total("generations") / len(found.tokens),
        "tokens": sum(map(len, found.tokens.values())),
        "same": {
            name: sum(found.tokens[n] == tokens for n, tokens in run.tokens.items())
            for name, run in others.items()
        },
    }


def _batched(case: Case) -> Run:
    return decode(BatchedLoop(case.lm, case.rm, case.config, batch_size=case.batch_size), case.problems)


def _sequential(case: Case) -> Run:
    return decode(SequentialLoop(case.lm, case.rm, case.config), case.problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=DTOConfig().lr)
    arguments = parser.parse_args()
    config = DTOConfig(lr=arguments.lr)
    print(
        json.dumps(
            measure(getattr(torch, arguments.dtype), arguments.prompts, arguments.batch_size, config)
        )
    )


if __name__ == "__main__":
    main()
