"""Rewards that cannot be right are refused by name, in one line, before anything is decoded."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bad_input import refused
from test_rewards import TOKENIZER, Energy, length_and_sum, several_labels, token_classifier
from tiny_models import VOCABULARY, shared_lm, shared_reward_model
from torch import nn

from nabla_fast import (
    ClassifierReward,
    DecodingFailed,
    DTOConfig,
    FunctionReward,
    InputError,
    ModelError,
    NablaDecoder,
    ProcessReward,
    RewardEnsemble,
    VocabularyAlignment,
)

CONFIG = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=4)


def decoder(reward: Any, tokenizer: Any = TOKENIZER, **options) -> NablaDecoder:
    return NablaDecoder(shared_lm("qwen2"), reward, tokenizer, **{"config": CONFIG, **options})


# -- labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_several_labels_and_no_choice(wrapped):
    model = several_labels()
    parts = "3 labels (helpful, safe, brief)", "label=…", "weights=…", "ClassifierReward"
    with refused(ModelError, "Qwen2ForSequenceClassification", *parts):
        decoder(ClassifierReward(model) if wrapped else model)


def test_one_label_needs_no_choice():
    plain = decoder(shared_reward_model("qwen2")).generate([[5, 9]], max_new_tokens=6)
    wrapped = decoder(ClassifierReward(shared_reward_model("qwen2"))).generate([[5, 9]], max_new_tokens=6)
    assert (wrapped[0].token_ids, wrapped[0].reward) == (plain[0].token_ids, plain[0].reward)


@pytest.mark.parametrize("label", [3, -1, "kind"])
def test_a_label_that_is_not_there(label):
    with refused(InputError, f"label {label!r}", "Qwen2ForSequenceClassification", "helpful, safe, brief"):
        decoder(ClassifierReward(several_labels(), label))


def test_weights_of_another_length():
    with refused(InputError, "one number a label, 3", "helpful, safe, brief", "got 2"):
        decoder(ClassifierReward(several_labels(), weights=[1.0, 2.0]))
    with refused(InputError, "label 'kind'", "helpful, safe, brief"):
        decoder(ClassifierReward(several_labels(), weights={"kind": 1.0}))


@pytest.mark.parametrize(
    ("choice", "part"),
    [
        ({"label": 1, "weights": [1.0, 0.0, 0.0]}, "label and weights exclude each other"),
        ({"label": 1.5}, "label must be the index or the name of a label, got 1.5"),
        ({"label": True}, "got True"),
        ({"weights": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"weights": [1.0, math.nan, 0.0]}, "finite numbers"),
        ({"weights": 2.0}, "weights must be a number a label, got float"),
        ({"probability": 1}, "probability must be True or False, got 1"),
    ],
)
def test_choices_that_are_none(choice, part):
    for make in (lambda: ClassifierReward(several_labels(), **choice),
                 lambda: ProcessReward(token_classifier(), 5, **choice)):  # fmt: skip
        with refused(InputError, part):
            make()


def test_the_probability_of_one_label():
    with refused(InputError, "probability needs several labels", "Qwen2ForSequenceClassification"):
        decoder(ClassifierReward(shared_reward_model("qwen2"), probability=True))


# -- process rewards ---------------------------------------------------------------------------------


def test_a_token_classifier_alone():
    with refused(ModelError, "Qwen2ForTokenClassification scores every token", "ProcessReward"):
        decoder(token_classifier())


def test_a_sequence_classifier_as_a_process_reward():
    with refused(ModelError, "Qwen2ForSequenceClassification", "tokens", "AutoModelForTokenClassification"):
        decoder(ProcessReward(several_labels(), 5, label=0))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"separator": ""}, "separator must be a token id or a text that is not empty"),
        ({"separator": 1.5}, "got 1.5"),
        ({"separator": 5, "reduce": "max"}, "reduce must be 'min', 'mean' or 'last', got 'max'"),
        ({"separator": 24, "label": 0}, "separator 24 is outside the reward model's vocabulary of 24"),
        ({"separator": "z", "label": 0}, "the reward tokenizer has no tokens for the separator 'z'"),
        ({"separator": 5}, "2 labels (LABEL_0, LABEL_1)"),
        ({"separator": 5}, "label=… or weights=… of ProcessReward"),
    ],
)
def test_process_rewards_that_are_none(arguments, part):
    with pytest.raises((InputError, ModelError)) as caught:
        decoder(ProcessReward(token_classifier(), **arguments))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_separator_that_is_text_needs_a_tokenizer():
    with refused(InputError, "separator 'c' is text: pass a tokenizer"):
        decoder(ProcessReward(token_classifier(), "c", label=0), tokenizer=None)


# -- rewards of one's own ----------------------------------------------------------------------------


def own(table: Any = None, score: Any = None, **attributes: Any) -> Any:
    table = torch.randn(VOCABULARY, 3) if table is None else table
    score = (lambda embeddings, response: embeddings[response].tanh().sum()) if score is None else score
    return SimpleNamespace(table=table, score=score, **attributes)


@pytest.mark.parametrize(
    ("table", "part"),
    [
        (torch.randn(VOCABULARY - 1, 3), "table has 23 rows, the LM 24 tokens"),
        (torch.ones(VOCABULARY, 3, dtype=torch.int64), "floating-point tensor [V, H]"),
        (torch.randn(VOCABULARY), "got torch.float32 [24]"),
        ([[1.0]] * VOCABULARY, "got list"),
    ],
)
def test_tables_that_are_none(table, part):
    with refused(InputError, "table", part):
        decoder(own(table))


@pytest.mark.parametrize(
    ("score", "part"),
    [
        (lambda embeddings, response: 1.0, "must return a tensor of one floating-point number, got float"),
        (lambda embeddings, response: embeddings[response], "got torch.float32 [5, 3]"),
        (lambda embeddings, response: embeddings.sum() / 0, "not finite"),
        (lambda embeddings, response: embeddings.detach().sum(), "gives no gradient"),
        (lambda embeddings, response: embeddings.detach().sum(), "FunctionReward"),
        (lambda embeddings, response: embeddings @ torch.ones(7), "score fails (RuntimeError"),
        (lambda embeddings: embeddings.sum(), "score fails (TypeError"),
    ],
)
def test_scores_that_are_none(score, part):
    with pytest.raises(ModelError) as caught:
        decoder(own(score=score))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


class Cut(torch.autograd.Function):
    """A layer whose backward leaves half of the slope out."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def test_a_gradient_that_is_not_the_slope():
    with refused(ModelError, "SimpleNamespace", "not its slope"):
        decoder(own(score=lambda embeddings, response: Cut.apply(embeddings).tanh().sum()))


