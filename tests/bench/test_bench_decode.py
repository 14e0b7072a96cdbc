"""The decode benchmark: no time without equal tokens, and figures that add up."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nabla_fast.bench import decode as bench
from nabla_fast.bench import prefix_speed, step_speed
from nabla_fast.bench.decode_cases import (
    GREEDY,
    Case,
    bundled_models,
    bundled_problems,
    gradient_threshold,
    named_cases,
    random_models,
    random_problem,
)
from nabla_fast.bench.decode_runs import CountingLoop, Run, decode
from nabla_fast.bench.decode_tables import tables
from nabla_fast.bench.prefix_speed import measure_prefix
from nabla_fast.bench.rollout_speed import measure_rollouts
from nabla_fast.bench.shape_speed import DTYPES, measure_shape
from nabla_fast.bench.step_speed import measure_steps
from nabla_fast.checkpoints import bundled, load_tokenizer
from nabla_fast.cli import main
from nabla_fast.config import DTOConfig
from nabla_fast.decode.batched.accelerations import Accelerations
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.prompts import render_chat
from nabla_fast.demo import countdown
from nabla_fast.models import LanguageModel

CPU = torch.device("cpu")


def tiny_case(config: DTOConfig | None = None, **options) -> Case:
    lm, rm = random_models(64, CPU, hidden=16)
    problems = [random_problem(8, seed) for seed in (7, 8)]
    return Case("tiny", lm, rm, config or DTOConfig(max_generations=4), problems, 2, **options)


@pytest.fixture
def wrong_below(monkeypatch: pytest.MonkeyPatch):
    """Make the batched loop's tokens wrong in the dtypes given."""

    def make(*dtypes: torch.dtype) -> None:
        def wrong(loop, problems) -> Run:
            run = decode(loop, problems)
            if isinstance(loop, BatchedLoop) and loop._executor.lm.table.dtype in dtypes:
                run.tokens[0] = [*run.tokens[0], 1]
            return run

        monkeypatch.setattr(bench, "decode", wrong)

    return make


def test_every_side_is_compared_and_timed():
    entry = bench.measure(tiny_case(release_form=True), repeats=1)
    assert entry["same_tokens"]
    assert bench.all_same(entry)
    sides = {"sequential", "fast", "one_proposal", "best_of_n", "release_form"}
    assert set(entry["seconds"]) == set(entry["token_passes"]) == set(entry["timed_runs"]) == sides
    assert min(entry["seconds"].values()) > 0
    assert entry["speedup"] == entry["seconds"]["sequential"] / entry["seconds"]["fast"]
    assert entry["speedup_over_release_form"] > 0
    assert entry["release_form"]["steps"] == 20 * entry["positions"]["optimized"]
    fields = [field.name for field in dataclasses.fields(Accelerations)]
    assert [row["off"] for row in entry["ablation"]] == fields
    assert all(row["seconds"] > 0 and row["slowdown"] > 0 for row in entry["ablation"])
    for loop in ("fast", "one_proposal"):
        assert sum(entry["passes_for"][loop].values()) == pytest.approx(1)
    assert entry["samples"] == round(entry["generations"])
    assert set(entry["rounds"]) == {"sequential", "fast"}
    assert sum(entry["stage_seconds"]["fast"].values()) <= 1.01 * entry["seconds"]["fast"]


def test_greedy_rollouts_take_one_gradient_a_trajectory():
    # Steps too small to move a token.
    config = DTOConfig(lr=1e-9, max_generations=4, rollout_sampling=GREEDY)
    entry = bench.Examination(tiny_case(config, ablated=False)).entry
    assert "flip" not in entry["passes_for"]["fast"]
    assert 0 < entry["gradient_passes"]["fast"] <= entry["trajectories"]


def test_wrong_tokens_get_no_times(wrong_below):
    wrong_below(torch.float32, torch.float64)
    entry = bench.measure(tiny_case(ablated=False), repeats=1)
    assert (entry["same_tokens"], entry["dtype"]) == (False, "float64")
    assert not bench.all_same(entry)
    assert "seconds" not in entry
    assert "speedup" not in entry
    assert list(tables({"cases": [entry]}))


