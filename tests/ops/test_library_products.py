"""Products that the Triton mixes leave to the library."""

from __future__ import annotations

import pytest
import torch

from nabla_fast.ops import backend_status, embedding_mix, use_backend

from .inputs import BF16, F16, F32, Draw, strided

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels.common import library_products, scratch

DTYPES = pytest.mark.parametrize(
    ("left", "right"), [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F16, BF16)]
)
LAYOUTS = pytest.mark.parametrize(
    "layout", [lambda t: t, lambda t: t.T.contiguous().T, strided], ids=["rows", "columns", "gaps"]
)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("bytes_", [16_000_000, 16 * 200], ids=["whole", "parts"])
def test_products_of_any_dtypes_and_layouts(
    left: torch.dtype, right: torch.dtype, layout, bytes_: int, draw: Draw, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scratch, "BYTES", bytes_)
    weights, table = draw.normal(5, 37, dtype=left), layout(draw.normal(37, 9, dtype=right))
    sums = torch.full((5, 9), torch.nan)
    library_products.add_weighted_rows(sums, weights, table, keep=False)
    exact = weights.double() @ table.double()
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)
    library_products.add_weighted_rows(sums, weights, table, keep=True)
    torch.testing.assert_close(sums.double(), 2 * exact, rtol=1e-5, atol=1e-5)

    states, out = draw.normal(4, 9, dtype=left), torch.full((4, 50), torch.nan)[:, 5:42]
    library_products.add_vocabulary_products(out, [states, states], [table, table])
    exact = 2 * states.double() @ table.double().T
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_float32_is_multiplied_as_float32_and_settings_return():
    settings = torch.backends.cuda.matmul
    former = settings.fp32_precision
    settings.fp32_precision = "tf32"
    seen = []

    def fail() -> None:
        with library_products.float32_products():
            seen.append(settings.fp32_precision)
            raise KeyError

    try:
        with pytest.raises(KeyError):
            fail()
        assert (seen, settings.fp32_precision) == (["ieee"], "tf32")
    finally:
        settings.fp32_precision = former


def test_what_is_set_for_all_of_torch_is_followed_again():
    settings = torch.backends.cuda.matmul
    former, of_torch = settings.fp32_precision, torch.backends.fp32_precision
    try:
        settings.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
        with library_products.float32_products():
            with library_products.float32_products():
                pass
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert settings.fp32_precision == "ieee"
    finally:
        settings.fp32_precision, torch.backends.fp32_precision = former, of_torch


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_autocast_changes_nothing(hard: bool, draw: Draw):
    logits, tables = draw.logits(3, 300), draw.tables(300, [(8, F32)])
    results = []
    for enabled in (False, True):
        z = logits.clone().requires_grad_()
        with use_backend("triton"), torch.autocast("cpu", dtype=BF16, enabled=enabled):
            (mix,) = embedding_mix(z, tables, hard=hard)
            (grad,) = torch.autograd.grad(mix, z, torch.ones_like(mix))
        results.append((mix.detach(), grad))
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


def truncated(x: torch.Tensor) -> torch.Tensor:
    """Float64 cut to float32's 24 bits, toward 0."""
    near = x.float()
    beyond = near.double().abs() > x.abs()
    return torch.where(beyond, torch.nextafter(near, torch.zeros(())), near).double()


def emulated(a: torch.Tensor, b: torch.Tensor, depth: int) -> torch.Tensor:
    """a·bᵀ of float32 with bfloat16 as Hopper's tensor cores add it up, as three bfloat16 terms.

    An instruction takes 16 of the depth: it adds their products, exact, to its accumulator and cuts the sum
    to 24 bits. What ``depth`` of the operands leave there is then added in float32.
    """
    high = a.bfloat16()
    middle = (a - high.float()).bfloat16()
    low = (a - high.float() - middle.float()).bfloat16()
    total = torch.zeros(len(a), len(b))
    for start in range(0, a.shape[1], depth):
        accumulator = torch.zeros(len(a), len(b), dtype=torch.float64)
        for term in (low, middle, high):
            for first in range(start, min(start + depth, a.shape[1]), 16):
                k = slice(first, first + 16)
                accumulator = truncated(accumulator + term[:, k].double() @ b[:, k].double().T)
        total += accumulator.float()
    return total


def test_an_accumulator_that_truncates_is_emptied_before_its_error_shows(draw: Draw):
    """At a real hidden size: the kernels' order is float32's accuracy, one accumulator is not."""
    from nabla_fast.triton_kernels.common import presets

    with presets.assumed("sm_90"):
        kernels = ("vocabulary_product", "vocabulary_epilogue", "vocabulary_statistics")
        depths = {presets.config(kernel, "split", torch.device("cpu"))["DEPTH"] for kernel in kernels}
    (depth,) = depths
    a, b = draw.normal(8, 3584), draw.normal(256, 3584, dtype=BF16)
    exact = a.double() @ b.double().T
    largest = exact.abs().amax(dim=1)

    def error(product: torch.Tensor) -> float:
        return float(((product.double() - exact).abs().amax(dim=1) / largest).max())

    of_torch = error(a @ b.float().T)
    assert error(emulated(a, b, depth)) <= 2 * of_torch + 2e-7
    assert error(emulated(a, b, 3584)) > 4 * of_torch + 2e-7
