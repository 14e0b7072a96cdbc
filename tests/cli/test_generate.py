"""``nabla-fast generate``: prompts, options, errors, and which stream gets which line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import MODELS
from golden_data import GOLDEN
from tiny_models import causal_lm, reward_model, word_tokenizer


def test_generate_prints_the_text_alone(run):
    status, out, _ = run("generate", *MODELS, "--prompt", "2+2=", "--max-new-tokens", "12")
    assert status == 0
    again = run("generate", *MODELS, "--prompt", "2+2=", "--max-new-tokens", "12", "--json")
    (result,) = json.loads(again[1])["results"]
    assert out == result["text"] + "\n"
    assert len(result["token_ids"]) <= 12


def test_generate_json_is_one_object_with_everything(run):
    status, out, _ = run("generate", *MODELS, "--prompt", "2+2=", "--max-new-tokens", "8", "--json")
    assert status == 0
    document = json.loads(out)
    assert document["error"] is None
    assert document["environment"]["backends"]["torch"]["available"] is True
    stats = document["results"][0]["stats"]
    assert stats["token_passes"]["lm"] > 0
    assert stats["seconds"]["total"] > 0


def test_generate_reads_every_kind_of_prompt_from_a_file(run, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2="}]
    lines = ["2+2=", chat, [88, 86, 72], {"prompt": "2+2="}]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    written = tmp_path / "results.jsonl"
    options = ["--prompts", str(prompts), "--max-new-tokens", "6", "--output", str(written), "--json"]
    status, out, _ = run("generate", *MODELS, *options)
    assert status == 0
    results = json.loads(out)["results"]
    assert [result["index"] for result in results] == [0, 1, 2, 3]
    assert results[0]["token_ids"] == results[3]["token_ids"]
    lines = map(json.loads, written.read_text().splitlines())  # in the order in which they finished
    assert sorted(lines, key=lambda line: line["index"]) == results


def test_both_loops_write_the_same_results(run, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(f"{n}+{n}=") for n in range(5)))
    options = ["--prompts", str(prompts), "--max-new-tokens", "12", "--json"]
    tokens = []
    for flags in (["--loop", "sequential"], ["--loop", "batched", "--batch-size", "3"]):
        status, out, _ = run("generate", *MODELS, *options, *flags)
        assert status == 0
        tokens.append([result["token_ids"] for result in json.loads(out)["results"]])
    assert tokens[0] == tokens[1]


def test_decoding_options_reach_the_decoder(run):
    options = ["--prompt", "2+2=", "--max-new-tokens", "16", "--json"]
    results = {}
    for name, flags in {
        "one": ["--max-generations", "1"],
        "greedy": ["--temperature", "0", "--max-generations", "1"],
        "all": ["--lr", "0.5", "--reward-coeff", "5", "--update", "all", "--parameter", "latents"],
    }.items():
        status, out, _ = run("generate", *MODELS, *options, *flags)
        assert status == 0
        results[name] = json.loads(out)["results"][0]
    assert results["one"]["stats"]["generations"] == results["greedy"]["stats"]["generations"] == 1
    assert results["one"]["token_ids"] != results["greedy"]["token_ids"]
    assert results["all"]["stats"]["generations"] > 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "/no/such/folder", "--prompt", "x"], "/no/such/folder: not a folder"),
        (["--model", str(GOLDEN), "--prompt", "x"], "not a checkpoint folder (no config.json)"),
        (["--model", str(GOLDEN / "rm"), "--prompt", "x"], "not a language model"),
        ([*MODELS[:2], "--reward-model", str(GOLDEN / "lm"), "--prompt", "x"], "not a reward model"),
        (["--reward-model", str(GOLDEN / "rm"), "--prompt", "x"], "--reward-model needs --model"),
        ([*MODELS, "--prompt", ""], "prompt 0: the prompt is empty"),
        ([*MODELS, "--prompt", "x" * 600], "leave no room for a response"),
        ([*MODELS, "--prompt", "x", "--max-generations", "0"], "max_generations must be"),
        ([*MODELS, "--prompt", "x", "--confidence-threshold", "1.5"], "confidence_threshold must be"),
        ([*MODELS, "--prompt", "x", "--top-p", "0"], "top_p must be"),
        ([*MODELS, "--prompt", "x", "--device", "cuda:99"], "--device cuda:99"),
        ([*MODELS, "--prompt", "x", "--batch-size", "0"], "batch_size must be a whole number ≥ 1"),
        (
            [*MODELS, "--prompt", "x", "--loop", "sequential", "--max-kv-tokens", "640"],
            "max_kv_tokens goes with loop='batched'",
        ),
        ([*MODELS, "--prompts", "/no/such/file"], "no such file"),
        ([*MODELS, "--prompt", "x", "--output", "/no/such/folder/out"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(run, arguments: list[str], line: str):
    status, out, err = run("generate", *arguments)
    assert status in (1, 2)
    assert out == ""
    message = err.strip().splitlines()[-1]
    assert message.startswith("nabla-fast: ")
    assert line in message
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('"good"\n{bad\n', "line 2: not JSON"),
        ('{"text": "x"}\n', "line 1: the object has no 'prompt'"),
        ("\n\n", "no prompts"),
        ('"good"\n42\n', "prompt 1: a prompt must be a string, a chat or a list of token ids, got int"),
        ('"good"\n[1, 999]\n', "prompt 1: token id 999 at position 1 is outside the vocabulary of 256"),
    ],
)
def test_bad_prompt_file_names_the_line(run, tmp_path: Path, content: str, line: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    status, out, err = run("generate", *MODELS, "--prompts", str(path))
    assert (status, out) == (2, "")
    assert line in err


def test_former_results_outlive_a_refused_run(run, tmp_path: Path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text("precious\n")
    assert run("generate", *MODELS, "--prompt", "", "--output", str(kept))[0] == 2
    assert kept.read_text() == "precious\n"


def test_prompt_files_are_split_at_newlines_alone(run, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps("2\u2028+2=", ensure_ascii=False) + "\n", encoding="utf-8")
    assert run("generate", *MODELS, "--prompts", str(prompts), "--max-new-tokens", "2")[0] == 0
    prompts.write_bytes(b'"\xff"\n')
    status, _, err = run("generate", *MODELS, "--prompts", str(prompts))
    assert (status, "not UTF-8" in err) == (2, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("json_too", [False, True])
def test_a_full_disk_loses_no_result(run, tmp_path: Path, json_too: bool):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"2+2="\n' * 3)
    options = ["--prompts", str(prompts), "--max-new-tokens", "4", "--output", "/dev/full"]
    status, out, err = run("generate", *MODELS, *options, *["--json"] * json_too)
    assert status == 1
    assert err.splitlines()[-1] == "nabla-fast: --output /dev/full: No space left on device"
    if json_too:
        document = json.loads(out)
        assert (len(document["results"]), document["prompts"]) == (3, 3)
        assert "No space left" in document["error"]
    else:
        assert len(out.splitlines()) == 3


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for models of which the batched loop refuses one, and a prompt."""
    folder = tmp_path_factory.mktemp("bert")
    causal_lm("qwen2").save_pretrained(folder / "lm")
    reward_model("bert").save_pretrained(folder / "rm")
    word_tokenizer().save_pretrained(folder / "lm")
    models = ["--model", str(folder / "lm"), "--reward-model", str(folder / "rm")]
    return [*models, "--prompt", "abc", "--max-new-tokens", "3"]


