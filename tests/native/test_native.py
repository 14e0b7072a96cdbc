"""The C++ kernels: accuracy against float64, bitwise independence of batch and threads, odd inputs."""

import ctypes
import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import nabla_fast
from nabla_fast import _native
from nabla_fast.ops.token_stats import token_stats_native

if not _native.available():
    if os.environ.get("NABLA_FAST_REQUIRE_NATIVE") == "1":
        pytest.fail(f"NABLA_FAST_REQUIRE_NATIVE=1, but {_native.why_missing()}", pytrace=False)
    pytest.skip(_native.why_missing(), allow_module_level=True)

INF = float("inf")
ULP = 2.0**-23
# More tokens than the kernel has segments to share out at once (64 of 16,384).
MANY_SEGMENTS = 64 * 16384 + 5


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (floats) and the largest number (integers): nothing may be left unwritten."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_native.ISA_NAMES)
def isa(request):
    """Runs the test with each instruction set that this CPU has."""
    native = _native.extension()
    best = native.cpu_isa()
    level = _native.ISA_NAMES.index(request.param)
    if level > best:
        pytest.skip(f"this CPU has no {request.param}")
    assert native.limit_cpu_isa(level) == 0
    assert _native.cpu_isa() == request.param
    yield request.param
    native.limit_cpu_isa(best)


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_stats(logits: torch.Tensor, tau: float = 1.0) -> list[torch.Tensor]:
    """logsumexp, confidence, entropy, argmax and status of the rows of logits [N, V]."""
    values, status = token_stats_native(logits, None, tau)
    return [*values, status]


def reference(logits: torch.Tensor, tau: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """logsumexp, confidence and entropy of the rows of logits [N, V], in plain PyTorch in `dtype`."""
    z = logits.to(dtype) / tau
    logp = torch.log_softmax(z, dim=-1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0).sum(-1)
    return [torch.logsumexp(z, dim=-1), logp.amax(-1).exp(), entropy]


def check_accuracy(logits: torch.Tensor, tau: float) -> None:
    """|ours - float64| <= 2 |torch in float32 - float64| + one ulp, for every row and every statistic."""
    *ours, argmax, status = token_stats(logits, tau)
    exact = reference(logits, tau, torch.float64)
    same_dtype = reference(logits, tau, torch.float32)
    assert (status == 0).all()
    assert torch.equal(logits.gather(1, argmax[:, None])[:, 0], logits.amax(-1))
    # One ulp of what logsumexp is the sum of; of a probability and an entropy themselves. In float64
    # the reference too loses an entropy below 1e-14.
    largest = (logits.double().amax(-1) / tau).abs()
    scales = [torch.maximum(exact[0].abs(), largest), exact[1], exact[2]]
    for name, mine, theirs, truth, scale in zip(
        ("logsumexp", "confidence", "entropy"), ours, same_dtype, exact, scales, strict=True
    ):
        error = (mine.double() - truth).abs()
        allowed = 2 * (theirs.double() - truth).abs() + ULP * scale + 1e-14
        row = int((error - allowed).argmax())
        assert (error <= allowed).all(), (
            f"{name} of row {row}: {float(mine[row])}, float64 {float(truth[row])}, "
            f"error {float(error[row])}, allowed {float(allowed[row])}"
        )


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(1, 1), (3, 2), (130, 7), (64, 127), (5, 1024), (130, 1025), (64, 2047), (7, 16385), (3, 151_936)],
)
def test_accuracy(isa, rows, vocab, dtype):
    for scale in (0.0, 1e-3, 1.0, 10.0, 100.0):
        logits = randn(rows, vocab) * scale + randn(rows, 1, seed=1) * 20
        check_accuracy(logits.to(dtype), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.1, 0.7, 1.3, 10.0])
def test_accuracy_with_tau(isa, tau, dtype):
    check_accuracy((randn(9, 50_257) * 4).to(dtype), tau)


@pytest.mark.parametrize("vocab", [300_001, MANY_SEGMENTS])
def test_accuracy_of_large_vocabularies(vocab):
    check_accuracy(randn(2, vocab) * 3, 0.7)


