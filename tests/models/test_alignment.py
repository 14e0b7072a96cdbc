"""A reward model of another vocabulary, read through the LM's."""

from __future__ import annotations

import random

import pytest
import torch
from naive_loop import NaiveLoop
from tiny_models import BOS, EOS, UNKNOWN, VOCABULARY, reward_model, shared_lm, word_tokenizer
from tokenizers import decoders

from nabla_fast import DTOConfig, InputError, NablaDecoder, SamplingConfig, VocabularyAlignment
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.stop import StopStrings
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.results import Stats

OURS = word_tokenizer()
WORDS = [OURS.decode([n]) for n in range(3, VOCABULARY)]


def theirs(missing: int = 0, extra: int = 7):
    """The same words in another order under other ids, some missing, some more."""
    words = WORDS[missing:] + [f"w{n}" for n in range(extra)]
    random.Random(0).shuffle(words)
    return word_tokenizer(words)


ALIGNMENT = VocabularyAlignment.from_tokenizers(OURS, theirs())
CONTEXT = ([7, 4, 26], [25])  # the reward model's own ids


def wide_reward_model():
    return reward_model("qwen2", vocab_size=VOCABULARY + 7)


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value)


def test_tokens_are_matched_by_spelling_and_role():
    other = theirs()
    assert ALIGNMENT.coverage == 1
    assert ALIGNMENT.token_map.shape == (VOCABULARY,)
    assert ALIGNMENT.token_map[[EOS, BOS, UNKNOWN]].tolist() == [EOS, BOS, UNKNOWN]
    assert ALIGNMENT.token_map.tolist() != list(range(VOCABULARY))
    for n in range(3, VOCABULARY):
        assert other.decode([int(ALIGNMENT.token_map[n])]) == OURS.decode([n])


def test_roles_go_before_spelling():
    other = theirs()
    other.eos_token = "w3"
    alignment = VocabularyAlignment.from_tokenizers(OURS, other)
    assert alignment.token_map[EOS] == other.get_vocab()["w3"] != EOS


def test_other_spellings_of_one_text_are_matched():
    """Here "▁" in a token stands for nothing: two tokens that read alike are a match for neither."""
    words = ["▁" * (n % 3) + word for n, word in enumerate(WORDS)]
    other = word_tokenizer([*words, "▁▁▁a"])
    other.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", ""), decoders.Fuse()])
    alignment = VocabularyAlignment.from_tokenizers(OURS, other, minimum_coverage=0.9)
    assert alignment.token_map.tolist() == list(range(VOCABULARY))  # "a" itself is spelled the same
    other = word_tokenizer(["▁▁▁a", "▁a", *words[1:]])
    other.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", ""), decoders.Fuse()])
    alignment = VocabularyAlignment.from_tokenizers(OURS, other, minimum_coverage=0.9)
    assert alignment.coverage == pytest.approx(23 / 24)
    assert alignment.token_map.tolist() == [EOS, BOS, UNKNOWN, UNKNOWN, *range(5, VOCABULARY + 1)]


def test_uncovered_tokens_read_as_the_unknown_token():
    alignment = VocabularyAlignment.from_tokenizers(OURS, theirs(missing=6), minimum_coverage=0.7)
    assert alignment.coverage == pytest.approx((VOCABULARY - 6) / VOCABULARY)
    assert alignment.token_map[3:9].tolist() == [UNKNOWN] * 6
    assert UNKNOWN not in alignment.token_map[9:]
    chosen = VocabularyAlignment.from_tokenizers(
        OURS, theirs(missing=6), minimum_coverage=0.7, fallback_id=11
    )
    assert chosen.token_map[3:9].tolist() == [11] * 6


def test_low_coverage_is_refused():
    with pytest.raises(InputError, match=r"covers 18 of the LM's 24 tokens \(75\.0%\).* 95\.0%") as error:
        VocabularyAlignment.from_tokenizers(OURS, theirs(missing=6))
    assert_one_line(error)
    assert VocabularyAlignment.from_tokenizers(OURS, theirs(missing=1)).coverage > 0.95


def test_no_fallback_is_an_error():
    other = theirs(missing=1)
    other.unk_token = None
    with pytest.raises(InputError, match=r"1 tokens of the LM .* fallback_id") as error:
        VocabularyAlignment.from_tokenizers(OURS, other, minimum_coverage=0.9)
    assert_one_line(error)


