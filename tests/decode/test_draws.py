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
from nabla_fast.results import Stats


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


def decoded(n: int, loop: type, count: int, **changes: object) -> list[list[int]]:
    """The tokens of random problems like case n, in float32."""
    case = make_case(n)
    lm = LanguageModel(causal_lm("llama", dtype=torch.float32, eos_token_id=case.eos or None))
    rm = RewardModel(reward_model("llama", dtype=torch.float32), VocabularyAlignment.identity())
    given = problems(case, random.Random(n), count)
    config = replace(case.config, draws="philox", rejection=True, **changes)
    found = dict(loop(lm, rm, config).decode(given, [Stats() for _ in given]))
    return [found[index].tokens for index in range(count)]


def test_the_same_tokens_by_torch_and_by_the_cpu_kernels():
    differ = 0
    for n in range(6):
        with use_backend("torch"):
            expected = decoded(n, SequentialLoop, 3)
        for loop in (SequentialLoop, BatchedLoop):
            differ += expected != decoded(n, loop, 3)
    assert differ == 0


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
