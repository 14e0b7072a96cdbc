"""The C++ lm_logits: instruction sets, threads and alignment, and what the C interface refuses."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _native

from ..contract import BackendContract
from ..inputs import Draw
from ..shared.products import DTYPES, ROWS, WIDTHS, unaligned
from .cases import LM_LOGITS

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = LM_LOGITS, "cpu"


def logits(hidden: torch.Tensor, head: torch.Tensor, threads: int = 1) -> torch.Tensor:
    out = torch.full((len(hidden), len(head)), torch.nan)
    sizes = {"num_threads": threads, "rows": len(hidden), "vocab": len(head)}
    assert _native.extension().lm_logits(**sizes, hidden=hidden, head=head, logits=out)
    return out


@DTYPES
@WIDTHS
def test_every_instruction_set(isa: str, dtype: torch.dtype, width: int, draw: Draw):
    for rows in ROWS:
        hidden, head = draw.normal(rows, width), draw.normal(523, width, dtype=dtype)
        exact = hidden.double() @ head.double().T
        found = logits(hidden, head)
        assert (found - exact).abs().amax() <= 2e-6 * width**0.5 * exact.abs().amax().clamp(min=1)


@DTYPES
def test_bits_do_not_depend_on_threads_or_alignment(dtype: torch.dtype, draw: Draw):
    hidden, head = draw.normal(67, 50), draw.normal(20_011, 50, dtype=dtype)
    z = logits(hidden, head)
    for threads in (2, 3, 8):
        assert torch.equal(logits(hidden, head, threads), z)
    assert torch.equal(logits(unaligned(hidden), unaligned(head)), z)


def test_what_the_interface_refuses(draw: Draw):
    hidden, head, out = draw.normal(2, 16), draw.normal(40, 16), torch.full((2, 40), -7.0)
    fields = {"num_threads": 1, "rows": 2, "vocab": 40, "hidden": hidden, "head": head, "logits": out}

    def refused(match: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=match):
            _native.extension().lm_logits(**(fields | changed))
        assert (out == -7).all()

    refused("negative", rows=-1)
    refused("widths differ", head=head[:, 1:])
    refused("dtype", head=(head.data_ptr(), 16, 16, 7))
    refused("dtype", logits=torch.empty(2, 40, dtype=torch.bfloat16))
    for name, width in (("hidden", 16), ("head", 16), ("logits", 40)):
        refused("null", **{name: (None, width, width, 0)})
    refused("address space", hidden=(hidden.data_ptr(), 16, 2**60, 0))
    refused("overlaps", logits=(out.data_ptr(), 40, 39, 0))
    refused("overlaps", hidden=(out[1, 20:].data_ptr(), 16, 16, 0))
    assert _native.extension().lm_logits(**(fields | {"rows": 0, "logits": None}))
