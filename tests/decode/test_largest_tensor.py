"""With update="first" nothing of the batched loop is as large as the logits of a trajectory."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from nabla_fast.bench.decode_cases import random_problem
from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.batched.accelerations import Accelerations
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.models import LanguageModel, RewardModel, VocabularyAlignment
from nabla_fast.results import Stats

V, L = 151_936, 128


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, RewardModel]:
    """Two layers of 16 channels under a real vocabulary."""
    shape = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(Qwen2Config(**shape)).eval().requires_grad_(False)
    rm = Qwen2ForSequenceClassification(Qwen2Config(**shape, num_labels=1)).eval().requires_grad_(False)
    return LanguageModel(lm), RewardModel(rm, VocabularyAlignment.identity())


def largest_allocation(models, config: DTOConfig, accelerations: Accelerations | None = None) -> int:
    """Bytes that a single operation allocates at most, its backends' own tensors included."""
    loop = BatchedLoop(*models, config, accelerations=accelerations)
    stats = [Stats()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        ((_, decoded),) = loop.decode([random_problem(L)], stats)
    assert len(decoded.tokens) == L
    assert stats[0].gradient_passes > 0
    return max(event.nbytes() for event in profiled.profiler.kineto_results.events())


CONFIGS = {
    "default": DTOConfig(max_generations=3),
    "gradient threshold": DTOConfig(max_generations=3, grad_threshold=1e-4),
    "latents": DTOConfig(max_generations=2, parameter="latents"),
    "gumbel": DTOConfig(max_generations=2, relaxation="gumbel"),
    "greedy": DTOConfig(max_generations=3, rollout_sampling=SamplingConfig(temperature=0.0)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tensor_holds_a_row_of_logits_a_position(models, name: str):
    assert largest_allocation(models, CONFIGS[name]) < L * V * 4 // 2


def test_the_measurement_sees_such_a_tensor(models):
    whole = Accelerations(small_gradients=False)
    assert largest_allocation(models, CONFIGS["default"], whole) >= L * V * 4
