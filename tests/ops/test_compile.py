"""Every op as a torch.library op: opcheck, and torch.compile to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.ops.registry import Op, all_ops

from .cases import CASES, Draw
from .harness import flatten, library_op, map_tensors

# The gradient flows to these arguments.
DIFFERENTIABLE = {
    "lm_logits": ("hidden", "head"),
    "embedding_mix": ("logits",),
    "linear_embedding_mix": ("hidden",),
    "prefix_attention": ("q", "k", "v"),
}

CHECKED = {
    "lm_logits": ["odd", "bf16"],
    "nll_grad": ["odd", "bf16"],
    "gumbel_noise": ["odd"],
    "draw_tokens": ["filtered"],
    "embedding_mix": ["two tables, hard", "noise, soft", "dtypes, soft", "transposed, hard"],
    "embedding_mix_backward": ["two tables", "noise", "bf16", "transposed", "gaps"],
    "linear_embedding_mix": ["two tables, soft", "noise, hard", "dtypes, hard"],
    "linear_embedding_mix_backward": ["two tables", "noise", "bf16"],
    "token_stats": ["odd", "fp16", "bf16 head"],
    "onehot_grad": ["two tables", "bf16", "mapped"],
    "onehot_grad_norm": ["two tables", "bf16", "mapped"],
    "dto_descent": ["odd", "groups", "noise"],
    "dto_descent_latents": ["odd", "groups", "noise"],
    "prefix_attention": ["ragged", "window", "bf16"],
    "prefix_attention_backward": ["ragged", "window", "bf16"],
}
COMPILED = {
    "nll_grad": ["odd"],
    "lm_logits": ["odd"],
    "gumbel_noise": ["odd"],
    "draw_tokens": ["filtered"],
    "embedding_mix": ["two tables, hard", "noise, soft"],
    "embedding_mix_backward": ["noise"],
    "linear_embedding_mix": ["two tables, soft", "noise, hard"],
    "linear_embedding_mix_backward": ["noise"],
    "token_stats": ["odd", "head"],
    "onehot_grad": ["two tables", "mapped"],
    "onehot_grad_norm": ["two tables"],
    "dto_descent": ["odd", "noise"],
    "dto_descent_latents": ["groups"],
    "prefix_attention": ["ragged"],
    "prefix_attention_backward": ["window"],
}


def runs(table: dict[str, list[str]]) -> list[Any]:
    return [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op in all_ops().values()
        for case in CASES.get(op.name, ())
        if case.name in table.get(op.name, [CASES[op.name][0].name])
    ]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def differentiable(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    names = DIFFERENTIABLE.get(op.name, ())
    return arguments | {name: arguments[name].requires_grad_() for name in names}


@pytest.mark.parametrize(("op", "case"), runs(CHECKED))
def test_opcheck(op: Op, case: Any, draw: Draw):
    arguments = differentiable(op, case.make(draw))
    torch.library.opcheck(library_op(op), tuple(flatten(op, arguments).values()))


def outcome(call: Any, op: Op, arguments: dict[str, Any]) -> list[Tensor]:
    """Everything a call leaves behind: results, changed arguments, gradient."""
    arguments = differentiable(op, map_tensors(lambda t: t.detach().clone(), arguments))
    result = call(**arguments)
    results = [result] if isinstance(result, Tensor) else list(result)
    if op.name in DIFFERENTIABLE:
        sum((r.float() * (i + 1)).square().sum() for i, r in enumerate(results)).backward()
        results.extend(arguments[name].grad for name in DIFFERENTIABLE[op.name])
    tensors: list[Tensor] = []
    map_tensors(lambda t: tensors.append(t) or t, arguments)
    return results + tensors


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("op", "case"), runs(COMPILED))
def test_compiled_equals_eager(op: Op, case: Any, draw: Draw):
    arguments = case.make(draw)
    compiled = torch.compile(lambda **kwargs: op(**kwargs), fullgraph=True, backend="aot_eager")
    eager = outcome(op, op, arguments)
    for ours, wanted in zip(outcome(compiled, op, arguments), eager, strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)
