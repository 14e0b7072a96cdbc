"""The softmax's gradient in float32, where rounding would decide the direction of an Adam step."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.ops.softmax import softmax_gradient

from .inputs import WHOLE, Draw


def relative_error(z: Tensor, grad: Tensor, tau: float = 1.0) -> float:
    """Largest error of ∂ℒ/∂z in float32 against float64, each token's by its own size."""
    p, token = torch.softmax(z / tau, dim=-1), z.argmax(dim=-1)
    exact = torch.softmax(z.double() / tau, dim=-1)
    exact = exact * (grad.double() - (exact * grad.double()).sum(dim=-1, keepdim=True)) / tau
    ours = softmax_gradient(p, grad, token, tau)
    return float(((ours - exact) / exact).abs().max())


def test_where_one_token_has_nearly_all_the_probability(draw: Draw):
    # G[ŷ] − ⟨p, G⟩ is 1e-7 or so here; taken as it stands, rounding leaves nothing of it.
    z, grad = draw.normal(8, 257), draw.uniform(8, 257) + 2
    z[:, 5] = 22.0
    grad[:, 5] = 1.3
    assert relative_error(z, grad) < 1e-5


def test_far_from_zero(draw: Draw):
    # Integers, so that the shifted gradient is exact.
    z, grad = draw.normal(8, 257), draw.integers(0, 2, 8, 257).float()
    p, token = torch.softmax(z, dim=-1), z.argmax(dim=-1)
    near, far = softmax_gradient(p, grad, token, 1.0), softmax_gradient(p, grad + 2**20, token, 1.0)
    assert torch.equal(near, far)


def test_where_probabilities_do_not_add_up_to_one(draw: Draw):
    # All but ŷ are alike: what is left of G − ⟨p, G⟩ is p[ŷ], beside which Σp is not 1 in float32.
    p = torch.softmax(draw.normal(2, WHOLE, scale=0.1), dim=-1) * (1 + 4e-6)
    token = p.argmax(dim=-1)
    p[torch.arange(2), token] = 1e-4
    grad = torch.ones_like(p)
    grad[torch.arange(2), token] = 0.0
    share = 1e-4 / p.double().sum(dim=-1, keepdim=True)
    others = torch.arange(WHOLE) != token[:, None]
    ours = softmax_gradient(p, grad, token, 1.0)[others] / p[others]
    torch.testing.assert_close(ours, share.float().expand_as(p)[others], rtol=1e-2, atol=0)
