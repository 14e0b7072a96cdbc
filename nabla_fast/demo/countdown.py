"""Countdown: reach a target from three or four small numbers with ``+``, ``-`` and ``*``.

The task of the bundled models and of ``nabla-fast demo``. A prompt names the numbers and the
target, an answer writes out every step::

    4 7 2 9 -> 61        7*9=63,63-4=59,59+2=61

Rules: each step combines two of the numbers still on the table and puts its result there instead;
every result is a whole number from 1 to ``MAX_VALUE`` (no zero, no negative intermediates); all
numbers are used exactly once; the last result is the target. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, combinations_with_replacement, permutations
from typing import Literal

Split = Literal["lm", "rm", "held_out"]

SMALLEST_NUMBER, LARGEST_NUMBER = 1, 20
MAX_VALUE = 99
FOUR_NUMBER_SHARE = 0.7  # of a split's sampled problems; the others have three numbers
MAX_ANSWER_CHARS = 26  # three steps of dd+dd=dd and two commas

# Hash buckets, of 100: the first 60 train the language model, the next 30 the reward model.
_LM_BUCKETS, _RM_BUCKETS = 60, 30

_STEP = re.compile(r"([1-9][0-9]?)([-+*])([1-9][0-9]?)=([1-9][0-9]?)")
_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True)
class Problem:
    """Numbers in the order shown, and the target to reach with them."""

    numbers: tuple[int, ...]
    target: int


def render(problem: Problem) -> str:
    """The user message that states the problem, e.g. ``"4 7 2 9 -> 61"``."""
    return f"{' '.join(map(str, problem.numbers))} -> {problem.target}"


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to, whatever the order of its numbers.

    A hash of (sorted numbers, target) decides, so the splits are disjoint on every machine.
    """
    key = f"{sorted(problem.numbers)}->{problem.target}".encode()
    bucket = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % 100
    if bucket < _LM_BUCKETS:
        return "lm"
    return "rm" if bucket < _LM_BUCKETS + _RM_BUCKETS else "held_out"


def _steps(table: tuple[int, ...]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Every step possible from the numbers on the table: (text, result, numbers left)."""
    for i, j in permutations(range(len(table)), 2):
        left, right = table[i], table[j]
        rest = tuple(v for k, v in enumerate(table) if k not in (i, j))
        for symbol, apply in _APPLY.items():
            result = apply(left, right)
            if 1 <= result <= MAX_VALUE:
                yield f"{left}{symbol}{right}={result}", result, (*rest, result)


def solutions(numbers: tuple[int, ...]) -> dict[int, list[str]]:
    """Every answer that uses all of ``numbers``, by the target it reaches; both sorted.

    Answers that differ in the order of operands or of independent steps are listed separately.
    """
    found: dict[int, set[str]] = {}

    def descend(table: tuple[int, ...], written: str) -> None:
        for text, result, left in _steps(table):
            answer = f"{written},{text}" if written else text
            if len(left) == 1:
                found.setdefault(result, set()).add(answer)
            else:
                descend(left, answer)

    descend(numbers, "")
    return {target: sorted(found[target]) for target in sorted(found)}


@lru_cache(maxsize=65536)
def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """The targets that ``numbers`` can reach; far quicker than listing the solutions."""
    if len(numbers) == 1:
        return frozenset(numbers)
    found: set[int] = set()
    indices = range(1, len(numbers))
    # The first number is always in the left part, so that no division is tried twice.
    for size in range(len(numbers) - 1):
        for chosen in combinations(indices, size):
            left = (numbers[0], *(numbers[k] for k in chosen))
            right = tuple(numbers[k] for k in indices if k not in chosen)
            for a in reachable(left):
                for b in reachable(right):
                    found.update((a + b, abs(a - b), a * b))
    return frozenset(v for v in found if 1 <= v <= MAX_VALUE)


def number_sets(count: int) -> list[tuple[int, ...]]:
    """All sorted tuples of ``count`` numbers that a problem can have."""
    numbers = range(SMALLEST_NUMBER, LARGEST_NUMBER + 1)
    return list(combinations_with_replacement(numbers, count))


def sample(split: Split, n: int, seed: int) -> list[Problem]:
    """``n`` different solvable problems of a split, the same ones for the same seed.

    Four numbers with probability ``FOUR_NUMBER_SHARE``, else three; uniform over the split's
    problems of that size; numbers shown in random order. Raises ``ValueError`` when the split
    is too small to give ``n`` problems.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    rng = random.Random(seed)
    pools = {count: number_sets(count) for count in (3, 4)}
    chosen: dict[tuple[tuple[int, ...], int], Problem] = {}
    while len(chosen) < n:
        pool = pools[4 if rng.random() < FOUR_NUMBER_SHARE else 3]
        for _ in range(100_000):
            numbers, target = rng.choice(pool), rng.randint(1, MAX_VALUE)
            is_new = (numbers, target) not in chosen
            in_split = is_new and split_of(Problem(numbers, target)) == split
            if in_split and target in reachable(numbers):
                break
        else:
            raise ValueError(f"split {split!r} has hardly more than {len(chosen)} problems")
        shown = tuple(rng.sample(numbers, len(numbers)))
        chosen[numbers, target] = Problem(shown, target)
    return list(chosen.values())


def held_out(n: int, seed: int = 0) -> list[Problem]:
    """``n`` problems that neither model was trained on; see ``sample``."""
    return sample("held_out", n, seed)


def check(problem: Problem, answer: str) -> bool:
    """Whether ``answer`` solves ``problem`` by the rules at the top of this file.

    Any string is allowed as an answer; what is not exactly comma-separated steps, without spaces
    or leading zeros, is wrong. The end-of-sequence token is not part of an answer.
    """
    table = list(problem.numbers)
    steps = answer.split(",")
    if len(steps) != len(table) - 1:
        return False
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None:
            return False
        left, right, result = (int(match[group]) for group in (1, 3, 4))
        if _APPLY[match[2]](left, right) != result:
            return False
        for used in (left, right):
            if used not in table:
                return False
            table.remove(used)
        table.append(result)
    return table == [problem.target]


def vote_key(answer: str) -> str | None:
    """The answer as self-consistency counts it, without the accidents of its order.

    Operands of ``+`` and ``*`` and the steps themselves are sorted, so two ways of writing the
    same computation are one vote. ``None``, no vote, for text that is not a list of steps; wrong
    arithmetic keeps its vote, because the vote must not know what is right.
    """
    keys = []
    for step in answer.split(","):
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        left, symbol, right, result = match.groups()
        if symbol != "-":
            left, right = sorted((left, right))
        keys.append(f"{left}{symbol}{right}={result}")
    return ",".join(sorted(keys))


def majority(answers: list[str]) -> str | None:
    """Self-consistency: the first answer whose ``vote_key`` is the most frequent.

    ``None`` when no answer has a vote. Ties go to the key that appeared first.
    """
    votes: dict[str, list[str]] = {}
    for answer in answers:
        key = vote_key(answer)
        if key is not None:
            votes.setdefault(key, []).append(answer)
    return max(votes.values(), key=len)[0] if votes else None
