"""Passes of half-precision checkpoints on the CPU: float32 arithmetic on the weights as they lie."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from ops.harness import DRAWS, GROSS, poisoned
from torch import Tensor, nn

from nabla_fast import _native
from nabla_fast._native import loading
from nabla_fast.bench.decode_cases import bundled_problems
from nabla_fast.bench.decode_runs import decode
from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model
from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.models import LanguageModel, RewardModel, VocabularyAlignment
from nabla_fast.models.reader import PagedReader
from nabla_fast.models.score_head import head_logits
from nabla_fast.ops import use_backend

pytestmark = pytest.mark.skipif(not _native.available(), reason="no C++ extension")

HALVES = [torch.bfloat16, torch.float16]
# Widths that neither fill blocks of weights nor tiles of columns, but whole vectors.
FIELDS = {"hidden_size": 208, "intermediate_size": 336, "head_dim": 16, "initializer_range": 0.1}
KINDS = {
    "llama": FIELDS | {"attention_bias": True, "num_key_value_heads": 1},
    "mistral": FIELDS,
    "qwen2": FIELDS,
    "qwen3": FIELDS,
}
PREFIX = 7


def model_of(kind: str, dtype: torch.dtype) -> nn.Module:
    return tiny_models.causal_lm(kind, dtype=dtype, **KINDS[kind]).requires_grad_(False)


def read(model: nn.Module, ids: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """States of a suffix behind a prefix of PREFIX tokens, and the gradient of its embeddings."""
    paged = PagedReader(model)
    pool = paged.pool(40, block_size=4)
    sequences = [pool.sequence() for _ in ids]
    suffix = ids.shape[1] - PREFIX
    with poisoned():
        paged.read(sequences, [PREFIX] * len(ids), ids=ids[:, :PREFIX], store=True)
        own = model.get_input_embeddings().weight[ids[:, PREFIX:]].to(paged.dtype).requires_grad_()
        states = paged.read(sequences, [suffix] * len(ids), embeddings=own)
        (gradient,) = torch.autograd.grad(states, own, cotangent.to(states.dtype))
    return states.detach(), gradient


def read_by_modules(model: nn.Module, ids: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The same by transformers' modules in the dtype of the weights."""
    embeddings = model.get_input_embeddings().weight[ids]
    own = embeddings[:, PREFIX:].detach().requires_grad_()
    whole = torch.cat([embeddings[:, :PREFIX], own], dim=1)
    states = model.base_model(inputs_embeds=whole, use_cache=False).last_hidden_state[:, PREFIX:]
    (gradient,) = torch.autograd.grad(states, own, cotangent.to(states.dtype))
    return states.detach(), gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("batch", "suffix"), [(1, 1), (1, 5), (2, 16), (1, 37), (9, 3)])
def test_states_and_gradients_are_as_close_as_float32s(kind, dtype, batch, suffix):
    model = model_of(kind, dtype)
    exact_model, float32_model = copy.deepcopy(model).double(), copy.deepcopy(model).float()
    worst, excess = [0.0, 0.0], 0.0
    for _ in range(DRAWS):
        ids = torch.randint(3, tiny_models.VOCABULARY, (batch, PREFIX + suffix))
        cotangent = torch.randn(batch, suffix, FIELDS["hidden_size"], dtype=torch.float64)
        exact = read_by_modules(exact_model, ids, cotangent)
        ours = read(model, ids, cotangent)
        half = read_by_modules(model, ids, cotangent)
        float32 = read_by_modules(float32_model, ids, cotangent)
        excess = 0.0
        for n, parts in enumerate(zip(exact, ours, half, float32, strict=True)):
            expected, found, by_modules, by_float32 = parts
            assert found.dtype == torch.float32
            largest = expected.abs().amax(dim=-1, keepdim=True)
            error, of_half, of_float32 = (
                float(((x - expected).abs() / largest).amax()) for x in (found, by_modules, by_float32)
            )
            # A hundredth is far less than what the modules round: it is the weights that are rounded.
            assert error <= 0.01 * of_half
            worst[n] = max(worst[n], of_float32)
            excess = max(excess, error / (2 * worst[n] + 1e-6))
        if excess <= 1:
            return
        assert excess <= GROSS
    pytest.fail(f"{excess:.2f} times the bound, and more than it in each of {DRAWS} draws")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("batch", "suffix"), [(1, 1), (3, 2), (17, 1), (2, 21)])
