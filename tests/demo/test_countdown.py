"""The Countdown task: its checker, its splits and its votes. No torch needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nabla_fast.demo import countdown
from nabla_fast.demo.countdown import Problem, check, held_out, majority, sample, solutions, vote_key

PROBLEM = Problem((4, 7, 2, 9), 61)


@pytest.mark.parametrize(
    "answer",
    [
        "7*9=63,63-4=59,59+2=61",
        "9*7=63,2+63=65,65-4=61",
        "7*9=63,4-2=2,63-2=61",
    ],
)
def test_right_answers(answer):
    assert check(PROBLEM, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "61",
        "61=61",
        "7*9=63,63-4=59",  # a number is left
        "7*9=63,63-4=59,59+2=62",  # false arithmetic
        "7*9=63,63-4=59,59-2=57",  # true, but not the target
        "7*9=63,63-4=59,59+2=61,61+0=61",  # a step too many
        "7*9=63,9-7=2,63-2=61",  # numbers used twice
        "8*8=64,64-4=60,60+1=61",  # numbers that are not there
        "7*9=63,2-4=-2,63-2=61",  # a negative intermediate
        "4*7=28,28*9=252,252-2=250",  # beyond MAX_VALUE
        "7*9=63, 63-4=59, 59+2=61",  # spaces
        "07*9=63,63-4=59,59+2=61",  # a leading zero
        "7*9=63,63-4=59,59+2=61\n",
        "7*9=63,63-4=59,59+2=61<|end|>",
        "７*9=63,63-4=59,59+2=61",  # a full-width digit, which int() would read
        "7**9=63,63-4=59,59+2=61",
        "7*9=63,63-4=59,__import__('os')=61",
        "9" * 100_000,
        "," * 100_000,
        "7*9=63;63-4=59;59+2=61",
    ],
)
def test_wrong_answers(answer):
    assert not check(PROBLEM, answer)


def test_equal_numbers_are_each_used_once():
    problem = Problem((3, 3, 3), 12)
    assert check(problem, "3*3=9,9+3=12")
    assert not check(problem, "3*3=9,3+9=12,12*1=12")
    assert not check(Problem((3, 3), 9), "3*3=9,9+0=9")
    assert not check(Problem((3, 4), 6), "3+3=6")


def test_an_intermediate_equal_to_a_given_number_is_another_number():
    assert check(Problem((2, 2, 4), 8), "2+2=4,4+4=8")
    assert not check(Problem((2, 2, 4), 4), "2+2=4,2+2=4")


@pytest.mark.parametrize("numbers", [(1, 1, 1), (2, 3, 7), (4, 7, 2, 9), (20, 20, 20, 20)])
def test_enumeration(numbers):
    by_target = solutions(numbers)
    assert frozenset(by_target) == countdown.reachable(numbers)
    for target, answers in by_target.items():
        assert 1 <= target <= countdown.MAX_VALUE
        assert len(set(answers)) == len(answers) > 0
        assert max(map(len, answers)) <= countdown.MAX_ANSWER_CHARS
        assert all(check(Problem(numbers, target), answer) for answer in answers)


def test_samples_are_solvable_distinct_and_repeatable():
    problems = held_out(300, seed=7)
    assert problems == held_out(300, seed=7)
    assert problems[:100] == held_out(100, seed=7)
    assert problems != held_out(300, seed=8)
    assert len({(tuple(sorted(p.numbers)), p.target) for p in problems}) == 300
    assert all(p.target in countdown.reachable(tuple(sorted(p.numbers))) for p in problems)
    assert {len(p.numbers) for p in problems} == {3, 4}


def test_splits_are_disjoint_and_ignore_order():
    keys = {}
    for split in ("lm", "rm", "held_out"):
        problems = sample(split, 400, seed=0)
        assert all(countdown.split_of(p) == split for p in problems)
        keys[split] = {(tuple(sorted(p.numbers)), p.target) for p in problems}
    assert not keys["lm"] & keys["rm"]
    assert not keys["lm"] & keys["held_out"]
    assert not keys["rm"] & keys["held_out"]
    split = countdown.split_of(PROBLEM)
    assert split == countdown.split_of(Problem((9, 2, 7, 4), 61))


def test_split_is_pinned():
    """The bundled models were trained with this hash: another one would leak held-out problems."""
    splits = [countdown.split_of(Problem((1, 2, 3), target)) for target in range(1, 10)]
    assert splits == ["lm", "lm", "lm", "lm", "lm", "rm", "lm", "lm", "rm"]


def test_sample_refuses_what_it_cannot_do(monkeypatch):
    assert held_out(0) == []
    with pytest.raises(ValueError, match="negative"):
        held_out(-1)
    monkeypatch.setattr(countdown, "LARGEST_NUMBER", 1)
    with pytest.raises(ValueError, match="hardly more"):
        held_out(10)


def test_render():
    assert countdown.render(PROBLEM) == "4 7 2 9 -> 61"


def test_votes():
    assert vote_key("7*9=63,63-4=59,59+2=61") == vote_key("9*7=63,63-4=59,2+59=61")
    assert vote_key("1+2=3,4*5=20,20-3=17") == vote_key("4*5=20,2+1=3,20-3=17")
    assert vote_key("9-7=2") != vote_key("7-9=2")
    assert vote_key("1+1=3") is not None  # a vote does not know what is right
    assert vote_key("no idea") is None
    assert majority(["1+2=3", "oops", "2*2=4", "2+1=3"]) == "1+2=3"
    assert majority(["2*2=4", "1+2=3"]) == "2*2=4"
    assert majority(["oops", ""]) is None
    assert majority([]) is None


def test_needs_no_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('countdown', {countdown.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['countdown'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and module.held_out(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
