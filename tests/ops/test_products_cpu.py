"""The C++ products: what the C interface refuses, alignment, instruction sets, threads."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _native

from .cases import BF16, F32, Draw

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no extension: {_native.why_missing()}")


@pytest.fixture(params=range(len(_native.ISA_NAMES)), ids=_native.ISA_NAMES)
def isa(request):
    native = _native.extension()
    best = native.cpu_isa()
    if request.param > best:
        pytest.skip("this CPU has no such instructions")
    native.limit_cpu_isa(request.param)
    yield request.param
    native.limit_cpu_isa(best)


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


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element behind a place where vectors are aligned."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [1, 15, 16, 31, 64, 100])
def test_every_instruction_set(isa: int, dtype: torch.dtype, width: int, draw: Draw):
    for rows in (1, 2, 3, 4, 7, 21):
        hidden, head = draw.normal(rows, width), draw.normal(523, width, dtype=dtype)
        exact = hidden.double() @ head.double().T
        found = logits(hidden, head)
        assert (found - exact).abs().amax() <= 2e-6 * width**0.5 * exact.abs().amax().clamp(min=1)
        tokens = draw.integers(0, 523, rows)
        code, grad, status = gradient(hidden, head, tokens)
        pi = exact.softmax(dim=-1)
        pi[torch.arange(rows), tokens] -= 1
        wanted = pi @ head.double()
        assert code == 0
        assert status.tolist() == [0] * rows
        assert (grad - wanted).abs().amax() <= 2e-6 * width**0.5 * wanted.abs().amax().clamp(min=1)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bits_do_not_depend_on_threads_or_alignment(dtype: torch.dtype, draw: Draw):
    hidden, head = draw.normal(67, 50), draw.normal(20_011, 50, dtype=dtype)
    tokens = draw.integers(0, len(head), len(hidden))
    z, (_, grad, _) = logits(hidden, head), gradient(hidden, head, tokens)
    for threads in (2, 3, 8):
        assert torch.equal(logits(hidden, head, threads), z)
        assert torch.equal(gradient(hidden, head, tokens, threads)[1], grad)
    moved = unaligned(hidden), unaligned(head)
    assert torch.equal(logits(*moved), z)
    assert torch.equal(gradient(*moved, tokens)[1], grad)


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
