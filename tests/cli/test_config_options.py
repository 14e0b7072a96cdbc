"""Options of DTOConfig: presets are defaults, and "model" leaves a value to the generation config."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from commands import MODELS

from nabla_fast import DTOConfig, InputError, SamplingConfig
from nabla_fast.cli import make_parser
from nabla_fast.cli.options import config_from
from nabla_fast.config import PRESETS


def read(*options: str):
    """The config and the most tokens that options of ``generate`` describe."""
    arguments = make_parser().parse_args(["generate", "--prompt", "x", *options])
    return config_from(arguments), arguments.max_new_tokens


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset(name):
    assert read("--preset", name) == (DTOConfig.preset(name), DTOConfig.preset_max_new_tokens(name))
    assert read(f"--preset={name}")[0] == DTOConfig.preset(name)


def test_options_count_beside_a_preset_wherever_they_stand():
    config = replace(DTOConfig.preset("aime"), grad_threshold=None, lr=0.01)
    for options in (
        ["--preset", "aime", "--grad-threshold", "none", "--lr", "0.01"],
        ["--grad-threshold", "none", "--lr", "0.01", "--preset", "aime"],
    ):
        assert read(*options)[0] == config
    assert read("--max-new-tokens", "7", "--preset", "aime")[1] == 7


def test_a_parser_forgets_a_preset():
    parser = make_parser()
    for options, config in (
        (["--preset", "amc"], DTOConfig.preset("amc")),
        ([], DTOConfig()),
        (["--weight-decay", "0.5"], DTOConfig(weight_decay=0.5)),
        (["--schedule", "linear"], DTOConfig(schedule="linear")),
        (
            ["--relaxation", "gumbel", "--gumbel-scale", "2"],
            DTOConfig(relaxation="gumbel", gumbel_scale=2.0),
        ),
    ):
        assert config_from(parser.parse_args(["generate", "--prompt", "x", *options])) == config


def test_values_that_are_left_to_the_model():
    assert read("--temperature", "model")[0].rollout_sampling is None
    config = read("--top-k", "model", "--resample-top-k", "model")[0]
    assert config.rollout_sampling == SamplingConfig(0.7, None, 0.8)
    assert config.resample_sampling == SamplingConfig(0.5, None, 0.8)
    for option, value in (("--top-k", "3"), ("--top-p", "0.9")):
        with pytest.raises(InputError, match=f"^{option} has no effect beside --temperature model"):
            read("--temperature", "model", option, value)


def test_a_preset_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        read("--preset", "math")
    assert "invalid choice: 'math' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("way", [[], ["--best-of", "3"]])
def test_the_models_generation_config_from_the_command_line(run, way):
    options = ["--prompt", "2+2=", "--max-new-tokens", "8", "--json", *way]
    answers = []
    for flags in (
        ["--temperature", "model"],
        ["--temperature", "0"],
    ):  # the golden model's says nothing: greedy
        status, out, _ = run("generate", *MODELS, *options, *flags)
        assert status == 0
        answers.append([result["token_ids"] for result in json.loads(out)["results"]])
    assert answers[0] == answers[1]


def test_stop_strings_are_trimmed(run):
    options = ["--prompt", "2+2=", "--max-new-tokens", "12", "--json"]
    (whole,) = json.loads(run("generate", *MODELS, *options)[1])["results"]
    text = whole["text"]
    stop = text[len(text) // 2]
    texts = []
    for flags in ([], ["--trim-stop"]):
        status, out, _ = run("generate", *MODELS, *options, "--stop", stop, *flags)
        assert status == 0
        texts.append(json.loads(out)["results"][0]["text"])
    assert texts[0].startswith(texts[1] + stop)
