"""Rewards with tokenizers, tables and dtypes of their own, and what their passes cost."""

from __future__ import annotations

import doctest
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
from test_rewards import Energy, several_labels, token_classifier
from tiny_models import (
    EOS,
    VOCABULARY,
    causal_lm,
    reward_model,
    shared_lm,
    shared_reward_model,
    word_tokenizer,
)
from torch import nn

from nabla_fast import (
    ClassifierReward,
    DTOConfig,
    FunctionReward,
    NablaDecoder,
    ProcessReward,
    RewardEnsemble,
    VocabularyAlignment,
)
from nabla_fast.models import given_rewards
from nabla_fast.models.process_reward import ProcessRewardModel

CONFIG = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=4)
OURS = word_tokenizer()


def shuffled_tokenizer():
    """The same words under other ids, four more of them, and another chat template."""
    words = [OURS.decode([n]) for n in range(3, VOCABULARY)] + ["w", "x", "y", "z"]
    random.Random(0).shuffle(words)
    template = "{% for m in messages %}{{ 'ca' + m['content'] + 'bb' }}{% endfor %}"
    return word_tokenizer(words, template)


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_each_member_reads_a_chat_by_its_own_tokenizer(loop):
    """A string goes through each member's own chat template, tokens and alignment."""
    other = shuffled_tokenizer()
    wide = several_labels("llama", vocabulary=VOCABULARY + 4)
    alignment = VocabularyAlignment.from_tokenizers(OURS, other)
    energy, plain = Energy(), shared_reward_model("qwen2")
    members = [ClassifierReward(wide, 1, tokenizer=other, alignment=alignment), plain, energy]
    ensemble = RewardEnsemble(members, [1.0, 0.5, 2.0])
    decoder = NablaDecoder(shared_lm("qwen2"), ensemble, OURS, config=CONFIG, loop=loop)
    (result,) = decoder.generate(["abc"], max_new_tokens=8)
    response = result.token_ids + [EOS] * (result.finish_reason == "eos")

    def around(tokenizer, before: str, after: str) -> list[list[int]]:
        return [tokenizer(text, add_special_tokens=False).input_ids for text in (before, after)]

    def score(model, label: int, before: list[int], own: list[int], after: list[int]) -> float:
        ids = torch.tensor([[*before, *own, *after]])
        with torch.no_grad():
            return model(ids, attention_mask=torch.ones_like(ids)).logits[0, label].item()

    before, after = around(other, "caabcbbca", "bb")
    expected = score(wide, 1, before, alignment.token_map[response].tolist(), after)
    before, after = around(OURS, "<bos>abccb", "c")
    expected += 0.5 * score(plain, 0, before, response, after)
    ids = [*before, *response, *after]
    span = slice(len(before), len(before) + len(response))
    expected += 2.0 * float(energy.score(energy.table[ids], span))
    assert result.reward == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
@pytest.mark.parametrize("of_table", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of_lm", [torch.float32, torch.float64])
def test_dtypes_and_widths_of_tables(of_lm, of_table, relaxation):
    """A table of any dtype, of one column too, beside any LM."""
    config = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=4, relaxation=relaxation)
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(VOCABULARY, 1, generator=generator).to(of_table)
    reward = SimpleNamespace(table=table, score=lambda e, response: e[response].tanh().sum())
    lm, tokens = causal_lm("llama", dtype=of_lm), {}
    for loop in ("sequential", "batched"):
        decoder = NablaDecoder(lm, reward, None, config=config, loop=loop)
        (result,) = decoder.generate([[5, 9, 3]], max_new_tokens=8)
        assert result.revisions
        tokens[loop] = result.token_ids
    assert tokens["sequential"] == tokens["batched"]


@pytest.mark.parametrize("kind", ["a label", "steps"])
def test_prompts_are_read_once_behind_a_cache(kind):
    """A long prompt before a short response: the batched loop reads it for the first score alone."""
    made = {
        "a label": lambda: ClassifierReward(several_labels(), 0),
        "steps": lambda: ProcessReward(token_classifier(), 5, label=0),
    }
    prompt, passes = [3 + n % 20 for n in range(48)], {}
    for loop in ("sequential", "batched"):
        decoder = NablaDecoder(shared_lm("qwen2"), made[kind](), None, config=CONFIG, loop=loop)
        (result,) = decoder.generate([prompt], max_new_tokens=6)
        assert result.revisions
        passes[loop] = result.stats.token_passes["rm"]
    assert passes["batched"] < 0.4 * passes["sequential"]


