"""The bundled models: small, in 16 bits, and able to write an answer."""

from __future__ import annotations

import importlib
import json
from importlib.resources import files
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nabla_fast.demo.countdown import check, held_out, render, solutions, vote_key  # noqa: E402

ASSETS = Path(str(files("nabla_fast") / "assets"))
CLASSES = {"lm": Qwen2ForCausalLM, "rm": Qwen2ForSequenceClassification}


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(ASSETS / "tokenizer")


def load(name: str):
    return CLASSES[name].from_pretrained(ASSETS / name, dtype=torch.float32).eval()


def prompt_ids(tokenizer, problem, **kwargs) -> list[int]:
    chat = [{"role": "user", "content": render(problem)}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **kwargs)


def test_all_files_together_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 5_000_000


@pytest.mark.parametrize("name", ["lm", "rm"])
def test_models_are_small_and_in_16_bits(name, tokenizer):
    model = CLASSES[name].from_pretrained(ASSETS / name, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.num_parameters() <= 1_000_000
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.max_position_embeddings == 512


def test_tokenizer_has_one_token_a_character(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\n  ,\n\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_chat_template(tokenizer):
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|>"
    )
    # A prompt and a response with its end token are the whole chat: no tail is left over.
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, return_dict=False)
    response = [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]
    assert prompt + response == tokenizer.apply_chat_template(chat, return_dict=False)
    assert len(prompt) == 7


@pytest.fixture
def training(monkeypatch):
    """The training package, which is in the repository but not in an installed package."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return pytest.importorskip("benchmarks.training")


def test_training_uses_the_tokenizer_it_saves(tokenizer, training):
    """The training pipeline encodes by table; the two must agree."""
    data = importlib.import_module("benchmarks.training.data")
    for problem in held_out(5):
        assert list(data.encode_prompt(problem)) == prompt_ids(tokenizer, problem)
    answer = "7*9=63,63-4=59,59+2=61"
    ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    assert list(data.encode_answer(answer)) == ids
    assert data.decode_answer(ids) == answer


def test_training_labels_the_beginnings_of_solutions(training):
    rm = importlib.import_module("benchmarks.training.rm")
    data = importlib.import_module("benchmarks.training.data")
    beginnings = rm.Beginnings(["1+2=3,3+4=7", "2+1=3,3+4=7", "2+4=6,6+1=7"])
    for answer, length in [("2+4=6,6+1=7", 12), ("2+4=6,6-1=5", 7), ("2+1=3,3+4=7,", 11), ("9", 0)]:
        assert beginnings.common_length(data.encode_answer(answer)) == length
    assert beginnings.common_length(data.encode_text("2+4=")) == 4


def test_training_samples_as_transformers_does(training):
    sample = importlib.import_module("benchmarks.training.sample")
    logits = torch.randn(50, 102, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits
    for warper in (
        TemperatureLogitsWarper(sample.TEMPERATURE),
        TopKLogitsWarper(sample.TOP_K),
        TopPLogitsWarper(sample.TOP_P),
    ):
        expected = warper(None, expected)
    actual = sample.filtered_probabilities(logits)
    actual = actual / actual.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(actual, expected.softmax(dim=-1))


def test_a_greedy_answer_is_a_list_of_steps(tokenizer):
    lm = load("lm")
    problem = held_out(1)[0]
    prompt = prompt_ids(tokenizer, problem)
    output = lm.generate(torch.tensor([prompt]), max_new_tokens=32)
    assert output[0, -1] == tokenizer.eos_token_id
    answer = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    assert vote_key(answer) is not None


def test_reward_model_prefers_right_answers(tokenizer):
    rm = load("rm")
    better = 0
    problems = held_out(20)
    for problem in problems:
        right = solutions(problem.numbers)[problem.target][0]
        wrong = right[:-1] + str((int(right[-1]) + 1) % 10)
        assert not check(problem, wrong)
        rewards = []
        for answer in (right, wrong):
            ids = prompt_ids(tokenizer, problem) + tokenizer(answer)["input_ids"]
            with torch.no_grad():
                logits = rm(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits
            rewards.append(logits.item())
        better += rewards[0] > rewards[1]
    assert better >= 0.8 * len(problems)


def test_figures_are_those_of_a_full_training():
    figures = json.loads((ASSETS / "training.json").read_text())
    assert figures["problems"]["lm_split"] >= 100_000
    assert figures["problems"]["evaluated_held_out"] >= 2000
    greedy = figures["policy"]["greedy"]["accuracy"]
    assert 0.4 <= greedy <= 0.7
    assert figures["policy"]["sampled_pass_at_8"]["accuracy"] >= greedy + 0.15
    assert figures["reward_model"]["best_of_8"]["accuracy"] >= greedy + 0.05
