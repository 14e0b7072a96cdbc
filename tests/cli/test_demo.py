"""``nabla-fast demo``: its figures, its table, its errors."""

from __future__ import annotations

import json
import re

import pytest

from nabla_fast.demo import countdown
from nabla_fast.demo.statistics import wilson


def test_demo_without_rejection(run):
    assert run("demo", "--problems", "1", "--no-rejection", "--resample-temperature", "1.5")[0] == 0


@pytest.mark.smoke
def test_demo_solves_problems_and_counts_the_work(run):
    status, out, err = run("demo", "--problems", "2", "--json")
    assert status == 0
    document = json.loads(out)
    assert (document["problems"], document["seed"]) == (2, 0)
    methods = {"greedy", "self_consistency", "best_of_n", "nabla", "nabla_sequential"}
    assert set(document["methods"]) == methods
    for name, method in document["methods"].items():
        assert 0 <= method["ci95"][0] <= method["accuracy"] <= method["ci95"][1] <= 1
        assert method["seconds"] > 0
        assert method["token_passes"]["lm"] >= method["generated_tokens"] > 0
        assert (method["token_passes"]["rm"] > 0) == (name not in ("greedy", "self_consistency"))
    assert document["methods"]["best_of_n"]["rollouts"] == 16
    assert document["methods"]["greedy"]["rollouts"] == 2
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
    number = r"\d+\.\d\d"
    cost = rf"∇\(8\) took {number} times the token passes of Best-of-8 and {number} times its seconds"
    assert re.search(cost, out)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--problems", "0"], "--problems must be at least 1"),
        (["--seed", "-1"], "--seed must be"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--problems", "10000000"], "--problems 10000000"),
    ],
)
def test_demo_refuses_in_one_line(run, monkeypatch, flags: list[str], line: str):
    # With so few sets of numbers all problems are soon found.
    monkeypatch.setattr(countdown, "number_sets", lambda count: [tuple(range(2, 2 + count))])
    status, _, err = run("demo", *flags)
    assert status == 2
    assert line in err


def test_wilson_interval_against_known_values():
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
