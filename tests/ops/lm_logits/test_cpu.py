"""The C++ lm_logits: instruction sets, threads and alignment, and what the C interface refuses."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _native

from ..contract import BackendContract
from ..inputs import F32, Draw
from ..shared.products import DTYPES, ROWS, WIDTHS, unaligned
from .cases import LM_LOGITS

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = LM_LOGITS, "cpu"


def logits(hidden: torch.Tensor, head: torch.Tensor, threads: int = 1) -> torch.Tensor:
    native = _native.extension()
    out = torch.full((len(hidden), len(head)), torch.nan)
    dtype = native.FLOAT32 if head.dtype == F32 else native.BFLOAT16
    status = native.lm_logits(
        hidden.data_ptr(),
        len(hidden),
        hidden.stride(0),
        head.data_ptr(),
        dtype,
        *head.shape,
        head.stride(0),
        out.data_ptr(),
        len(head),
        threads,
    )
    assert status == 0
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
    native = _native.extension()
    hidden, head = draw.normal(2, 16), draw.normal(40, 16)
    out = torch.empty(2, 40)
    h, w, o = hidden.data_ptr(), head.data_ptr(), out.data_ptr()

    def text(status: int) -> str:
        assert status != 0
        return native.status_string(status)

    assert "negative" in text(native.lm_logits(h, -1, 16, w, 0, 40, 16, 16, o, 40, 1))
    assert "dtype" in text(native.lm_logits(h, 2, 16, w, 7, 40, 16, 16, o, 40, 1))
    assert "null" in text(native.lm_logits(0, 2, 16, w, 0, 40, 16, 16, o, 40, 1))
    assert "null" in text(native.lm_logits(h, 2, 16, 0, 0, 40, 16, 16, o, 40, 1))
    assert "null" in text(native.lm_logits(h, 2, 16, w, 0, 40, 16, 16, 0, 40, 1))
    assert native.lm_logits(h, 0, 16, w, 0, 40, 16, 16, 0, 40, 1) == 0