def test_masked_logits_contribute_nothing(isa):
    logits = randn(40, 5000) * 3
    logits[randn(40, 5000, seed=1) > 0] = -INF
    logits[:, 1024:3000] = -INF
    check_accuracy(logits, 0.7)
    # A row with one token left is certain of it.
    alone = torch.full((1, 5000), -INF)
    alone[0, 3210] = -7.25
    logsumexp, confidence, entropy, argmax, status = token_stats(alone, 0.5)
    results = (float(logsumexp), float(confidence), float(entropy), int(argmax), int(status))
    assert results == (-14.5, 1.0, 0.0, 3210, 0)


def test_peaked_rows_keep_their_entropy(isa):
    """Beside a probability of 1 - 1e-9 float32 sums lose the rest; the entropy must not."""
    logits = torch.zeros(1, 1000)
    logits[0, 77] = 30.0
    rest = 999 * np.exp(-30.0)
    expected = np.log1p(rest) + 30 * rest / (1 + rest)
    entropy = token_stats(logits)[2]
    assert float(entropy) == pytest.approx(expected, rel=2 * ULP)


def test_equal_logits(isa):
    logsumexp, confidence, entropy, argmax, _ = token_stats(torch.full((1, 3000), 2.5))
    assert float(logsumexp) == pytest.approx(2.5 + np.log(3000), rel=ULP)
    assert float(confidence) == pytest.approx(1 / 3000, rel=ULP)
    assert float(entropy) == pytest.approx(np.log(3000), rel=ULP)
    assert int(argmax) == 0


def test_subnormal_logits(isa):
    check_accuracy(randn(4, 3000) * 1e-40, 1.0)
    check_accuracy(randn(4, 3000) * 1e-40, 2.0**-64)


def test_extreme_logits(isa):
    logits = torch.tensor([[3.4e38, -3.4e38, 0.0], [-3.4e38, -3.4e38, -3.4e38]])
    _, confidence, entropy, argmax, status = token_stats(logits)
    assert status.tolist() == [0, 0]
    assert argmax.tolist() == [0, 0]
    assert confidence.tolist() == pytest.approx([1.0, 1 / 3])
    assert entropy.tolist() == pytest.approx([0.0, np.log(3)])


@pytest.mark.parametrize("places", [(5, 6), (1000, 1023), (10, 1024), (1030, 40_000), (0, 49_999)])
def test_argmax_is_the_first_of_equal_logits(isa, places):
    logits = randn(1, 50_000).clamp(max=3.0)
    logits[0, list(places)] = 4.0
    assert int(token_stats(logits)[3]) == min(places)