def test_a_mismatch_in_float32_is_settled_in_float64(wrong_below):
    wrong_below(torch.float32)
    entry = bench.measure(tiny_case(ablated=False), repeats=1)
    assert (entry["same_tokens"], entry["dtype"]) == (True, "float64")
    assert {"fast", "one_proposal"} <= set(entry["differed_in_float32"])
    assert entry["seconds"]["fast"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_with_a_float32_copy(dtype, wrong_below):
    lm, rm = random_models(64, CPU, dtype, hidden=16)
    problems = [random_problem(8, seed) for seed in (7, 8)]
    case = Case("half", lm, rm, DTOConfig(max_generations=4), problems, 2, ablated=False, release_form=True)
    entry = bench.measure(case, repeats=1)
    assert (entry["same_tokens"], entry["dtype"]) == (True, str(dtype).removeprefix("torch."))
    assert bench.all_same(entry)
    assert 0 <= entry["same_prompts_by_modules"] <= 2
    assert entry["speedup"] == entry["seconds"]["sequential"] / entry["seconds"]["fast"]
    (table, *_) = tables({"cases": [entry]})
    assert f"of 2 prompts alike by {entry['dtype']} modules" in table.rows[0][-1]
    wrong_below(dtype, torch.float64)
    entry = bench.measure(case, repeats=1)
    assert (entry["same_tokens"], entry["dtype"]) == (False, "float64")


def test_command_takes_a_dtype(capsys):
    flags = ["--quick", "--json", "--dtype", "bfloat16"]
    cases = ["one prompt", "lengths: 8", "steps", "prefix", "shape"]
    assert main(["bench", "decode", *flags, "--cases", *cases]) == 0
    results = json.loads(capsys.readouterr().out)
    entries = [*results["cases"], *results["lengths"], *results["shapes"], results["steps"]]
    assert [entry["dtype"] for entry in [*entries, results["prefix"]]] == ["bfloat16"] * 5
    assert main(["bench", "decode", *flags, "--cases", "generate"]) == 2
    assert "--cases 'generate' is in no name" in capsys.readouterr().err


def test_rollouts_draw_what_generate_draws():
    result = measure_rollouts(CPU, 1, tokens=6)
    assert result["same_tokens"]
    assert set(result["rollout_ms"]) == set(result["share"]) == {"1", "8"}


def test_steps_take_the_tokens_of_generate(monkeypatch):
    result = measure_steps(CPU, 1, quick=True)
    assert (result["same_tokens"], result["dtype"]) == (True, "float32")
    assert set(result["step_ms"]) == set(result["share"]) == {"generate", "one_by_one", "ahead"}
    (table,) = tables({"steps": result})
    assert len(table.rows) == 3

    roll_out = step_speed._roll_out

    def wrong(lm: LanguageModel, turns: int, tokens: int) -> tuple[list[list[int]], float]:
        found, seconds = roll_out(lm, turns, tokens)
        found[3][-1] = (found[3][-1] + turns) % lm.vocabulary
        return found, seconds

    monkeypatch.setattr(step_speed, "_roll_out", wrong)
    result = measure_steps(CPU, 1, quick=True)
    assert not result["same_tokens"]
    assert "step_ms" not in result
    (table,) = tables({"steps": result})
    assert "NOT the same" in table.note


def test_gradients_after_a_prefix_agree_before_they_are_timed(monkeypatch):
    result = measure_prefix(CPU, 1, quick=True)
    assert result["same_gradients"]
    assert set(result["ms"]) == {"paged", "recomputed", "concatenated"}
    assert set(result["faster"]) == set(result["targets"])
    (table,) = tables({"prefix": result})
    assert len(table.rows) == 3

    sides = prefix_speed._sides

    def wrong(*given) -> dict:
        right = sides(*given)
        return right | {"paged": lambda own: 1.01 * right["paged"](own)}

    monkeypatch.setattr(prefix_speed, "_sides", wrong)
    result = measure_prefix(CPU, 1, quick=True)
    assert not result["same_gradients"]
    assert "ms" not in result
    (table,) = tables({"prefix": result})
    assert "NOT" in table.note


def test_problems_are_not_those_of_the_demo():
    lm, _ = bundled_models(CPU)
    prompts = {problem.prompt_ids for problem in bundled_problems(lm, 16)}
    assert len(prompts) == 16
    tokenizer = load_tokenizer(bundled("tokenizer"))
    shown = [[{"role": "user", "content": countdown.render(p)}] for p in countdown.held_out(100)]
    assert prompts.isdisjoint(render_chat(tokenizer, chat) for chat in shown)


def test_a_threshold_leaves_out_the_share_it_is_made_for():
    case = tiny_case(DTOConfig(confidence_threshold=None, max_generations=2), ablated=False)
    for share in (0.0, 0.5, 1.0):
        threshold = gradient_threshold(case.lm, case.rm, case.config, case.problems, share)
        config = dataclasses.replace(case.config, grad_threshold=threshold)
        loop = CountingLoop(case.lm, case.rm, config)
        decode(loop, case.problems)
        assert loop.positions()["left_out"] == pytest.approx(share, abs=0.3)


def test_names_of_cases_are_their_own():
    for quick in (False, True):
        names = [named.name for named in named_cases(quick=quick)]
        assert len(names) == len(set(names)) == 9


def test_command_prints_one_object(capsys):
    status = main(["bench", "decode", "--quick", "--json", "--cases", "V=1000, L=12, greedy", "lengths: 8"])
    captured = capsys.readouterr()
    assert status == 0
    results = json.loads(captured.out)
    (entry,) = results["cases"]
    assert results["median_speedup"] == entry["speedup"]
    assert [row["tokens"] for row in results["lengths"]] == [8]
    assert (results["quick"], results["interrupted"], results["generate"]) == (True, False, None)
    assert results["environment"]["threads"] >= 1
    assert entry["name"] in captured.err

    readme = pytest.importorskip("tools.tables", reason="not run from a checkout")
    with pytest.raises(SystemExit, match="quick"):
        readme.decode_tables(results)
    text = readme.decode_tables(results | {"quick": False})
    assert f"| 1 | {entry['name']} |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_command_keeps_what_an_interruption_leaves(capsys, monkeypatch):
    measure = bench.measure

    def interrupted(case: Case, *arguments) -> dict:
        if "greedy" in case.name:
            raise KeyboardInterrupt
        return measure(case, *arguments)

    monkeypatch.setattr(bench, "measure", interrupted)
    assert main(["bench", "decode", "--quick", "--json", "--cases", "V=1000, L=12"]) == 130
    results = json.loads(capsys.readouterr().out)
    assert results["interrupted"]
    assert [entry["name"] for entry in results["cases"]] == ["random, V=1000, L=12, sampled rollouts"]


def test_command_prints_tables(capsys):
    assert main(["bench", "decode", "--quick", "--cases", "lengths", "beside the release"]) == 0
    out = capsys.readouterr().out
    for title in ("the cases", "seconds", "counts", "token passes of both models", "by length"):
        assert f"Decoding: {title}" in out or f"Decoding: token passes {title}" in out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--cases", "no such"], "--cases 'no such' is in no name; there are: bundled, one prompt"),
    ],
)
def test_command_refuses_in_one_line(capsys, flags: list[str], line: str):
    assert main(["bench", "decode", *flags]) == 2
    assert line in capsys.readouterr().err


def test_a_checkpoints_shape():
    entries = [measure_shape(CPU, dtype, 2, lambda name: None, quick=True) for dtype in DTYPES]
    for entry in entries:
        assert all(value > 0 for value in entry["seconds"].values())
        assert entry["speedup"] == entry["seconds"]["sequential"] / entry["seconds"]["batched"]
        assert entry["generations"]["sequential"] <= entry["rollouts"] == 6
    assert entries[1]["same_tokens"] == entries[1]["prompts"] == 2
    seconds, stages = tables({"shapes": entries})
    assert seconds.header == ["", "bfloat16", "float32"]
    assert all(len(row) == 3 for row in seconds.rows)
    assert len(stages.rows) == 6
