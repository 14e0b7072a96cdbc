"""Logits some rows of which are bad."""

from __future__ import annotations

import torch
from cuda_kernels import ALL_MASKED, INFINITE, NAN, OK
from ops.inputs import Draw
from torch import Tensor

BAD_STATUS = [OK, NAN, INFINITE, NAN, ALL_MASKED, INFINITE, OK]


def bad_logits(draw: Draw, dtype: torch.dtype = torch.float32) -> Tensor:
    """[7, 4500], whose rows have BAD_STATUS."""
    z = draw.logits(7, 4500, dtype)
    z[1, 4499] = torch.nan
    z[2, 17] = torch.inf
    z[3, 4100], z[3, 4] = torch.nan, torch.inf
    z[4] = -torch.inf
    z[5, 4400] = torch.inf  # after a slice of numbers
    return z