def test_argmax_takes_both_zeros_for_equal(isa):
    logits = torch.full((1, 2000), -1.0)
    logits[0, 300], logits[0, 1500] = -0.0, 0.0
    assert int(token_stats(logits)[3]) == 300


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_status_names_the_rows_that_have_no_answer(isa, dtype):
    logits = randn(8, 40_000).to(dtype)
    healthy = token_stats(logits)
    logits[1, 39_999] = float("nan")
    logits[2, 0] = INF
    logits[3] = -INF
    logits[4, 20_000], logits[4, 20_001] = INF, -float("nan")
    logits[6, 5] = -float("nan")
    *results, status = token_stats(logits)
    assert status.tolist() == [0, 1, 2, 3, 1, 0, 1, 0]
    bad = status != 0
    for before, after in zip(healthy, results, strict=False):
        assert torch.equal(before[~bad], after[~bad])
    logsumexp, confidence, entropy, argmax = (result[bad] for result in results)
    assert all(statistic.isnan().all() for statistic in (logsumexp, confidence, entropy))
    assert (argmax == -1).all()
    native = _native.extension()
    assert "NaN" in native.status_string(1)
    assert "+inf" in native.status_string(2)
    assert "-inf" in native.status_string(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 300_001), (2, MANY_SEGMENTS), (3, 100_000), (5, 30_000), (130, 999)]
)
def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(isa, threads, rows, vocab, dtype):
    logits = (randn(rows, vocab) * 3).to(dtype)
    threads(1)
    expected = token_stats(logits, 0.7)
    for count in (1, 2, 3):
        threads(count)
        for result, want in zip(token_stats(logits, 0.7), expected, strict=True):
            assert torch.equal(result, want)
        for first, last in [(0, 1), (rows // 2, rows), (rows - 1, rows)]:
            part = token_stats(logits[first:last], 0.7)
            for result, want in zip(part, expected, strict=True):
                assert torch.equal(result, want[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_any_stride_and_alignment(isa, dtype):
    wide = (randn(12, 5003) * 3).to(dtype)
    for view in (wide[:, :5000], wide[::3, 1:4001], wide[1:2].expand(4, -1), wide[:, 2:3]):
        results = token_stats(view, 0.7)
        for result, want in zip(results, token_stats(view.clone(), 0.7), strict=True):
            assert torch.equal(result, want)


def test_calls_from_several_threads(threads):
    logits = randn(16, 20_000)
    expected = token_stats(logits)
    threads(1)
    with ThreadPoolExecutor(3) as pool:
        for results in pool.map(token_stats, [logits] * 12):
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_no_rows():
    results = token_stats(torch.empty(0, 10))
    assert [result.shape for result in results] == [(0,)] * 5


def test_arguments_that_are_refused():
    logits = randn(3, 10)
    for tau in (0.0, -1.0, INF, float("nan")):
        with pytest.raises(ValueError, match="tau"):
            token_stats(logits, tau)
    with pytest.raises(ValueError, match="vocabulary is empty"):
        token_stats(torch.empty(3, 0))
    with pytest.raises(ValueError, match="unit stride"):
        token_stats(logits.t())
    for other in (logits.double(), logits.half()):
        with pytest.raises(TypeError, match="float32 or bfloat16"):
            token_stats(other)


def test_fields_that_are_refused():
    native, logits = _native.extension(), randn(3, 10)
    with pytest.raises(TypeError, match=r"lm_logits\(\) has no argument 'logit'"):
        native.lm_logits(rows=3, logit=logits)
    with pytest.raises(TypeError, match="keyword arguments only"):
        native.lm_logits(3)
    with pytest.raises(TypeError):
        native.lm_logits(rows="3")
    with pytest.raises(TypeError, match="a tuple of 4"):
        native.lm_logits(hidden=(logits.data_ptr(), 10))
    with pytest.raises(OverflowError):
        native.lm_logits(num_threads=2**31)
    with pytest.raises(ValueError, match="one length"):
        native.embedding_mix(tables=[logits, logits], cotangents=[logits])
    with pytest.raises(ValueError, match="null"):
        native.embedding_mix(rows=3, vocab=10, logits=(None, 10, 10, 0), tau=1.0)


def test_exp_is_within_two_ulp(isa):
    special = [-INF, INF, float("nan"), 0.0, -0.0, 1e-45, -1e-45, 88.72, 88.73, -103.9, -104.1, 3e38]
    x = torch.cat([torch.tensor(special), torch.linspace(-110, 95, 4_000_001)])
    y = torch.empty_like(x)
    _native.extension().vec_exp(x.data_ptr(), y.data_ptr(), x.numel())
    exact = x.double().exp()
    with np.errstate(over="ignore"):
        rounded = exact.numpy().astype(np.float32)
    finite = np.isfinite(rounded)
    assert np.array_equal(y.numpy()[~finite], rounded[~finite], equal_nan=True)
    ulp = np.spacing(rounded[finite]).astype(np.float64)
    error = np.abs(y.double().numpy()[finite] - exact.numpy()[finite]) / ulp
    assert error.max() <= 2


def test_a_missing_extension_says_why(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    def broken(name):
        raise ImportError("undefined symbol:\n omp_get_num_threads")

    class Stale:
        abi_version = staticmethod(lambda: 0)

    load = _native.loading._load.__wrapped__
    for behaviour, reason in (
        (missing, "not built: no working C++ compiler was found"),
        (broken, "does not load: undefined symbol: omp_get_num_threads"),
        (lambda name: Stale, "stale: it has ABI version 0"),
    ):
        monkeypatch.setattr(importlib, "import_module", behaviour)
        module, why = load()
        assert module is None
        assert reason in why
        assert "\n" not in why
    monkeypatch.setattr(_native.loading, "_load", lambda: (None, "it is not here"))
    assert not _native.available()
    assert _native.why_missing() == "it is not here"
    with pytest.raises(RuntimeError, match="it is not here"):
        token_stats(torch.zeros(1, 1))


def test_the_c_interface_is_exported():
    library = ctypes.CDLL(_native.extension().__file__)
    assert library.nabla_fast_abi_version() == _native.ABI_VERSION
    library.nabla_fast_status_string.restype = ctypes.c_char_p
    assert library.nabla_fast_status_string(0) == b"ok"


def test_the_header_is_where_the_package_says():
    header = Path(nabla_fast.get_include(), "nabla_fast.h").read_text()
    assert f"#define NABLA_FAST_ABI_VERSION {_native.ABI_VERSION}\n" in header