def test_a_score_need_not_have_a_gradient_where_none_is_taken():
    reward = own(score=lambda embeddings, response: embeddings.detach().sum())
    config = DTOConfig(reward_coeff=0.0, confidence_threshold=None)
    assert decoder(reward, config=config).generate([[5]], max_new_tokens=4)[0].reward is not None


def test_a_reward_of_another_vocabulary():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    alignment = VocabularyAlignment(torch.arange(VOCABULARY).flip(0) + 6)
    mapped = own(table, alignment=alignment)
    direct = own(table[alignment.token_map])
    results = [decoder(r).generate([[5, 9, 3]], max_new_tokens=6)[0] for r in (mapped, direct)]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].revisions == results[1].revisions
    with refused(InputError, "SimpleNamespace.table has 30 rows"):
        decoder(own(table))


class Learned(nn.Module):
    """A module that behaves otherwise in training mode."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, 3, _weight=torch.randn(VOCABULARY, 3, generator=generator))
        self.drop = nn.Dropout(0.5)

    @property
    def table(self):
        return self.embed.weight

    def score(self, embeddings, response):
        return self.drop(embeddings[response]).tanh().sum()


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_modules_are_frozen_and_followed(loop):
    module = Learned().train()
    decoding = decoder(module, loop=loop)
    before = decoding.generate([[5, 9, 3]], max_new_tokens=6)[0]
    again = decoding.generate([[5, 9, 3]], max_new_tokens=6)[0]
    assert (again.token_ids, again.reward) == (before.token_ids, before.reward)
    assert module.training
    assert module.embed.weight.requires_grad
    assert module.embed.weight.grad is None
    with torch.no_grad():
        module.embed.weight.mul_(-1)
    after = decoding.generate([[5, 9, 3]], max_new_tokens=6)[0]
    fresh = decoder(module, loop=loop).generate([[5, 9, 3]], max_new_tokens=6)[0]
    assert (after.token_ids, after.reward, after.revisions) == (
        fresh.token_ids,
        fresh.reward,
        fresh.revisions,
    )
    assert after.reward != before.reward


# -- functions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_a_function_is_warned_of_once(loop):
    reward = FunctionReward(length_and_sum, reads="tokens")
    with pytest.warns(UserWarning, match=r"FunctionReward\(length_and_sum\) has no gradient") as caught:
        decoding = decoder(reward, loop=loop)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (result,) = decoding.generate([[5, 9, 3]], max_new_tokens=6)
    assert result.revisions
    assert result.stats.token_passes["rm"] == 0
    assert "by calling it with tokens, without a gradient" in decoding.describe()["reward_model"]


@pytest.mark.filterwarnings("ignore:FunctionReward")
def test_without_a_gradient_only_the_likelihood_is_descended():
    """Each redraw is that of a decode without a reward, as long as the trajectory is the same."""
    config = DTOConfig(iters=3, lr=1.0, nll_coeff=0.5, confidence_threshold=None, max_generations=2)
    never = FunctionReward(lambda prompt, response: 0.0, reads="tokens")
    (judged,) = decoder(never, config=config).generate([[5, 9, 3]], max_new_tokens=6)
    (free,) = decoder(None, config=config).generate([[5, 9, 3]], max_new_tokens=6)
    (ours,), (theirs,) = judged.revisions, free.revisions
    assert (ours.position, ours.old_token, ours.new_token) == (
        theirs.position, theirs.old_token, theirs.new_token,
    )  # fmt: skip
    assert theirs.accepted
    assert not ours.accepted


def test_a_function_alone_without_likelihood():
    config = DTOConfig(nll_coeff=0.0)
    with refused(InputError, "FunctionReward(length_and_sum) has no gradient", "nll_coeff"):
        decoder(FunctionReward(length_and_sum, reads="tokens"), config=config)


def test_functions_that_are_none():
    with refused(InputError, "function must be callable, got int"):
        FunctionReward(3)
    with refused(InputError, "reads must be 'text' or 'tokens', got 'ids'"):
        FunctionReward(length_and_sum, reads="ids")
    with refused(InputError, "FunctionReward(length_and_sum) reads text: pass a tokenizer"):
        decoder(FunctionReward(length_and_sum), tokenizer=None)
    with refused(InputError, "reward_model must be", "got function", "wrap a function in FunctionReward"):
        decoder(length_and_sum)


@pytest.mark.filterwarnings("ignore:FunctionReward")
@pytest.mark.parametrize("loop", ["sequential", "batched"])
@pytest.mark.parametrize(
    ("value", "part"),
    [("much", "must return a number, got str"), (math.nan, "as nan"), (None, "got NoneType")],
)
def test_a_function_that_returns_no_number_names_its_prompt(value, part, loop):
    def wrong(prompt, response):
        return value if prompt[0] == 7 else 1.0

    decoding = decoder(FunctionReward(wrong, reads="tokens"), loop=loop)
    good, bad = decoding.generate([[5, 9], [7, 4]], max_new_tokens=4, on_error="keep")
    assert good.error is None
    assert part in str(bad.error)
    with pytest.raises(DecodingFailed, match="prompt 1"):
        decoding.generate([[5, 9], [7, 4]], max_new_tokens=4)


# -- ensembles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "weights", "part"),
    [
        ([], None, "members must be a list of at least one reward"),
        (Energy(), None, "members must be a list of at least one reward"),
        ([Energy()], [1.0, 2.0], "weights must be a list of 1 numbers, one a member"),
        ([Energy()], 1.0, "got 1.0"),
        ([Energy()], [0.0], "weights must be finite numbers other than 0, got 0.0"),
        ([Energy()], [math.inf], "got inf"),
    ],
)
def test_ensembles_that_are_none(members, weights, part):
    with refused(InputError, part):
        RewardEnsemble(members, weights)


def test_a_member_that_is_none():
    with refused(InputError, "reward_model must be a transformers model", "got str"):
        decoder(RewardEnsemble([Energy(), "rm"]))


def test_contexts_of_an_ensemble_are_one_a_member():
    decoding = decoder(RewardEnsemble([Energy(), shared_reward_model("qwen2")]))
    with refused(InputError, "prompt 0: its reward_context must have a pair", "2 rewards"):
        decoding.generate([[5, 9]], reward_context=[([3], [4], [5])])
    with refused(InputError, "prompt 0: its reward_context must be a pair of lists"):
        decoding.generate([[5, 9]], reward_context=[[([3], []), [4]]])
    by_hand = decoding.generate([[5, 9]], reward_context=[[None, None]], max_new_tokens=4)
    assert by_hand[0].reward == decoding.generate([[5, 9]], max_new_tokens=4)[0].reward


def test_the_room_is_that_of_the_shortest_context():
    short = shared_reward_model("gpt2", n_positions=8)
    decoding = decoder(RewardEnsemble([Energy(), short]), tokenizer=None)
    (result,) = decoding.generate([[5, 9]], max_new_tokens=30)
    assert len(result.token_ids) <= 6


def test_an_ensemble_of_one_is_that_one():
    rm = shared_reward_model("qwen2")
    alone, summed, doubled = (
        decoder(reward).generate([[5, 9, 3]], max_new_tokens=8)[0]
        for reward in (rm, RewardEnsemble([rm]), RewardEnsemble([rm, rm], [0.5, 0.5]))
    )
    assert (alone.token_ids, alone.reward) == (summed.token_ids, summed.reward)
    assert alone.token_ids == doubled.token_ids
    assert doubled.reward == pytest.approx(alone.reward, abs=1e-12)
    names = decoder(RewardEnsemble([rm, Energy()])).describe()["reward_model"]
    assert names.startswith("Qwen2ForSequenceClassification, read behind paged keys and values")
    assert "; Energy, read anew with each pass, by its own score()" in names