def test_padded_rows_of_the_lm_do_not_count():
    alignment = VocabularyAlignment.from_tokenizers(OURS, theirs(), vocabulary=VOCABULARY + 5)
    assert alignment.coverage == 1
    assert alignment.token_map.shape == (VOCABULARY + 5,)
    assert alignment.token_map[VOCABULARY:].tolist() == [UNKNOWN] * 5


def test_identity_and_truncated_share_the_table():
    table = torch.randn(30, 4)
    assert VocabularyAlignment.identity().through(table).rows is table
    truncated = VocabularyAlignment.truncated(24).through(table)
    assert truncated.token_map is None
    assert truncated.rows.shape == (24, 4)
    assert truncated.rows.data_ptr() == table.data_ptr()


def test_another_vocabulary_shares_the_table_until_it_is_mixed():
    table, token_map = torch.randn(30, 4), torch.randint(0, 30, (24,))
    mapped = VocabularyAlignment(token_map).through(table)
    assert mapped.rows is table
    tokens = torch.tensor([3, 0, 23])
    assert torch.equal(mapped.of(tokens), table[token_map][tokens])
    assert torch.equal(mapped.aligned, table[token_map])
    assert mapped.aligned is mapped.aligned


@pytest.mark.parametrize(
    ("relaxation", "copied"), [("straight_through", False), ("gumbel", False), ("soft", True)]
)
def test_a_decode_with_hard_tokens_copies_no_table(relaxation, copied):
    config = DTOConfig(relaxation=relaxation, iters=2, max_generations=2, confidence_threshold=None)
    tables = []

    class Alignment(VocabularyAlignment):
        def through(self, table):
            tables.append(super().through(table))
            return tables[-1]

    alignment = Alignment(ALIGNMENT.token_map)
    decoder = NablaDecoder(
        shared_lm("qwen2"),
        wide_reward_model(),
        None,
        config=config,
        loop="sequential",
        alignment=alignment,
    )
    (result,) = decoder.generate([[5, 9, 3]], max_new_tokens=4, reward_context=[CONTEXT])
    assert result.stats.gradient_passes
    assert any("aligned" in vars(table) for table in tables) == copied


def test_a_map_outside_the_table_is_refused():
    with pytest.raises(InputError, match=r"token 23, but the reward model has 20 tokens") as error:
        VocabularyAlignment.truncated(24).through(torch.randn(20, 4))
    assert_one_line(error)


@pytest.mark.parametrize("size", [VOCABULARY - 1, VOCABULARY + 1])
def test_a_map_of_another_size_than_the_lms_vocabulary_is_refused(size):
    alignment = VocabularyAlignment.truncated(size)
    with pytest.raises(InputError, match=f"{size} .*{VOCABULARY}") as error:
        NablaDecoder(shared_lm("qwen2"), wide_reward_model(), None, alignment=alignment)
    assert_one_line(error)


def test_tables_of_different_size_are_not_identical():
    identity = VocabularyAlignment.identity()
    with pytest.raises(InputError, match=r"24 tokens, the reward model 31") as error:
        NablaDecoder(shared_lm("qwen2"), wide_reward_model(), None, alignment=identity)
    assert_one_line(error)


def test_mapped_ids_are_scored():
    rm = wide_reward_model()
    config = DTOConfig(max_generations=1)
    decoder = NablaDecoder(
        shared_lm("qwen2"), rm, OURS, config=config, loop="sequential", alignment=ALIGNMENT
    )
    (result,) = decoder.generate([[5, 9, 3]], max_new_tokens=6, reward_context=[CONTEXT])
    response = result.token_ids + [EOS] * (result.finish_reason == "eos")
    ids = torch.tensor([[*CONTEXT[0], *ALIGNMENT.token_map[response], *CONTEXT[1]]])
    with torch.no_grad():
        expected = rm(ids, attention_mask=torch.ones_like(ids)).logits.item()
    assert result.reward == pytest.approx(expected, abs=1e-9)


def test_prompts_of_token_ids_are_mapped():
    rm, prompt = wide_reward_model(), [5, 9, 3]
    decoder = NablaDecoder(shared_lm("qwen2"), rm, None, loop="sequential", alignment=ALIGNMENT)
    mapped = [(ALIGNMENT.token_map[prompt].tolist(), [])]
    by_hand = decoder.generate([prompt], max_new_tokens=6, reward_context=mapped)
    assert decoder.generate([prompt], max_new_tokens=6)[0].reward == by_hand[0].reward


