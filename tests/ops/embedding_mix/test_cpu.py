"""The C++ embedding_mix and its backward."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import _native
from nabla_fast.errors import RowError
from nabla_fast.ops import embedding_mix, use_backend

from ..contract import BackendContract
from ..inputs import BF16, F32
from ..shared.mixes_cpu import MixOnCpu
from .cases import EMBEDDING_MIX, EMBEDDING_MIX_BACKWARD
from .golden import GoldenNumbers

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.why_missing()))


class TestContract(BackendContract):
    tested, backend = EMBEDDING_MIX, "cpu"


class TestBackwardContract(BackendContract):
    tested, backend = EMBEDDING_MIX_BACKWARD, "cpu"


class TestGolden(GoldenNumbers):
    backend = "cpu"


class TestSizes(MixOnCpu):
    op = EMBEDDING_MIX.op


class TestBackwardSizes(MixOnCpu):
    op = EMBEDDING_MIX_BACKWARD.op


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bad_rows_are_named(hard: bool, dtype: torch.dtype, isa: str):
    z, table = torch.randn(70, 300).to(dtype), torch.randn(300, 8)
    z[2, 299] = torch.inf
    z[66, 17] = torch.nan
    z[66, 18] = torch.inf
    z[69] = -torch.inf
    with use_backend("cpu"), pytest.raises(RowError) as error:
        embedding_mix(z, [table], hard=hard)
    reasons = dict(error.value.rows)
    assert reasons == {2: "has a +inf logit", 66: "has a NaN logit", 69: "has no finite logit"}


def test_masked_tokens_take_no_part_though_their_gradient_is_infinite():
    z, table = torch.randn(3, 200), torch.randn(200, 5)
    z[:, ::3] = -torch.inf
    direct = torch.randn(3, 200)
    direct[:, ::3] = torch.inf
    cotangent = torch.randn(3, 5)

    def gradient(backend: str, direct: torch.Tensor) -> torch.Tensor:
        leaf = z.clone().requires_grad_()
        with use_backend(backend):
            (mix,) = embedding_mix(leaf, [table], direct=direct)
            return torch.autograd.grad(mix, leaf, cotangent)[0]

    ours = gradient("cpu", direct)
    assert (ours[:, ::3] == 0).all()
    torch.testing.assert_close(ours, gradient("torch", direct.where(direct.isfinite(), 0.0)))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_infinite_entry_of_a_half_precision_table_spoils_its_column_alone(value: float, isa: str):
    # The weight 1/2 is one bf16 term; those that are left of it are 0.
    z = torch.full((18, 130), -torch.inf)
    z[:, [5, 70]] = 0.0
    table = torch.randn(130, 70).to(BF16)
    table[70, 33] = value
    with use_backend("cpu"):
        (ours,) = embedding_mix(z, [table], hard=False)
    expected = ((table[5].float() + table[70].float()) / 2).to(BF16).expand(18, -1)
    torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_column_whose_sums_overflow_changes_no_other(dtype: torch.dtype, isa: str):
    z, table = torch.randn(5, 2500), torch.randn(2500, 40).to(dtype)

    def mix(z: torch.Tensor) -> torch.Tensor:
        with use_backend("cpu"):
            return embedding_mix(z, [table], hard=False)[0]

    before = mix(z)
    table[:, 3] = 3e38
    after = mix(z)
    torch.testing.assert_close(after[:, 3], table[0, 3].expand(5), rtol=1e-5, atol=0)
    assert torch.equal(after[:, [0, 1, 2, *range(4, 40)]], before[:, [0, 1, 2, *range(4, 40)]])
    assert torch.equal(mix(z[2:3]), after[2:3])


def test_weights_keep_their_digits_beside_a_table_of_fp32(isa: str):
    z, table, half = torch.randn(17, 300), torch.randn(300, 33), torch.randn(300, 24).to(BF16)
    with use_backend("cpu"):
        (alone,) = embedding_mix(z, [table], hard=False)
        together, _ = embedding_mix(z, [table, half], hard=False)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-40])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 16, 33, 127, 128])
def test_gradients_of_few_rows_are_those_of_many(width: int, dtype: torch.dtype, scale: float, isa: str):
    """To the sign of zeros too, which sums have where every product is below 2^-126."""
    z, table = torch.randn(9, 300), (torch.randn(300, width) * scale).to(dtype)
    empty, cotangent = torch.zeros(300, 0, dtype=dtype), torch.randn(9, width) * scale

    def gradient(rows: slice) -> torch.Tensor:
        given = z[rows].clone().requires_grad_()
        with use_backend("cpu"):
            mix, _ = embedding_mix(given, [table, empty])
        (mix * cotangent[rows]).sum().backward()
        return given.grad.view(torch.int32)

    many = gradient(slice(9))
    for n in (1, 2, 3, 5):
        assert torch.equal(gradient(slice(n)), many[:n])