def test_the_loop_is_batched_where_the_models_allow_it(run):
    passes = []
    for loop in ([], ["--loop", "batched"], ["--loop", "sequential"]):
        options = ["--prompt", "2+2=", "--max-new-tokens", "6", "--json", *loop]
        status, out, err = run("generate", *MODELS, *options)
        assert (status, err) == (0, "")
        passes.append(json.loads(out)["results"][0]["stats"]["token_passes"])
    assert passes[0] == passes[1] != passes[2]


def test_a_reward_model_that_is_read_anew_is_announced_in_one_line(run, bert: list[str]):
    status, out, err = run("generate", *bert)
    (line,) = err.strip().splitlines()
    assert status == 0
    assert line.startswith(
        "nabla-fast: BertForSequenceClassification does not score its last token's state"
    )
    assert "everything is read again with each pass, which is slow" in line
    assert run("generate", *bert, "--loop", "sequential") == (0, out, "")
    assert run("generate", *bert, "--loop", "batched") == (0, out, err)


def test_prompts_that_fail_are_kept_where_asked(run, monkeypatch, tmp_path: Path):
    from nabla_fast.decode.batched.executor import Executor

    original = Executor.roll_out

    def striking(executor, requests):
        if any(len(request.problem.prompt_ids) == 2 for request in requests):
            raise ValueError("struck")
        original(executor, requests)

    monkeypatch.setattr(Executor, "roll_out", striking)
    prompts, written = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("[88, 86, 72]\n[88, 86]\n[88]\n")
    options = ["--prompts", str(prompts), "--max-new-tokens", "3", "--output", str(written)]
    status, out, err = run("generate", *MODELS, *options, "--on-error", "keep")
    assert status == 1
    assert len(out.splitlines()) == 2
    assert "nabla-fast: prompt 1: struck" in err
    lines = sorted(map(json.loads, written.read_text().splitlines()), key=lambda line: line["index"])
    assert [line["error"] for line in lines] == [None, "prompt 1: struck", None]
    status, _, err = run("generate", *MODELS, *options)
    assert status == 1
    assert "prompt 1: struck" in err


def test_best_of_keeps_the_best_candidate(run, tmp_path: Path):
    flags = ["--prompt", "2+2=", "--prompt", "3+1=", "--best-of", "3", "--max-new-tokens", "8"]
    written = tmp_path / "results.jsonl"
    status, out, _ = run("generate", *MODELS, *flags, "--json", "--output", str(written))
    assert status == 0
    results = json.loads(out)["results"]
    for result in results:
        rewards = [candidate["reward"] for candidate in result["candidates"]]
        assert len(rewards) == 3
        assert result["reward"] == max(rewards)
        assert result["stats"]["generations"] == 3
    lines = map(json.loads, written.read_text().splitlines())
    assert sorted(lines, key=lambda line: line["index"]) == results


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--best-of", "0"], "--best-of must be at least 1, got 0"),
        (["--best-of", "2", "--loop", "sequential"], "--best-of has no sequential loop"),
        (["--best-of", "2", "--batch-size", "0"], "batch_size must be a whole number ≥ 1, got 0"),
        (["--best-of", "2", "--model", str(GOLDEN / "lm")], "--best-of needs --reward-model"),
    ],
)
def test_best_of_refuses_in_one_line(run, flags: list[str], line: str):
    status, _, err = run("generate", "--prompt", "2+2=", *flags)
    assert status == 2
    assert line in err