def test_text_is_read_by_each_models_tokenizer():
    other = theirs()
    decoder = NablaDecoder(
        shared_lm("qwen2"), wide_reward_model(), OURS, other, loop="sequential", alignment=ALIGNMENT
    )
    text = OURS.apply_chat_template(
        [{"role": "user", "content": "ab"}], tokenize=False, add_generation_prompt=True
    )
    context = [(other(text).input_ids, other("c").input_ids)]
    by_hand = decoder.generate([OURS(text).input_ids], max_new_tokens=6, reward_context=context)
    assert decoder.generate(["ab"], max_new_tokens=6)[0].reward == by_hand[0].reward


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
def test_gradient_through_the_aligned_table(relaxation):
    config = DTOConfig(nll_coeff=0.2)
    lm, rm = shared_lm("llama"), wide_reward_model()
    prompt, committed, tokens = [5, 9, 3], [12, 7], torch.tensor([4, 22, 4, 9, 15])
    gradients = GradientModel(LanguageModel(lm), RewardModel(rm, ALIGNMENT), config)
    problem = Problem(tuple(prompt), *map(tuple, CONTEXT), 0, 64, frozenset(), StopStrings())
    y = torch.nn.functional.one_hot(tokens, VOCABULARY).double()
    if relaxation == "soft":
        logits = torch.randn(5, VOCABULARY, dtype=torch.float64)
        y = logits.softmax(dim=-1)
        ours = gradients.soft(problem, committed, logits, Stats())
    else:
        ours = gradients.hard(problem, committed, tokens, Stats())
    loop = NaiveLoop(lm, rm, config, prompt, *CONTEXT, token_map=ALIGNMENT.token_map)
    torch.testing.assert_close(ours.rows(5), loop.onehot_grad(committed, y), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_decode_across_vocabularies(seed):
    config = DTOConfig(
        update=("first", "all")[seed % 2],
        iters=4,
        lr=1.0,
        nll_coeff=0.1,
        confidence_threshold=None,
        max_generations=4,
        resample_sampling=SamplingConfig(1.0, 5, 0.9),
    )
    lm, rm, prompt = shared_lm("qwen2"), wide_reward_model(), [5, 9, 3, seed + 3]
    decoder = NablaDecoder(lm, rm, None, config=config, loop="sequential", alignment=ALIGNMENT)
    (result,) = decoder.generate([prompt], seed=seed, max_new_tokens=6, reward_context=[CONTEXT])
    loop = NaiveLoop(
        lm,
        rm,
        config,
        prompt,
        *CONTEXT,
        seed=seed,
        max_new_tokens=6,
        token_map=ALIGNMENT.token_map,
    )
    expected = loop.decode()
    assert result.token_ids == [token for token in expected.tokens if token != EOS]
    assert [(r.reward_after, r.reward_before) for r in result.revisions] == [
        pytest.approx(pair, abs=1e-9) for pair in expected.rewards
    ]
    assert result.revisions


def test_a_leading_space_counts():
    """SentencePiece's "▁ab" is byte-level "Ġab", not "ab"."""
    ours = word_tokenizer(["▁ab", "ab", "c"])
    ours.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    other = word_tokenizer(["ab", "Ġab", "c"])
    other.backend_tokenizer.decoder = decoders.ByteLevel()
    alignment = VocabularyAlignment.from_tokenizers(ours, other, minimum_coverage=0.5)
    own, theirs_ = ours.get_vocab(), other.get_vocab()
    assert alignment.token_map[own["▁ab"]] == theirs_["Ġab"]
    assert alignment.token_map[own["ab"]] == theirs_["ab"]


def test_text_without_a_reward_tokenizer_is_mapped():
    decoder = NablaDecoder(
        shared_lm("qwen2"), wide_reward_model(), OURS, loop="sequential", alignment=ALIGNMENT
    )
    ids = OURS.apply_chat_template(
        [{"role": "user", "content": "ab"}], tokenize=True, add_generation_prompt=True
    )["input_ids"]
    tail = OURS("c", add_special_tokens=False).input_ids
    context = [(ALIGNMENT.token_map[ids].tolist(), ALIGNMENT.token_map[tail].tolist())]
    by_hand = decoder.generate([ids], max_new_tokens=6, reward_context=context)
    assert decoder.generate(["ab"], max_new_tokens=6)[0].reward == by_hand[0].reward
