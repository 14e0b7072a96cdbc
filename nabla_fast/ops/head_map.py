"""What models do to the product of head and hidden states before the softmax: bias, scale, soft cap.

z = c·tanh(u/c) with u = s·(h·Wᵀ + b); z = u where there is no cap c. All ops that recompute logits take
b, s and c as ``bias``, ``scale`` and ``softcap``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops.checks import expect
from nabla_fast.ops.registry import floats

BIAS_RULE = {"bias": floats("V")}
# A cap that float32 logits may be divided by.
SOFTCAP_RANGE = (2.0**-64, 2.0**64)
_NAMES = ("bias", "scale", "softcap")


def is_product(bias: Tensor | None, scale: float, softcap: float | None) -> bool:
    """Whether logits are h·Wᵀ itself."""
    return bias is None and scale == 1.0 and softcap is None


def logits_of_product(
    product: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """z of h·Wᵀ [N, V]: itself where nothing is done to it."""
    if bias is not None:
        product = product + bias.to(product.dtype)
    if scale != 1.0:
        product = product * scale
    return product if softcap is None else softcap * torch.tanh(product / softcap)


def product_gradient(dz: Tensor, z: Tensor, scale: float, softcap: float | None) -> Tensor:
    """∂ℒ/∂(h·Wᵀ) = s·(1 − (z/c)²)·∂ℒ/∂z, [N, V].

    Args:
        dz: ∂ℒ/∂z [N, V].
        z: [N, V] of :func:`logits_of_product`.
    """
    if softcap is not None:
        dz = dz * (1 - (z / softcap) ** 2)
    return dz if scale == 1.0 else dz * scale


def check_head_map(op: str, bias: Tensor | None, scale: float, softcap: float | None) -> None:
    """Raise InputError for what no head does."""
    most = torch.finfo(torch.float32).max
    expect(0 < abs(scale) <= most, f"{op}: scale must be a float32 number other than 0, got {scale}")
    low, high = SOFTCAP_RANGE
    expect(
        softcap is None or low <= softcap <= high,
        f"{op}: softcap must be None or from {low:.3g} to {high:.3g}, got {softcap}",
    )
    expect(
        bias is None or not bias.requires_grad,
        f"{op}: bias is a constant and must not require grad",
    )


def head_map_refusal(
    kernels: str, *, bias: Tensor | None, scale: float, softcap: float | None, **_: Any
) -> str | None:
    """Logits are the product itself; ``kernels`` is "Triton", say."""
    given = {"bias": bias is not None, "scale": scale != 1.0, "softcap": softcap is not None}
    named = next((name for name, is_given in given.items() if is_given), None)
    return named and f"{named} is given (the {kernels} kernels take logits that are hidden·headᵀ alone)"


def without_head_map(options: dict[str, Any]) -> dict[str, Any]:
    """An op's options but these three, for kernels that refuse them."""
    return {name: value for name, value in options.items() if name not in _NAMES}
