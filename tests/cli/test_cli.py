"""The commands as a user runs them: exit status, what goes to which stream, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_data import GOLDEN

from nabla_fast.cli import generate, main
from nabla_fast.cli.interrupts import postponed
from nabla_fast.demo.statistics import wilson

MODELS = ["--model", str(GOLDEN / "lm"), "--reward-model", str(GOLDEN / "rm")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run the command line here; returns exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


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
    assert [json.loads(line)["token_ids"] for line in written.read_text().splitlines()] == [
        result["token_ids"] for result in results
    ]


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
        ([*MODELS, "--prompt", "x", "--max-kv-tokens", "640"], "max_kv_tokens goes with loop='batched'"),
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


def test_demo_without_rejection(run):
    assert run("demo", "--problems", "2", "--no-rejection", "--resample-temperature", "1.5")[0] == 0


def _heed_interrupts() -> None:
    """In a new process: a shell's background jobs, of which the tests may be one, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_was_finished(number: int, tmp_path: Path):
    prompts, written = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text('"2+2="\n' * 2000)
    options = ["--prompts", str(prompts), "--output", str(written), "--json", "--max-new-tokens", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nabla_fast.cli", "generate", *MODELS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=_heed_interrupts,
    )
    deadline = time.monotonic() + 120
    while not (written.exists() and written.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    document = json.loads(out)
    lines = written.read_text().splitlines()
    assert len(document["results"]) == len(lines) >= 2
    assert f"{len(lines)} of 2000 prompts finished" in err.decode()
    assert "Traceback" not in err.decode()


def test_texts_are_printed_as_they_come_and_in_order(tmp_path: Path):
    prompts, written = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("\n".join(json.dumps(f"{n}+{n}=") for n in range(2000)))
    options = ["--prompts", str(prompts), "--output", str(written), "--max-new-tokens", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nabla_fast.cli", "generate", *MODELS, *options, "--loop", "batched"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=_heed_interrupts,
        bufsize=0,  # communicate() does not see what readline() has buffered
    )
    first = process.stdout.readline() + process.stdout.readline()  # comes long before the last
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    results = sorted(map(json.loads, written.read_text().splitlines()), key=lambda result: result["index"])
    assert (first + out).decode() == "".join(result["text"] + "\n" for result in results)
    assert [line for line in err.decode().splitlines() if line.startswith("--- ")] == [
        f"--- prompt {result['index']}" for result in results
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_what_is_half_written(number: int):
    former = signal.signal(number, signal.default_int_handler)
    done = []

    def work(interrupts: int) -> None:
        with postponed():
            for _ in range(interrupts):
                signal.raise_signal(number)
            done.append(interrupts)

    try:
        work(0)
        with pytest.raises(KeyboardInterrupt):
            work(1)
        with pytest.raises(KeyboardInterrupt):
            work(2)  # impatience
        assert done == [0, 1]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, former)


def test_a_full_disk_loses_no_result(run, tmp_path: Path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"2+2="\n' * 3)

    def full(self, n, result):
        raise OSError("No space left on device")

    monkeypatch.setattr(generate._Lines, "write", full)
    options = ["--prompts", str(prompts), "--max-new-tokens", "4", "--json"]
    status, out, err = run("generate", *MODELS, *options)
    document = json.loads(out)
    assert (status, len(document["results"]), document["prompts"]) == (1, 1, 3)
    assert "No space left" in document["error"]
    assert "No space left" in err


@pytest.mark.smoke
def test_env_says_what_is_there_and_what_is_not(run):
    status, out, _ = run("env", "--json")
    assert status == 0
    backends = json.loads(out)["backends"]
    assert set(backends) == {"torch", "cpu", "triton", "cuda"}
    for backend in backends.values():
        assert backend["available"] == (backend["why"] is None)
    assert run("env")[0] == 0


@pytest.mark.smoke
def test_demo_solves_problems_and_counts_the_work(run):
    status, out, err = run("demo", "--problems", "3", "--json")
    assert status == 0
    document = json.loads(out)
    assert (document["problems"], document["seed"]) == (3, 0)
    methods = {"greedy", "self_consistency", "best_of_n", "nabla", "nabla_sequential"}
    assert set(document["methods"]) == methods
    for name, method in document["methods"].items():
        assert 0 <= method["ci95"][0] <= method["accuracy"] <= method["ci95"][1] <= 1
        assert method["seconds"] > 0
        assert method["token_passes"]["lm"] >= method["generated_tokens"] > 0
        assert (method["token_passes"]["rm"] > 0) == (name not in ("greedy", "self_consistency"))
    assert document["methods"]["best_of_n"]["rollouts"] == 24
    assert document["methods"]["greedy"]["rollouts"] == 3
    fast, sequential = (document["methods"][name] for name in ("nabla", "nabla_sequential"))
    assert fast["accuracy"] == sequential["accuracy"]
    assert fast["rollouts"] == sequential["rollouts"]
    assert fast["token_passes"]["lm"] < sequential["token_passes"]["lm"]
    assert "Best-of-8" in err  # progress goes there, not into the JSON


def test_demo_prints_a_table(run):
    status, out, _ = run("demo", "--problems", "2", "--max-generations", "3")
    assert status == 0
    for title in ("greedy", "self-consistency(8)", "Best-of-8", "∇(8)", "∇(8), sequential"):
        assert title in out
    assert "the same tokens on 2 of 2 problems" in out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--problems", "0"], "--problems must be at least 1"),
        (["--seed", "-1"], "--seed must be"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--problems", "10000000"], "--problems 10000000"),
    ],
)
def test_demo_refuses_in_one_line(run, flags: list[str], line: str):
    status, _, err = run("demo", *flags)
    assert status == 2
    assert line in err


def test_wilson_interval_against_known_values():
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
