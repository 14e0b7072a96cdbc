"""lm_logits and its transpose: float32 products whatever the head's dtype, block by block."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.errors import InputError
from nabla_fast.ops import lm_logits, logits_backward, use_backend
from nabla_fast.ops.lm_logits import HEAD_ROWS as BLOCK

from ..contract import BackendContract, LibraryContract
from ..inputs import BF16, F16, F32, F64, Draw
from .cases import LM_LOGITS


class TestContract(BackendContract):
    tested, backend = LM_LOGITS, "torch"


class TestLibrary(LibraryContract):
    tested = LM_LOGITS


DTYPES = pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype", "result"),
    [
        (F32, F32, F32),
        (F32, BF16, F32),
        (F32, F16, F32),
        (BF16, BF16, F32),
        (F16, F16, F32),
        (BF16, F32, F32),
        (F64, F64, F64),
        (F64, BF16, F64),
    ],
)


@DTYPES
@pytest.mark.parametrize("vocabulary", [1, 257, BLOCK, 2 * BLOCK + 5])
def test_against_float64(
    hidden_dtype: torch.dtype, head_dtype: torch.dtype, result: torch.dtype, vocabulary: int, draw: Draw
):
    hidden, head = draw.normal(3, 9, dtype=hidden_dtype), draw.normal(vocabulary, 9, dtype=head_dtype)
    z = lm_logits(hidden, head)
    assert z.dtype == result
    exact = hidden.double() @ head.double().T
    tolerance = 1e-6 if result == F32 else 1e-14  # of the largest number; half precision rounds at 5e-4
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))

    grad = draw.normal(3, vocabulary, dtype=result)
    back = logits_backward(grad, head)
    assert back.dtype == result
    wanted = grad.double() @ head.double()
    torch.testing.assert_close(
        back.double(), wanted, rtol=0, atol=10 * tolerance * float(wanted.abs().max())
    )


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_heads_are_converted_by_blocks(
    dtype: torch.dtype, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    head = draw.normal(2 * BLOCK + 5, 4, dtype=dtype)
    converted: list[int] = []
    to = torch.Tensor.to

    def counting(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if tensor.dtype == dtype:
            converted.append(len(tensor))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counting)
    with use_backend("torch"):
        logits_backward(lm_logits(draw.normal(2, 4), head), head)
    assert converted == [BLOCK, BLOCK, 5] * 2


def test_logits_that_tie_in_half_precision_are_told_apart():
    # 1 and 1 + 2⁻⁹ are one number in bfloat16.
    hidden = torch.tensor([[1.0, 2.0**-9]], dtype=BF16)
    head = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=BF16)
    assert lm_logits(hidden, head).argmax(dim=-1).tolist() == [1]


def test_what_the_gradient_refuses(draw: Draw):
    grad, head = draw.normal(2, 5), draw.normal(5, 3)
    for wrong in (
        (grad, head[1:]),
        (grad.long(), head),
        (grad.bfloat16(), head),
        (grad, None),
        (grad[0], head),
    ):
        with pytest.raises(InputError, match=r"^logits_backward: (grad|head) must be"):
            logits_backward(*wrong)
