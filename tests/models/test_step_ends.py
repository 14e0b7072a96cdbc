"""Where steps end."""

from __future__ import annotations

import pytest
from tiny_models import EOS, VOCABULARY, word_tokenizer

from nabla_fast.models.step_ends import StepEnds

TOKENIZER = word_tokenizer()
ID = TOKENIZER.get_vocab()


def tokens(*words: str) -> list[int]:
    return [ID[word] for word in words]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (["a"], [0]),
        (["c"], [0]),
        (["a", "c", "b", "c"], [1, 3]),
        (["a", "c", "b", "b"], [1, 3]),
        (["a", "c", "<eos>"], [1]),  # the EOS after a separator is no step
        (["a", "c", "b", "<eos>"], [1, 3]),
        (["a", "b", "<eos>"], [2]),
        (["c", "c", "c"], [0, 1, 2]),
    ],
)
def test_a_token(response, expected):
    ends = StepEnds.of_separator(ID["c"], None, VOCABULARY)
    assert ends.of(tokens(*response)) == expected


def test_every_token_whose_text_ends_so_ends_a_step():
    ends = StepEnds.of_separator("c", TOKENIZER, VOCABULARY)
    assert ends.tokens == {n for word, n in ID.items() if word.endswith("c")}
    assert ends.of(tokens("aac", "ca", "b", "ac", "a", "b")) == [0, 3, 5]


def test_tokens_that_spell_a_separator_one_after_another():
    """No token has the text; "a" and "b" that are not together end nothing."""
    words = ["a", "b", "c", "ba", "cc"]
    tokenizer = word_tokenizer(words)
    vocabulary = tokenizer.get_vocab()
    ends = StepEnds.of_separator("ab", tokenizer, len(vocabulary))
    assert ends.tokens == frozenset()
    response = [vocabulary[word] for word in ("a", "b", "c", "b", "a", "cc", "a", "b", "c", "c")]
    assert ends.of(response) == [1, 7, 9]


def test_a_special_token_may_be_the_separator_but_none_ends_with_another():
    assert StepEnds.of_separator("<eos>", TOKENIZER, VOCABULARY).of([5, EOS, 6, 7]) == [1, 3]
    assert EOS not in StepEnds.of_separator("c", TOKENIZER, VOCABULARY).tokens