def test_passes_have_the_bits_of_a_float32_copy(isa, kind, dtype, batch, suffix):
    model = model_of(kind, dtype)
    # Down to numbers below 2^-14, which fp16 holds with fewer digits.
    model.base_model.layers[0].mlp.up_proj.weight.mul_(2.0**-12)
    copied = copy.deepcopy(model).float()
    ids = torch.randint(3, tiny_models.VOCABULARY, (batch, PREFIX + suffix))
    cotangent = torch.randn(batch, suffix, FIELDS["hidden_size"])
    flushes = torch.set_flush_denormal(True)
    try:
        found, expected = read(model, ids, cotangent), read(copied, ids, cotangent)
    finally:
        torch.set_flush_denormal(False)
    assert flushes
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", HALVES)
def test_plain_pytorch_says_the_same(dtype):
    model = model_of("qwen3", dtype)
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, PREFIX + 9))
    cotangent = torch.randn(2, 9, FIELDS["hidden_size"])
    found = read(model, ids, cotangent)
    with use_backend("torch"):
        expected = read(model, ids, cotangent)
    for ours, plain in zip(found, expected, strict=True):
        assert plain.dtype == torch.float32
        assert not torch.equal(ours, plain)
        assert (ours - plain).abs().amax() <= 1e-5 * plain.abs().amax()


def test_a_tokens_step_is_the_same_beside_others():
    model = model_of("qwen2", torch.bfloat16)
    paged = PagedReader(model)
    ids = torch.randint(3, tiny_models.VOCABULARY, (11, 1))
    pool = paged.pool(40, block_size=4)
    together = paged.read([pool.sequence() for _ in ids], [1] * 11, ids=ids)
    alone = [paged.read([pool.sequence()], [1], ids=row[None]) for row in ids]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", HALVES)
def test_matrices_are_read_where_they_lie(dtype):
    model = model_of("llama", dtype)
    paged = PagedReader(model)
    matrices = {p.data_ptr() for p in model.base_model.layers.parameters() if p.dim() == 2}
    held = paged.passes._native._weights
    assert matrices == {tensor.data_ptr() for tensor in held if tensor.dim() == 2 and tensor.dtype == dtype}
    assert all(tensor.dim() == 1 for tensor in held if tensor.dtype != dtype)


def test_without_the_extension_everything_has_the_weights_dtype(monkeypatch):
    monkeypatch.setattr(loading, "available", lambda: False)
    paged = PagedReader(model_of("llama", torch.bfloat16))
    assert paged.dtype == paged.pool(1).keys.dtype == torch.bfloat16
    assert paged.capturable


def test_a_model_that_rounding_makes_another_is_read_with_its_modules_rounding():
    # States of bfloat16 modules are 16% off where weights are this large.
    model = tiny_models.causal_lm(
        "llama", dtype=torch.bfloat16, **KINDS["llama"] | {"initializer_range": 0.4}
    )
    model.base_model.layers[0].mlp.up_proj.weight.data.mul_(2.0**-12)
    paged = PagedReader(model.requires_grad_(False))
    assert paged.dtype == torch.bfloat16
    assert "arithmetic" not in paged.way
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 16))
    states = paged.read([paged.pool(40, block_size=4).sequence()], [16], ids=ids)
    whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert (states - whole).norm() <= 0.08 * whole.norm()


def test_a_reader_says_what_arithmetic_it_has():
    half, wide = (PagedReader(model_of("llama", dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert half.way == f"{wide.way} (float32 arithmetic on bfloat16 weights)"
    assert half.dtype == half.pool(1).keys.dtype == torch.float32
    modules = PagedReader(tiny_models.causal_lm("granite", dtype=torch.bfloat16).requires_grad_(False))
    assert modules.dtype == modules.pool(1).keys.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_a_half_precision_score_is_not_rounded(bias):
    head, states = nn.Linear(16, 2, bias=bias).bfloat16(), torch.randn(5, 16)
    expected = copy.deepcopy(head).float()(states)
    assert torch.equal(head_logits(head, states), expected)
    assert head_logits(nn.Sequential(head), states).dtype == torch.bfloat16
    assert torch.equal(head_logits(head, states.bfloat16()), head(states.bfloat16()))


@pytest.mark.parametrize("update", ["first", "all"])
def test_decodes_of_bundled_models_are_those_of_a_float32_copy(update):
    # More prompts: tools.half_precision.
    lm = load_language_model(bundled("lm"), "cpu", "bfloat16").requires_grad_(False)
    rm = load_reward_model(bundled("rm"), "cpu", "bfloat16").requires_grad_(False)
    found = []
    for models in ((lm, rm), (copy.deepcopy(lm).float(), copy.deepcopy(rm).float())):
        language, reward = LanguageModel(models[0]), RewardModel(models[1], VocabularyAlignment.identity())
        config = DTOConfig(update=update, max_generations=4, lr=0.5)
        problems = bundled_problems(language, 6)
        found.append(decode(BatchedLoop(language, reward, config, batch_size=3), problems).tokens)
    assert found[0] == found[1]
    assert len(found[0]) == 6
