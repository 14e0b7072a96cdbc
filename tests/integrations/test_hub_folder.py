"""The folder for a model hub, loaded by transformers from a local path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from prompts import MOST, decoder, expected, padded, prompts, responses, tokenizer
from tiny_models import EOS, shared_lm, shared_reward_model
from transformers import GenerationConfig

from nabla_fast import InputError

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "hub"


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``generate`` by the folder; modules that transformers copies go to a place of the test's own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def call(rows, folder: Path = FOLDER, **options):
        given = {
            "max_new_tokens": MOST,
            "seed": 5,
            "pad_token_id": EOS,
            "tokenizer": tokenizer(),
            "reward_model": shared_reward_model("qwen2"),
            "dto_config": decoder().config,
            "trust_remote_code": True,
        }
        inputs = padded(rows) if rows else {}
        return shared_lm("qwen2").generate(**inputs, custom_generate=str(folder), **(given | options))

    return call


def test_tokens_are_the_decoders(generate):
    rows = prompts(4)
    width = max(map(len, rows))
    assert responses(generate(rows), width) == expected(decoder(), rows)
    greedy = generate(rows, do_sample=False)
    assert responses(greedy, width) == expected(decoder("greedy"), rows)
    alone = generate(rows[:1], reward_model=None, tokenizer=None)
    assert alone.shape[0] == 1


def test_stop_strings_and_streamer_reach_the_decoder(generate, capsys):
    rows = prompts(4)
    stops = expected(decoder(), rows, stop=["ca", "bb"])
    assert stops != expected(decoder(), rows)
    width = max(map(len, rows))
    assert responses(generate(rows, stop_strings=["ca", "bb"]), width) == stops
    config = GenerationConfig(stop_strings=["ca", "bb"])
    assert responses(generate(rows, generation_config=config), width) == stops
    assert config.stop_strings == ["ca", "bb"]

    streamer = transformers.TextStreamer(tokenizer(), skip_prompt=True, skip_special_tokens=True)
    tokens = generate(rows[:1], streamer=streamer)
    text = tokenizer().decode(tokens[0, len(rows[0]) :], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == text


def test_what_a_decode_does_not_do_is_refused(generate):
    with pytest.raises(InputError, match=r"^assistant_model: a decode does not use it, leave it out$"):
        generate(prompts(1), assistant_model=shared_lm("qwen2"))
    with pytest.raises(InputError, match=r"repetition_penalty=1\.2, which a decode does not do"):
        generate(prompts(1), repetition_penalty=1.2)


def test_the_folder_is_code_that_needs_trust(generate):
    # Releases before 5.10 trust a local folder.
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 10):
        pytest.skip("this release trusts local folders")
    with pytest.raises(ValueError, match="trust_remote_code"):
        generate(prompts(1), trust_remote_code=False)


def test_what_the_folder_requires_is_installed(generate, tmp_path: Path):
    folder = tmp_path / "hub"
    shutil.copytree(FOLDER, folder)
    assert (folder / "custom_generate" / "requirements.txt").read_text().split() == ["nabla-fast"]
    (folder / "custom_generate" / "requirements.txt").write_text(
        "nabla-fast\nno-such-package-of-any-name\n"
    )
    with pytest.raises(ImportError, match="no-such-package-of-any-name"):
        generate(prompts(1), folder)


def test_the_card_says_what_the_convention_asks_for():
    card = (FOLDER / "README.md").read_text()
    assert card.startswith("---\n")
    assert "  - custom_generate\n" in card.split("---")[1]
    source = (FOLDER / "custom_generate" / "generate.py").read_text()
    namespace = {}
    exec(compile(source, "generate.py", "exec"), namespace)
    assert namespace["generate"].__code__.co_varnames[0] == "model"  # as transformers calls it
