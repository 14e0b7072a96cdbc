"""LanguageModel and RewardModel against transformers' own forwards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    VOCABULARY,
    causal_lm,
    reward_model,
    shared_lm,
    shared_reward_model,
)
from transformers import DynamicCache

from nabla_fast import ModelError, VocabularyAlignment
from nabla_fast.checkpoints import load_language_model
from nabla_fast.models import LanguageModel, RewardModel

LMS = ["qwen2", "qwen2_tied", "llama", "qwen3", "mistral", "gpt2", "gemma3"]
REWARD_MODELS = [kind for kind, (_, _, classifier, _) in ARCHITECTURES.items() if classifier]
SEQUENCES = [[5, 9, 3, 14, 20, 7, 7, 11], [4], [3, 0, 2, 0], [22, 21, 20, 19, 18, 17, 16, 15, 0]]


def own_reward(model, ids: list[int]) -> float:
    batch = torch.tensor([ids])
    with torch.no_grad():
        return model(batch, attention_mask=torch.ones_like(batch)).logits.item()


@pytest.mark.parametrize("kind", REWARD_MODELS)
def test_rewards_of_ragged_batches(kind):
    model = shared_reward_model(kind)
    rm = RewardModel(model, VocabularyAlignment.identity())
    expected = torch.tensor([own_reward(model, ids) for ids in SEQUENCES], dtype=torch.float64)
    torch.testing.assert_close(rm.score(SEQUENCES), expected, atol=1e-10, rtol=1e-10)
    for ids, reward in zip(SEQUENCES, expected, strict=True):
        embeddings = rm.embed(ids)[None]
        torch.testing.assert_close(rm.score_embeddings(embeddings), reward[None], atol=1e-10, rtol=1e-10)


def test_the_last_token_is_scored_whether_it_pads_or_not():
    """A pad token that is also the EOS ends a response like any other token."""
    model, padless = reward_model("qwen2"), shared_reward_model("qwen2")
    model.config.pad_token_id = 0
    rm = RewardModel(model, VocabularyAlignment.identity())
    for ids in SEQUENCES:
        assert float(rm.score([ids])) == pytest.approx(own_reward(padless, ids), abs=1e-10)


@pytest.mark.parametrize("kind", LMS)
def test_logits_are_the_models_own(kind):
    model = shared_lm(kind)
    lm, ids = LanguageModel(model), torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        expected = model(ids).logits[0]
        torch.testing.assert_close(lm.logits(lm.hidden(ids)[0]), expected)
        torch.testing.assert_close(lm.logits(lm.hidden(embeddings=lm.table[ids])[0]), expected)
        cache = DynamicCache(config=model.config)
        parts = [lm.hidden(part, cache=cache)[0] for part in ids.split([3, 1, 4], dim=1)]
    torch.testing.assert_close(lm.logits(torch.cat(parts)), expected)
    assert lm.table.shape == lm.head.weight.shape == (VOCABULARY, 16)
    assert (lm.vocabulary, lm.context) == (VOCABULARY, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_float32(dtype):
    lm = LanguageModel(causal_lm("qwen2", dtype=dtype))
    hidden = torch.randn(40, 16, dtype=dtype)
    logits = lm.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ lm.head.weight.float().T)
    assert not torch.equal(logits, logits.to(dtype).float())


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [(0, 7, {7}), ([0, 5], None, {0, 5}), (3, [4, 9], {4, 9}), (None, None, set())],
)
def test_eos_ids(in_config, in_generation, expected):
    """As of ``generate``: the generation config's, else the model's."""
    model = causal_lm("qwen2", eos_token_id=in_config)
    model.generation_config.eos_token_id = in_generation
    assert LanguageModel(model).eos_ids == expected


def test_plain_tables_are_views():
    lm = shared_lm("qwen2")
    assert LanguageModel(lm).table.data_ptr() == lm.get_input_embeddings().weight.data_ptr()
    assert LanguageModel(lm).head.weight.data_ptr() == lm.lm_head.weight.data_ptr()


def test_a_tied_reward_checkpoint_is_no_language_model(tmp_path):
    reward_model("qwen2_tied", dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not a language model: the checkpoint has score\.weight"):
        load_language_model(tmp_path)