def test_steps_that_are_remembered_are_not_read_again(monkeypatch):
    """The batched loop reads a proposal from its first new step on: the same tokens from fewer passes."""
    config = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=16)
    results = []
    for remembers in (True, False):
        monkeypatch.setattr(ProcessRewardModel, "_looks_back_only", remembers)
        reward = ProcessReward(token_classifier(), "c", "mean", label=0)
        decoder = NablaDecoder(shared_lm("qwen2"), reward, OURS, config=config, loop="batched")
        results += decoder.generate([[5, 9, 3]], max_new_tokens=32)
    ours, theirs = results
    assert ours.token_ids == theirs.token_ids
    assert len(ours.revisions) >= 8
    read = [result.stats.passes_for["score"] for result in results]
    assert read[0] < 0.8 * read[1], read


def test_a_decoder_of_an_ensemble_survives_a_pickle():
    members = [
        ClassifierReward(several_labels(), 0),
        ProcessReward(token_classifier(), 5, label=0),
        Energy(),
    ]
    decoder = NablaDecoder(shared_lm("qwen2"), RewardEnsemble(members), None, config=CONFIG)
    again = pickle.loads(pickle.dumps(decoder))
    results = [each.generate([[5, 9, 3]], max_new_tokens=6)[0] for each in (decoder, again)]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].revisions == results[1].revisions


@pytest.mark.filterwarnings("ignore:FunctionReward")
def test_many_prompts_are_scored_as_they_are_alone():
    members = [ClassifierReward(several_labels(), 0), Energy(), FunctionReward(len_of, reads="tokens")]
    decoder = NablaDecoder(shared_lm("qwen2"), RewardEnsemble(members), None, config=CONFIG)
    prompts = [[5, 9, 3], [7], [11, 20, 6, 4, 4], [3, 8]]
    together = decoder.generate(prompts, max_new_tokens=7, seed=[1, 2, 3, 4])
    for seed, (prompt, result) in enumerate(zip(prompts, together, strict=True), start=1):
        (alone,) = decoder.generate([prompt], max_new_tokens=7, seed=seed)
        assert alone.token_ids == result.token_ids
        assert alone.reward == pytest.approx(result.reward, abs=1e-9)


@pytest.mark.filterwarnings("ignore:FunctionReward")
@pytest.mark.parametrize("differentiable", [True, False])
def test_a_reward_may_call_the_decoders_own_lm(differentiable):
    lm = shared_lm("qwen2")

    def surprise(embeddings, response):
        return torch.logsumexp(lm(inputs_embeds=embeddings[None]).logits[0, response], dim=-1).mean()

    table = lm.get_input_embeddings().weight

    @torch.no_grad()
    def judged(prompt, response):
        embeddings = table[torch.tensor([*prompt, *response])]
        return float(surprise(embeddings, slice(len(prompt), len(prompt) + len(response))))

    own = SimpleNamespace(table=table, score=surprise)
    reward = own if differentiable else FunctionReward(judged, reads="tokens")
    results = []
    for loop in ("sequential", "batched"):
        decoder = NablaDecoder(lm, reward, None, config=CONFIG, loop=loop)
        results += decoder.generate([[5, 9, 3]], max_new_tokens=8)
        assert any(r.accepted for r in results[-1].revisions)
        response = results[-1].token_ids
        if results[-1].finish_reason != "eos":
            assert results[-1].reward == pytest.approx(judged([5, 9, 3], response), abs=1e-9)
    assert results[0].token_ids == results[1].token_ids


class Rounded(nn.Linear):
    """A head whose last digits depend on how many rows it gets, as products' do on other machines."""

    def forward(self, states):
        rows = states.numel() // self.in_features
        return super().forward(states) * (1 + 1e-6 * rows * torch.arange(self.out_features))


def test_labels_that_nearly_cancel_are_no_fault_of_the_model():
    """The difference of two large logits is mostly rounding; the logits themselves agree."""
    model = reward_model("qwen2", dtype=torch.float32, num_labels=2)
    model.score = Rounded(model.config.hidden_size, 2)
    nn.init.constant_(model.score.bias, 1e3)
    reward = ClassifierReward(model, weights=[1.0, -1.0])
    decoder = NablaDecoder(causal_lm("qwen2", dtype=torch.float32), reward, None, config=CONFIG)
    assert "behind paged keys and values" in decoder.describe()["reward_model"]
    assert decoder.generate([[5, 9, 3]], max_new_tokens=6)[0].revisions


def len_of(prompt: list[int], response: list[int]) -> int:
    return len(response)


def test_examples_of_the_docstrings():
    assert doctest.testmod(given_rewards).failed == 0
