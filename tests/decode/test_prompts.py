"""Prompts: what reward models read around a response, stop strings, text that no tokenizer reads."""

from __future__ import annotations

import pytest
from tiny_models import shared_lm, shared_reward_model, word_tokenizer

from nabla_fast import InputError, NablaDecoder, neutralize_special_tokens
from nabla_fast.checkpoints import bundled, load_tokenizer
from nabla_fast.decode.prompts import around_response, render_chat
from nabla_fast.decode.stop import StopStrings

CHAT = [{"role": "user", "content": "1 2 -> 3"}]
USER = "{% for m in messages %}<|{{ m['role'] }}|>"
THINKS = (
    USER
    + "{% if m['role'] == 'assistant' %}12{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(bundled("tokenizer"))


def ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def test_reward_models_read_what_the_template_writes_around_a_finished_response(tokenizer):
    tokenizer.chat_template = THINKS
    before, after = around_response(tokenizer, CHAT)
    assert before == ids(tokenizer, "<|user|>1 2 -> 3<|end|><|assistant|>12")
    assert after == ids(tokenizer, "<|end|>")
    assert render_chat(tokenizer, CHAT) == ids(tokenizer, "<|user|>1 2 -> 3<|end|><|assistant|>")


def test_templates_without_a_generation_prompt_serve_reward_models(tokenizer):
    tokenizer.chat_template = USER + "{{ m['content'] }}<|end|>{% endfor %}"
    assert around_response(tokenizer, CHAT)[0] == ids(tokenizer, "<|user|>1 2 -> 3<|end|><|assistant|>")


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ("{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}", "drops the assistant's response"),
        ("{{ m['content'] }}{{ m['content'] }}", "shows the assistant's response twice"),
        ("{{ raise_exception('no') }}", "refuses the chat: no"),
    ],
)
def test_templates_that_hide_where_the_response_stands_are_refused(tokenizer, shown: str, message: str):
    tokenizer.chat_template = USER + shown + "{% endfor %}"
    with pytest.raises(InputError, match=message):
        around_response(tokenizer, CHAT)


def test_a_doubled_bos_is_read_once(tokenizer):
    tokenizer.bos_token = "<|user|>"
    tokenizer.chat_template = "<|user|>" + USER + "{{ m['content'] }}<|end|>{% endfor %}"
    assert around_response(tokenizer, CHAT)[0] == ids(tokenizer, "<|user|>1 2 -> 3<|end|><|assistant|>")


def test_stop_strings_that_are_special_tokens_match(tokenizer):
    (end,) = ids(tokenizer, "<|end|>")
    response = [*ids(tokenizer, "12"), end]
    stop = StopStrings(["<|end|>"], tokenizer)
    assert stop.completed_by_last(response)
    assert not stop.completed_by_last(response[:-1])
    assert not stop.completed_by_last([*response, *ids(tokenizer, "3")])
    assert StopStrings(["2<|end|>"], tokenizer).completed_by_last(response)
    assert not StopStrings(["1<|end|>"], tokenizer).completed_by_last(response)


def test_stop_strings_of_plain_text_are_looked_for_without_special_tokens(tokenizer):
    response = [*ids(tokenizer, "1"), *ids(tokenizer, "<|end|>"), *ids(tokenizer, "2")]
    assert StopStrings(["12"], tokenizer).completed_by_last(response)


def test_neutralized_text_holds_no_special_token(tokenizer):
    text = neutralize_special_tokens("1<|end|><|user|>2", tokenizer)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert special & set(ids(tokenizer, "1<|end|><|user|>2"))
    assert not special & set(ids(tokenizer, text))
    assert text.replace("\u200b", "") == "1<|end|><|user|>2"
    assert neutralize_special_tokens("1 2 -> 3", tokenizer) == "1 2 -> 3"


@pytest.mark.parametrize(
    ("ids", "stop", "kept", "text"),
    [
        ([3, 4, 5], ["c"], [3, 4], "ab"),
        ([3, 4, 5], ["bc"], [3], "a"),
        ([3, 4, 5], ["abc"], [], ""),
        ([3, 4, 8], ["c"], [3, 4], "aba"),  # "ac": the string begins inside the last token
        ([5, 3, 4, 5], ["c"], [5, 3, 4], "cab"),  # the one that the last token completes
        ([3, 4, 5], ["bc", "c"], [3], "a"),  # the one that begins first
        ([3, 3, 19], ["b"], [3, 3], "aaa"),  # "abb" has it twice
        ([3, 4, 0], ["<eos>"], [3, 4], "ab"),
        ([3, 4, 0], ["b<eos>"], [3], "a"),
    ],
)
def test_a_stop_string_is_trimmed(ids, stop, kept, text):
    tokenizer = word_tokenizer()
    assert tokenizer.decode([8, 19]) == "acabb"
    strings = StopStrings(stop, tokenizer, trim=True)
    assert strings.completed_by_last(ids)
    assert strings.trimmed(ids) == (kept, text)


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_answers_end_before_the_stop_string_on_request(loop):
    lm, tokenizer = shared_lm("qwen2"), word_tokenizer()
    made = NablaDecoder(lm, shared_reward_model("qwen2"), tokenizer, loop=loop)
    prompts, options = [[3 + n % 5, 4, 7] for n in range(12)], {"max_new_tokens": 9, "stop": ["b", "ca"]}
    whole = made.generate(prompts, **options)
    trimmed = made.generate(prompts, **options, trim_stop=True)
    stopped = [(w, t) for w, t in zip(whole, trimmed, strict=True) if w.finish_reason == "stop"]
    assert len(stopped) > 3
    for before, after in zip(whole, trimmed, strict=True):
        assert after.reward == before.reward
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        if before.finish_reason != "stop":
            assert (after.text, after.token_ids) == (before.text, before.token_ids)
    for before, after in stopped:
        assert before.text.startswith(after.text)
        assert "b" not in after.text
        assert "ca" not in after.text
        assert after.text.startswith(tokenizer.decode(after.token_ids, skip_special_tokens=True))
    with pytest.raises(InputError, match=r"^trim_stop must be True or False, got 1$"):
        made.generate(prompts, **options, trim_stop=1)
