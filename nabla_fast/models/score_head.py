"""The head that scores states, applied to states wider than its weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def head_logits(head: nn.Module, states: Tensor) -> Tensor:
    """A head's logits [n, labels] of states [n, H], differentiable.

    Of float32 states and one half-precision linear layer, logits are float32: rounded to bfloat16, rewards
    near 3 would be alike within 1/64. Any other head gets states in its own dtype.
    """
    weight = next(head.parameters(), states)
    if weight.dtype == states.dtype:
        return head(states)
    if type(head) is nn.Linear:
        bias = None if head.bias is None else head.bias.to(states.dtype)
        return F.linear(states, head.weight.to(states.dtype), bias)
    return head(states.to(weight.dtype))
