"""Golden numbers of descents, with the op's steps by one backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nabla_fast.decode.descent
import nabla_fast.models.heads
from nabla_fast.ops import Descent, dto_descent_latents, use_backend
from nabla_fast.ops.registry import Op


def golden_test() -> Any:
    """The module of tests of the descent's golden numbers."""
    directory = str(Path(__file__).parents[2] / "decode")
    if directory not in sys.path:
        sys.path.append(directory)
    import test_golden_descent

    return test_golden_descent


def check_golden_descent(
    op: Op, backend: str, n: int, models: dict, models_64: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case n, which is one of ``op``, with as many calls of the backend's kernel as it has gradients."""
    golden, calls = golden_test(), []
    assert golden.CASES[n]["param"] == ("latents" if op is dto_descent_latents else "logits")

    def by_backend(parameter: Tensor, *args: Any, **kwargs: Any) -> Descent:
        if parameter.dtype == torch.float64:
            return op(parameter, *args, **kwargs)
        calls.append(n)
        with use_backend(backend):
            return op(parameter, *args, **kwargs)

    caller = nabla_fast.models.heads if op is dto_descent_latents else nabla_fast.decode.descent
    monkeypatch.setattr(caller, op.name, by_backend)
    numbers = golden.load_file(golden.GOLDEN / "descent.safetensors")
    golden.test_descent(n, models, models_64, numbers)
    assert len(calls) == golden.CASES[n]["grad_steps"]
