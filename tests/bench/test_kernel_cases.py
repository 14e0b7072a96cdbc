"""What the kernel benchmark compares is the same computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nabla_fast.bench import kernel_cases as k
from nabla_fast.bench.kernel_cases.case import Case, Versions
from nabla_fast.bench.kernels import check

CPU = torch.device("cpu")
FORMS = [{"hard": hard, "backward": backward} for hard in (False, True) for backward in (False, True)]


def small_cases(dtype: torch.dtype) -> list[Case]:
    """Every kind of case, at sizes that no loop's block divides."""
    return [
        k.token_stats(3, 257, dtype, CPU),
        k.token_stats_of_hidden(3, 257, 9, dtype, CPU),
        *(
            k.embedding_mix(3, 257, widths, dtype, CPU, **form)
            for form in FORMS
            for widths in ([9], [9, 6])
        ),
        *(k.linear_embedding_mix(3, 257, 9, dtype, CPU, **form) for form in FORMS),
        *(k.onehot_grad(n, 257, 9, [9, 6], dtype, CPU) for n in (1, 3)),
        k.onehot_grad_norm(3, 257, 9, [9, 6], dtype, CPU),
        k.dto_descent_latents(3, 257, 9, 6, dtype, CPU),
        *(k.lm_logits(n, 20001, 5, dtype, CPU) for n in (1, 3)),
        k.nll_grad(3, 20001, 5, dtype, CPU),
        k.prefix_attention(2, 21, 5, 4, 2, 16, dtype, backward=True, device=CPU),
    ]


FLOAT32_ONLY = [
    k.dto_descent(3, 257, 6, CPU),
    # Rows one at a time.
    k.dto_descent(3, 150_001, 2, CPU),
    k.token_stats(3, 150_001, torch.float32, CPU),
    k.prefix_attention(2, 20, 1, 4, 2, 16, backward=False, device=CPU),
    k.prefix_attention(2, 30, 5, 4, 2, 16, backward=False, device=CPU),
    k.prefix_attention(1, 32, 1, 4, 2, 16, backward=True, device=CPU),
]


def named(cases: list[Case]) -> list:
    return [pytest.param(case, id=f"{case.op} {case.shape} {case.dtype}") for case in cases]


@pytest.mark.parametrize("case", named(small_cases(torch.float32) + FLOAT32_ONLY))
def test_every_version_computes_the_same(case: Case):
    versions = case.prepare()
    assert_same(versions, 1e-4)
    if versions.checked:
        assert_same(versions.checked, 1e-4)
    assert case.bytes > 0


@pytest.mark.parametrize("case", named(small_cases(torch.bfloat16)))
def test_with_bf16_tables_too(case: Case):
    # Mixes and attention have their operands' dtype: results and probabilities are rounded to it.
    rounded = case.op.startswith(("embedding_mix", "linear_embedding_mix", "prefix_attention"))
    assert_same(case.prepare(), 2e-2 if rounded else 1e-4)


def assert_same(versions: Versions, tolerance: float) -> None:
    truth = versions.in_float64()
    for name in ("ours", "naive", "eager"):
        versions.reset()
        outputs = getattr(versions, name)()
        assert len(outputs) == len(truth)
        for output, exact in zip(outputs, truth, strict=True):
            assert not output.requires_grad
            assert output.shape == exact.shape
            torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", named(small_cases(torch.float32) + FLOAT32_ONLY))
def test_the_benchmarks_own_check_passes(case: Case):
    assert check(case.prepare())["check"] == "passed"


def test_the_check_sees_one_wrong_element():
    versions = k.lm_logits(3, 257, 9, torch.float32, CPU).prepare()

    def wrong() -> list[torch.Tensor]:
        (logits,) = versions.naive()
        logits[1, 200] += 1e-3 * logits[1].abs().max()
        return [logits]

    result = check(replace(versions, ours=wrong))
    assert result["check"] == "failed"
    assert result["max_error"] == pytest.approx(1e-3, rel=1e-2)


DESCENTS = [k.dto_descent(2, 257, 3, CPU), k.dto_descent_latents(2, 257, 9, 3, torch.float32, CPU)]


@pytest.mark.parametrize("case", named(DESCENTS))
def test_runs_of_a_descent_start_from_the_same_place(case: Case):
    versions = case.prepare()
    versions.reset()
    (first,) = (output.clone() for output in versions.ours())
    versions.reset()
    (again,) = versions.ours()
    assert torch.equal(first, again)
    assert versions.in_place


def test_latents_are_checked_over_fewer_steps():
    versions = k.dto_descent_latents(2, 257, 9, 20, torch.float32, CPU).prepare()
    assert check(versions)["checked"] == versions.checked_as == "K=4"
    assert not torch.equal(versions.in_float64()[0], versions.checked.in_float64()[0])


def test_a_descent_whose_token_moves_is_no_case():
    versions = k.dto_descent_latents(2, 257, 9, 400, torch.float32, CPU).prepare()
    with pytest.raises(RuntimeError, match="a hard token moved"):
        versions.in_float64()
