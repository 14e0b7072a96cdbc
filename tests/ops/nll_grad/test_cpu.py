"""The C++ nll_grad: instruction sets, threads and alignment, peaked and bad rows, the C interface."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _native

from ..contract import BackendContract
from ..inputs import F32, Draw
from ..shared.products import DTYPES, ROWS, WIDTHS, unaligned
from .cases import NLL_GRAD

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = NLL_GRAD, "cpu"


def gradient(
    hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, threads: int = 1
) -> tuple[int, torch.Tensor, torch.Tensor]:
    native = _native.extension()
    rows, width = hidden.shape
    grad, status = torch.full((rows, width), torch.nan), torch.full((rows,), -1, dtype=torch.int32)
    size = native.nll_grad_workspace(rows, len(head), width)
    workspace = torch.full((size,), 255, dtype=torch.uint8)  # NaN where it is read unwritten
    code = native.nll_grad(
        hidden.data_ptr(),
        rows,
        hidden.stride(0),
        head.data_ptr(),
        native.FLOAT32 if head.dtype == F32 else native.BFLOAT16,
        len(head),
        width,
        head.stride(0),
        tokens.data_ptr(),
        grad.data_ptr(),
        status.data_ptr(),
        workspace.data_ptr(),
        size,
        threads,
    )
    return code, grad, status


@DTYPES
@WIDTHS
def test_every_instruction_set(isa: str, dtype: torch.dtype, width: int, draw: Draw):
    for rows in ROWS:
        hidden, head = draw.normal(rows, width), draw.normal(523, width, dtype=dtype)
        tokens = draw.integers(0, 523, rows)
        code, grad, status = gradient(hidden, head, tokens)
        pi = (hidden.double() @ head.double().T).softmax(dim=-1)
        pi[torch.arange(rows), tokens] -= 1
        wanted = pi @ head.double()
        assert code == 0
        assert status.tolist() == [0] * rows
        assert (grad - wanted).abs().amax() <= 2e-6 * width**0.5 * wanted.abs().amax().clamp(min=1)


@DTYPES
def test_bits_do_not_depend_on_threads_or_alignment(dtype: torch.dtype, draw: Draw):
    hidden, head = draw.normal(67, 50), draw.normal(20_011, 50, dtype=dtype)
    tokens = draw.integers(0, len(head), len(hidden))
    _, grad, _ = gradient(hidden, head, tokens)
    for threads in (2, 3, 8):
        assert torch.equal(gradient(hidden, head, tokens, threads)[1], grad)
    assert torch.equal(gradient(unaligned(hidden), unaligned(head), tokens)[1], grad)


def test_peaked_rows_keep_their_small_gradient(draw: Draw):
    """The target has nearly all of the mass: what is left is small, and not the rounding of 1 − p."""
    head = draw.normal(300, 32)
    tokens = draw.integers(0, 300, 9)
    hidden = head[tokens] * 0.6
    pi = (hidden.double() @ head.double().T).softmax(dim=-1)
    pi[torch.arange(9), tokens] = -(pi.sum(dim=-1) - pi[torch.arange(9), tokens])
    wanted = pi @ head.double()
    _, grad, _ = gradient(hidden, head, tokens)
    row = wanted.abs().amax(dim=1)
    assert float(row.min()) < 1e-2
    assert ((grad - wanted).abs().amax(dim=1) <= 1e-4 * row).all()


@pytest.mark.parametrize(("bad", "code"), [(float("nan"), 1), (float("inf"), 2)])
def test_a_bad_row_is_reported_and_the_others_are_right(bad: float, code: int, draw: Draw):
    hidden, head, tokens = draw.normal(5, 16), draw.normal(40, 16), draw.integers(0, 40, 5)
    head = head.abs() + 0.1
    _, expected, _ = gradient(hidden.abs(), head, tokens)
    hidden = hidden.abs()
    hidden[3, 2] = bad
    result, grad, status = gradient(hidden, head, tokens)
    assert result == 0
    assert status.tolist() == [0, 0, 0, code, 0]
    assert grad[3].isnan().all()
    keep = [0, 1, 2, 4]
    assert torch.equal(grad[keep], expected[keep])


def test_what_the_interface_refuses(draw: Draw):
    native = _native.extension()
    hidden, head, tokens = draw.normal(2, 16), draw.normal(40, 16), torch.tensor([1, 2])
    h, w = hidden.data_ptr(), head.data_ptr()

    def text(status: int) -> str:
        assert status != 0
        return native.status_string(status)

    size = native.nll_grad_workspace(2, 40, 16)
    space, status = torch.empty(size, dtype=torch.uint8), torch.empty(2, dtype=torch.int32)
    grad = torch.empty(2, 16)
    t, g, s, m = tokens.data_ptr(), grad.data_ptr(), status.data_ptr(), space.data_ptr()
    assert "workspace" in text(native.nll_grad(h, 2, 16, w, 0, 40, 16, 16, t, g, s, m, size - 1, 1))
    assert "null" in text(native.nll_grad(h, 2, 16, w, 0, 40, 16, 16, 0, g, s, m, size, 1))
    assert "negative" in text(native.nll_grad(h, 2, 16, w, 0, 0, 16, 16, t, g, s, m, size, 1))
    for token in (-1, 40):
        tokens[1] = token
        assert "token" in text(native.nll_grad(h, 2, 16, w, 0, 40, 16, 16, t, g, s, m, size, 1))


@DTYPES
@pytest.mark.parametrize("vocabulary", [63, 523, 8192 + 77])
def test_a_head_near_the_largest_numbers(isa: str, dtype: torch.dtype, vocabulary: int, draw: Draw):
    # Hidden states are 0 where the head is huge: logits are small, and in some rows all alike.
    hidden, head = draw.normal(5, 33), draw.normal(vocabulary, 33)
    hidden *= torch.tensor([[0.0], [0.03], [0.1], [0.3], [1.0]])
    hidden[:, 1::2] = 0
    head[:, 1::2] = 7e37 * (1 + head[:, 1::2]).clamp(-2, 2)
    head, tokens = head.to(dtype), draw.integers(0, vocabulary, 5)
    code, grad, status = gradient(hidden, head, tokens)
    pi = (hidden.double() @ head.double().T).softmax(dim=-1)
    pi[torch.arange(5), tokens] -= 1
    assert code == 0
    assert status.tolist() == [0] * 5
    torch.testing.assert_close(grad.double(), pi @ head.double(), rtol=0, atol=1e34)


def test_a_row_with_nan_and_infinity_has_nan(isa: str, draw: Draw):
    hidden, head = draw.normal(3, 4), draw.normal(9000, 4)
    hidden[:, 0], head[:, 0] = 1, 0
    head[7, 0] = torch.inf
    for token in (3, 7, 8999):  # in the block of the infinity, at it, in another segment
        spoilt = head.clone()
        spoilt[token, 1] = torch.nan
        code, _, status = gradient(hidden, spoilt, torch.tensor([0, token, 7]))
        assert code == 0
        assert status.tolist() == [1, 1, 1]
    assert gradient(hidden, head, torch.tensor([0, 5, 7]))[2].tolist() == [2, 2, 2]
