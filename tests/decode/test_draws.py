"""Draws by Philox noise: where they are taken, and the same tokens by every backend."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_batched_loop import problems
from test_decoder import make_case
from tiny_models import causal_lm, reward_model

from nabla_fast import DTOConfig, InputError, VocabularyAlignment
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.draws import PhiloxDraws, TorchDraws, draws_of
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.ops import backend_status, use_backend
from nabla_fast.ops.registry import all_ops
from nabla_fast.results import Stats

# Ops that each decode needs, whatever its settings.
DECODE_KERNELS = (
    "draw_tokens",
    "lm_logits",
    "prefix_attention",
    "prefix_attention_backward",
    "token_stats",
)


@pytest.mark.parametrize(
    ("draws", "device", "kind"),
    [
        ("auto", "cpu", TorchDraws),
        ("auto", "cuda", PhiloxDraws),
        ("torch", "cuda", TorchDraws),
        ("philox", "cpu", PhiloxDraws),
    ],
)
def test_where_draws_come_from(draws: str, device: str, kind: type):
    assert isinstance(draws_of(DTOConfig(draws=draws), torch.device(device)), kind)


def test_another_name_is_refused():
    with pytest.raises(InputError, match="draws must be one of 'auto', 'torch', 'philox', got 'numpy'"):
        DTOConfig(draws="numpy")


def decoded(
    n: int, loop: type, count: int, dtype: torch.dtype = torch.float32, **changes: object
) -> list[list[int]]:
    """The tokens of random problems like case n, by models whose weights are float32 numbers."""
    case = make_case(n)
    lm = causal_lm("llama", dtype=torch.float32, eos_token_id=case.eos or None).to(dtype)
    rm = reward_model("llama", dtype=torch.float32).to(dtype)
    given = problems(case, random.Random(n), count)
    config = replace(case.config, draws="philox", rejection=True, **changes)
    models = LanguageModel(lm), RewardModel(rm, VocabularyAlignment.identity())
    found = dict(loop(*models, config).decode(given, [Stats() for _ in given]))
    return [found[index].tokens for index in range(count)]


def counted_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op runs its kernel of the CPU from here on."""
    calls: Counter[str] = Counter()
    for name, op in all_ops().items():
        backend = op._backends.get("cpu")
        if backend is None:
            continue

        def counted(*args: object, name: str = name, run: Callable = backend.run, **options: object):
            calls[name] += 1
            return run(*args, **options)

        monkeypatch.setitem(op._backends, "cpu", replace(backend, run=counted))
    return calls


def problems_that_differ(cases: range) -> int:
    """Of three problems a case, those that torch and the kernels of the CPU decode unlike, by either loop.

    Raises AssertionError for one whose tokens in float64 are those of neither: then no rounding
    of a near tie explains it."""
    differ = 0
    for n in cases:
        with use_backend("torch"):
            expected = decoded(n, SequentialLoop, 3)
        for loop in (SequentialLoop, BatchedLoop):
            found = decoded(n, loop, 3)
            if found == expected:
                continue
            with use_backend("torch"):
                exact = decoded(n, SequentialLoop, 3, torch.float64)
            for ours, theirs, right in zip(found, expected, exact, strict=True):
                differ += ours != theirs
                assert ours == theirs or right in (ours, theirs)
    return differ


def test_the_same_tokens_by_torch_and_by_the_cpu_kernels(monkeypatch: pytest.MonkeyPatch):
    calls = counted_cpu_kernels(monkeypatch)
    assert problems_that_differ(range(6)) == 0
    assert min(calls[name] for name in DECODE_KERNELS) > 0, calls


@pytest.mark.slow
def test_the_same_tokens_of_200_problems(monkeypatch: pytest.MonkeyPatch):
    calls = counted_cpu_kernels(monkeypatch)
    assert problems_that_differ(range(6, 73)) <= 2  # none was seen; near ties may come with a machine
    assert min(calls[name] for name in DECODE_KERNELS) > 100, calls


@pytest.mark.skipif(bool(backend_status()["triton"]), reason="needs Triton or its interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the models are on the CPU")
def test_the_same_tokens_by_interpreted_kernels(monkeypatch: pytest.MonkeyPatch):
    from nabla_fast.triton_kernels import draw_tokens, dto_descent, prefix_attention, token_stats

    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable) -> Callable:
        def wrapped(*arguments, **options):
            calls[name] += 1
            return kernel(*arguments, **options)

        return wrapped

    for module in (draw_tokens, dto_descent, prefix_attention, token_stats):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    small = {"parameter": "logits", "relaxation": "straight_through", "max_generations": 2, "iters": 2}
    small |= {"confidence_threshold": None, "entropy_threshold": None, "grad_threshold": None}
    with use_backend("torch"):
        expected = decoded(3, SequentialLoop, 1, **small)
    with use_backend("triton", "torch"):
        found = decoded(3, BatchedLoop, 1, **small)
    assert found == expected
    for name in ("draw_tokens", "dto_descent", "prefix_attention", "token_stats"):
        assert calls[name] > 0, name
