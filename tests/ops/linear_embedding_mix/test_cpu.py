"""The C++ linear_embedding_mix and its backward."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _native
from nabla_fast.errors import RowError
from nabla_fast.ops import linear_embedding_mix, use_backend

from ..contract import BackendContract
from ..inputs import BF16, F32, Draw
from ..shared.mixes_cpu import MixOnCpu
from .cases import LINEAR_EMBEDDING_MIX, LINEAR_EMBEDDING_MIX_BACKWARD

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = LINEAR_EMBEDDING_MIX, "cpu"


class TestBackwardContract(BackendContract):
    tested, backend = LINEAR_EMBEDDING_MIX_BACKWARD, "cpu"


class TestSizes(MixOnCpu):
    op = LINEAR_EMBEDDING_MIX.op


class TestBackwardSizes(MixOnCpu):
    op = LINEAR_EMBEDDING_MIX_BACKWARD.op


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bad_rows_are_named(hard: bool, dtype: torch.dtype, isa: str):
    # Under the identity the logits are the hidden states, and with one that is no number all are none.
    hidden, table = torch.randn(70, 300).to(dtype), torch.randn(300, 8)
    hidden[2, 299] = hidden[66, 17] = torch.nan
    hidden[69] = torch.nan
    with use_backend("cpu"), pytest.raises(RowError) as error:
        linear_embedding_mix(hidden.float(), torch.eye(300), [table], hard=hard)
    assert error.value.rows == [(row, "has a NaN logit") for row in (2, 66, 69)]


def test_infinite_entries_of_a_half_precision_head_mask_tokens(isa: str):
    # A float32 is several bf16 terms on some levels: infinity times one that is 0 is no number.
    hidden = torch.tensor([[1.0, 0.5], [2.0, 1 / 3]])
    head = torch.randn(40, 2).to(BF16)
    head[7, 0] = -torch.inf
    table = torch.randn(40, 3)
    with use_backend("cpu"):
        (ours,) = linear_embedding_mix(hidden, head, [table], hard=False)
    z = hidden @ head.float().T
    torch.testing.assert_close(ours, z.softmax(dim=-1) @ table)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_gradient_of_a_flat_softmax_over_a_large_vocabulary(dtype: torch.dtype, draw: Draw):
    # G has a mean that is large beside what is left of it: sums of G itself would lose four digits.
    def gradient(backend: str, wide: torch.dtype | None) -> torch.Tensor:
        hidden, head, table, cotangent = (x if wide is None else x.to(wide) for x in given)
        hidden = hidden.clone().requires_grad_()
        with use_backend(backend):
            (mix,) = linear_embedding_mix(hidden, head, [table], hard=False)
            return torch.autograd.grad(mix, hidden, cotangent)[0].double()

    def error(backend: str) -> float:
        difference = (gradient(backend, None) - exact).abs().amax(dim=1)
        return float((difference / exact.abs().amax(dim=1)).max())

    errors: dict[str, list[float]] = {"cpu": [], "torch": []}
    for _ in range(4):
        head, table = draw.normal(151_936, 8).to(dtype), draw.normal(151_936, 3).to(dtype)
        given = draw.normal(2, 8, scale=8**-0.5), head, table, draw.normal(2, 3).to(dtype)
        exact = gradient("torch", torch.float64)
        for backend, found in errors.items():
            found.append(error(backend))
    assert max(errors["cpu"]) <= 2 * max(errors["torch"]) + 1e-7
