"""The Triton descents: how they are called, and the tests that both pass."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nabla_fast.ops import AdamState, Descent, dto_descent, dto_descent_latents, synchronize, use_backend

from ..harness import DEVICES, map_tensors, to_device
from ..inputs import Draw
from .descents import descent_arguments

DEVICE = DEVICES[-1]  # interpreted where there is no GPU
ON_DEVICE = [pytest.mark.gpu] if DEVICE == "cuda" else []


def descended(arguments: dict[str, Any], backend: str = "triton") -> tuple[Descent, Tensor, AdamState]:
    """The op's results, with the parameter and the state it leaves, from a copy of the arguments."""
    return descend_(to_device(DEVICE if backend == "triton" else "cpu", arguments), backend)


def descend_(given: dict[str, Any], backend: str = "triton") -> tuple[Descent, Tensor, AdamState]:
    """The same in place; results are on the CPU."""
    with use_backend(backend):
        result = (dto_descent_latents if "h" in given else dto_descent)(**given)
        synchronize()
    return map_tensors(Tensor.cpu, (result, given["h" if "h" in given else "z"], given["state"]))


def follows(ours: tuple, exact: tuple, tolerance: float = 2e-5) -> None:
    """Same tokens, flips and steps; parameters as close as float32 lets them."""
    assert torch.equal(ours[0].token, exact[0].token)
    assert torch.equal(ours[0].flipped, exact[0].flipped)
    assert torch.equal(ours[2].step, exact[2].step)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=tolerance)


def same(first: tuple, second: tuple, rows: Any = slice(None)) -> bool:
    """Whether rows of two results agree to the bit."""
    pairs = zip((*first[0], first[1], *first[2]), (*second[0], second[1], *second[2]), strict=True)
    return all(torch.equal(a[rows], b[rows]) for a, b in pairs)


class TritonDescent:
    """The descent of logits or of latents."""

    kind: ClassVar[str]

    def made(self, draw: Draw, rows: int, vocabulary: int, **options: Any) -> dict[str, Any]:
        hidden = 24 if self.kind == "latents" else 0
        return descent_arguments(draw, rows, vocabulary, hidden=hidden, **options)

    def test_a_group_stops_at_its_earliest_flip_with_the_bits_of_fewer_steps(self, draw: Draw):
        arguments = self.made(draw, 4, 300, iters=6, gap=0.1, lr=0.05)
        group = torch.tensor([2**40, 3, 2**40, 3])
        (_, alone_flipped), _, alone = descended(arguments)
        together = descended(arguments | {"group": group})
        steps = torch.stack([alone.step[group == g].amin() for g in group])
        assert torch.equal(together[2].step, steps)
        assert torch.equal(together[0].flipped, alone_flipped & (alone.step == steps))
        assert same(together, descended(arguments | {"until": steps}))

    def test_rows_with_gaps_and_one_gradient_for_all(self, draw: Draw):
        arguments = self.made(draw, 2, 131, iters=3, noise=True)
        arguments["grad"] = arguments["grad"][:1].expand(2, -1)

        def shifted(tensor: Tensor) -> Tensor:
            if tensor.ndim < 2 or tensor.stride(0) == 0:
                return tensor
            wide = torch.full((len(tensor), tensor.shape[1] + 8), torch.nan, device=tensor.device)
            wide[:, 3:-5] = tensor
            return wide[:, 3:-5]

        given = map_tensors(shifted, map_tensors(lambda tensor: tensor.to(DEVICE), arguments))
        assert same(descended(arguments), descend_(given))
