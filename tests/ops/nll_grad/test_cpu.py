"""The C++ nll_grad: instruction sets, threads and alignment, peaked and bad rows, the C interface."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _native

from ..contract import BackendContract
from ..inputs import Draw
from ..shared.products import DTYPES, ROWS, WIDTHS, unaligned
from .cases import NLL_GRAD

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = NLL_GRAD, "cpu"


def gradient(
    hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    native, rows = _native.extension(), len(hidden)
    grad, status = torch.full(hidden.shape, torch.nan), torch.full((rows,), -1, dtype=torch.int32)
    fields = {
        "num_threads": threads,
        "rows": rows,
        "vocab": len(head),
        "hidden": hidden,
        "head": head,
        "targets": tokens,
        "grad": grad,
        "row_status": status,
    }
    # NaN where it is read unwritten.
    workspace = torch.full((native.nll_grad_workspace(**fields),), 255, dtype=torch.uint8)
    assert native.nll_grad(**fields, workspace=workspace, workspace_bytes=len(workspace))
    return grad, status


@DTYPES
@WIDTHS
def test_every_instruction_set(isa: str, dtype: torch.dtype, width: int, draw: Draw):
    for rows in ROWS:
        hidden, head = draw.normal(rows, width), draw.normal(523, width, dtype=dtype)
        tokens = draw.integers(0, 523, rows)
        grad, status = gradient(hidden, head, tokens)
        pi = (hidden.double() @ head.double().T).softmax(dim=-1)
        pi[torch.arange(rows), tokens] -= 1
        wanted = pi @ head.double()
        assert status.tolist() == [0] * rows
        assert (grad - wanted).abs().amax() <= 2e-6 * width**0.5 * wanted.abs().amax().clamp(min=1)


def test_small_terms_beside_a_large_one(isa: str):
    """Added one by one they would be rounded to the last place of the sum: an error of 1e-4 here."""
    hidden, head = torch.ones(1, 1), torch.full((8000, 1), 0.3)
    head[0] = 12
    pi = (hidden.double() @ head.double().T).softmax(dim=-1)
    pi[0, 5] -= 1
    wanted = pi @ head.double()
    grad, _ = gradient(hidden, head, torch.tensor([5]))
    assert (grad - wanted).abs() <= 1e-5 * wanted.abs()


@DTYPES
def test_bits_do_not_depend_on_threads_or_alignment(dtype: torch.dtype, draw: Draw):
    hidden, head = draw.normal(67, 50), draw.normal(20_011, 50, dtype=dtype)
    tokens = draw.integers(0, len(head), len(hidden))
    grad, _ = gradient(hidden, head, tokens)
    for threads in (2, 3, 8):
        assert torch.equal(gradient(hidden, head, tokens, threads)[0], grad)
    assert torch.equal(gradient(unaligned(hidden), unaligned(head), tokens)[0], grad)


def test_peaked_rows_keep_their_small_gradient(draw: Draw):
    """The target has nearly all of the mass: what is left is small, and not the rounding of 1 − p."""
    head = draw.normal(300, 32)
    tokens = draw.integers(0, 300, 9)
    hidden = head[tokens] * 0.6
    pi = (hidden.double() @ head.double().T).softmax(dim=-1)
    pi[torch.arange(9), tokens] = -(pi.sum(dim=-1) - pi[torch.arange(9), tokens])
    wanted = pi @ head.double()
    grad, _ = gradient(hidden, head, tokens)
    row = wanted.abs().amax(dim=1)
    assert float(row.min()) < 1e-2
    assert ((grad - wanted).abs().amax(dim=1) <= 1e-4 * row).all()


@pytest.mark.parametrize(("bad", "code"), [(float("nan"), 1), (float("inf"), 2)])
def test_a_bad_row_is_reported_and_the_others_are_right(bad: float, code: int, draw: Draw):
    hidden, head, tokens = draw.normal(5, 16), draw.normal(40, 16), draw.integers(0, 40, 5)
    head = head.abs() + 0.1
    expected, _ = gradient(hidden.abs(), head, tokens)
    hidden = hidden.abs()
    hidden[3, 2] = bad
    grad, status = gradient(hidden, head, tokens)
    assert status.tolist() == [0, 0, 0, code, 0]
    assert grad[3].isnan().all()
    keep = [0, 1, 2, 4]
    assert torch.equal(grad[keep], expected[keep])


def test_what_the_interface_refuses(draw: Draw):
    native = _native.extension()
    hidden, head, tokens = draw.normal(2, 16), draw.normal(40, 16), torch.tensor([1, 2])
    grad, status = torch.full((2, 16), -7.0), torch.full((2,), -7, dtype=torch.int32)
    fields = {
        "num_threads": 1,
        "rows": 2,
        "vocab": 40,
        "hidden": hidden,
        "head": head,
        "targets": tokens,
        "grad": grad,
        "row_status": status,
    }

    def refused(match: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=match):
            native.nll_grad(**(fields | changed))
        assert (grad == -7).all()
        assert (status == -7).all()

    size = native.nll_grad_workspace(**fields)
    refused("workspace", workspace=torch.empty(size, dtype=torch.uint8), workspace_bytes=size - 1)
    refused("null", targets=None)
    refused("empty", vocab=0)
    refused("overlaps", row_status=grad)
    refused("overlaps", grad=hidden)
    for token in (-1, 40):
        tokens[1] = token
        refused("token")


@DTYPES
@pytest.mark.parametrize("vocabulary", [63, 523, 8192 + 77])
def test_a_head_near_the_largest_numbers(isa: str, dtype: torch.dtype, vocabulary: int, draw: Draw):
    # Hidden states are 0 where the head is huge: logits are small, and in some rows all alike.
    hidden, head = draw.normal(5, 33), draw.normal(vocabulary, 33)
    hidden *= torch.tensor([[0.0], [0.03], [0.1], [0.3], [1.0]])
    hidden[:, 1::2] = 0
    head[:, 1::2] = 7e37 * (1 + head[:, 1::2]).clamp(-2, 2)
    head, tokens = head.to(dtype), draw.integers(0, vocabulary, 5)
    grad, status = gradient(hidden, head, tokens)
    pi = (hidden.double() @ head.double().T).softmax(dim=-1)
    pi[torch.arange(5), tokens] -= 1
    assert status.tolist() == [0] * 5
    torch.testing.assert_close(grad.double(), pi @ head.double(), rtol=0, atol=1e34)


def test_a_row_with_nan_and_infinity_has_nan(isa: str, draw: Draw):
    hidden, head = draw.normal(3, 4), draw.normal(9000, 4)
    hidden[:, 0], head[:, 0] = 1, 0
    head[7, 0] = torch.inf
    for token in (3, 7, 8999):  # in the block of the infinity, at it, in another segment
        spoilt = head.clone()
        spoilt[token, 1] = torch.nan
        _, status = gradient(hidden, spoilt, torch.tensor([0, token, 7]))
        assert status.tolist() == [1, 1, 1]
    assert gradient(hidden, head, torch.tensor([0, 5, 7]))[1].tolist() == [2, 2, 2]
