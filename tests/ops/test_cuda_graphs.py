"""One round of a small problem - choose a position, its G, descend, draw - as ops that a graph can hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nabla_fast.ops import (
    AdamState,
    DrawKey,
    GumbelNoise,
    backend_status,
    cosine_schedule,
    draw_tokens,
    dto_descent,
    dto_descent_latents,
    lm_logits,
    onehot_grad,
    token_stats,
    use_backend,
)

from .harness import map_tensors, to_float64
from .inputs import F64, Draw

WHY = backend_status()["triton"]
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))
KINDS = pytest.mark.parametrize("kind", ["logits", "latents"])


def problem(draw: Draw, positions: int = 4, vocabulary: int = 131, width: int = 16) -> dict[str, Tensor]:
    return {
        "rollout": draw.normal(positions, width, scale=3 * width**-0.5),
        "hard": draw.normal(positions, width, scale=3 * width**-0.5),
        "cotangent": draw.normal(positions, width),
        "head": draw.normal(vocabulary, width),
        "table": draw.normal(vocabulary, width),
        "seed": draw.integers(0, 2**62, 1),
        "position": draw.integers(0, 2**62, 1),
        "schedule": cosine_schedule(3, 0.05),
    }


def one_round(kind: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first position of those that are least sure, moved and drawn from: no shape depends on data."""
    stats = token_stats(given["rollout"], given["head"])
    chosen = stats.confidence.argmin(keepdim=True)
    hidden = given["rollout"].index_select(0, chosen)
    grad = onehot_grad(
        [given["cotangent"].index_select(0, chosen)],
        [given["table"]],
        given["hard"].index_select(0, chosen),
        given["head"],
        nll_coeff=1e-3,
    )
    noise = GumbelNoise(given["seed"], given["position"])
    if kind == "latents":
        state = AdamState.zeros(hidden)
        descent = dto_descent_latents(hidden, given["head"], grad, state, given["schedule"], noise=noise)
        z = lm_logits(hidden, given["head"])
    else:
        z = lm_logits(hidden, given["head"])
        state = AdamState.zeros(z)
        descent = dto_descent(z, grad, state, given["schedule"], noise=noise)
    key = DrawKey(noise.seed, noise.position, torch.zeros_like(noise.seed), noise.position)
    token = draw_tokens(z, key, redraw=True, temperature=0.5, top_k=20, top_p=0.8)
    return {
        "chosen": chosen,
        "z": z,
        "hard token": descent.token,
        "flipped": descent.flipped,
        "steps": state.step,
        "token": token,
    }


@KINDS
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the graph is compared")
def test_a_round_of_kernels_is_a_round_of_the_oracle(kind: str, draw: Draw):
    given = problem(draw)
    with use_backend("triton", "torch"):
        ours = one_round(kind, given)
    with use_backend("torch"):
        exact = one_round(kind, to_float64(given))
    for name, value in exact.items():
        if value.dtype == F64:
            torch.testing.assert_close(ours[name].double(), value, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(ours[name], value), name


def captured(function: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of ``function`` and the tensors that its replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles what is compiled at a first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@KINDS
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_replayed_round_is_the_eager_one(kind: str, draw: Draw):
    first, second = (map_tensors(Tensor.cuda, problem(draw, 9, 151_937, 64)) for _ in range(2))
    with use_backend("triton", "torch"):
        eager = [one_round(kind, given) for given in (first, second)]
        static = {name: tensor.clone() for name, tensor in first.items()}
        graph, results = captured(lambda: one_round(kind, static))
        for given, expected in zip((first, second), eager, strict=True):
            for name, tensor in given.items():
                static[name].copy_(tensor)
            graph.replay()
            for name, value in expected.items():
                assert torch.equal(results[name], value), name
