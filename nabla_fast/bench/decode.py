"""The decode benchmark: what the batched loop is worth, the tokens compared before any time.

Every way of decoding a case is a side. Each side runs once to warm up and to have its tokens compared;
where a side returns other tokens, everything is run anew with the models in float64. Then the sides take
turns, and a time is the median of a side's turns.

Of half-precision models the tokens compared are those of the sequential loop on a float32 copy of the
weights, which is the arithmetic of the package's own passes. The sequential loop that is timed runs the
models' modules, which round between layers: how many prompts it answers alike is counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from nabla_fast.bench.decode_cases import Case, describe
from nabla_fast.bench.decode_runs import CountingLoop, Run, best_of_n, decode
from nabla_fast.bench.release_form import ReleaseFormLoop
from nabla_fast.decode.batched.accelerations import Accelerations
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.batched.sample_loop import SampleLoop
from nabla_fast.decode.reference.loop import SequentialLoop

# A side slower than the first is timed once, and one slower than the second by its first run.
_SLOW_SECONDS, _SLOWEST_SECONDS = 8.0, 30.0

# Letters of the accelerations, in the order of their fields.
LETTERS = dict(zip((field.name for field in fields(Accelerations)), "ABCDEFG", strict=True))

OnSide = Callable[[str], None]
Sides = dict[str, Callable[[], Run]]

_WITHOUT = "without "


class Examination:
    """A case whose sides have each run once.

    Attributes:
        sides: what runs each side again.
        first: each side's first run.
        same: sides whose tokens are the sequential loop's; Best-of-N has none to compare.
        entry: the benchmark's JSON of the case, without times.
    """

    def __init__(self, case: Case, on_side: OnSide = lambda name: None):
        differing = self._run(case, on_side)
        narrow = case.lm.table.dtype != torch.float64
        if differing and narrow:
            case = case.in_dtype(torch.float64)
            self._run(case, lambda name: on_side(f"{name}, in float64"))
        self.entry = self._entry(case, differing if narrow else [])

    def _run(self, case: Case, on_side: OnSide) -> list[str]:
        """Run all sides; those that differ."""
        on_side("sequential")
        exact = case.in_dtype(torch.float32) if case.is_half else case
        counting = CountingLoop(exact.lm, exact.rm, exact.config)
        expected = decode(counting, exact.problems)
        self._positions = counting.positions()
        samples = max(1, round(expected.total("generations") / len(case.problems)))
        self.sides = _sides(case, samples)
        sequential = self.sides["sequential"]() if case.is_half else expected
        self.first = {"sequential": sequential}
        for name, side in self.sides.items():
            if name != "sequential":
                on_side(name)
                self.first[name] = side()
        by_modules = ("sequential", "release_form")
        self.same = {
            name
            for name, run in self.first.items()
            if run.has_tokens_of(sequential if name in by_modules else expected)
        }
        self._same_prompts = sum(sequential.tokens[n] == tokens for n, tokens in expected.tokens.items())
        return [name for name in self.first if name not in self.same]

    def _entry(self, case: Case, differed: list[str]) -> dict[str, Any]:
        first, count = self.first, len(case.problems)
        sequential, fast = first["sequential"], first["fast"]
        passes = {name: run.token_passes() for name, run in first.items() if not name.startswith(_WITHOUT)}
        loops = ("sequential", "fast")
        entry: dict[str, Any] = {
            "name": case.name,
            "config": describe(case.config),
            "note": case.note,
            "prompts": count,
            "batch_size": case.batch_size,
            "dtype": str(case.lm.table.dtype).removeprefix("torch."),
            "differed_in_float32": differed,
            "same_tokens": {"fast", "one_proposal"} <= self.same,
            "same_prompts_by_modules": self._same_prompts,
            "generations": sequential.total("generations") / count,
            "samples": first["best_of_n"].total("generations") // count,
            "answer_tokens": sum(map(len, sequential.tokens.values())) / count,
            "positions": self._positions,
            "trajectories": sequential.trajectories,
            "gradient_passes": {name: first[name].total("gradient_passes") for name in loops},
            "rounds": {name: first[name].total("rounds") for name in loops},
            "speculated": fast.total("speculated") / count,
            "wasted_tokens": fast.total("wasted_tokens"),
            "drafted": fast.total("drafted"),
            "draft_hits": fast.total("draft_hits"),
            "token_passes": passes,
            "passes_to_best_of_n": {
                name: passes[name] / passes["best_of_n"] for name in passes if name != "best_of_n"
            },
            "passes_for": {name: first[name].shares() for name in ("fast", "one_proposal")},
            "ablation": [],
        }
        if case.release_form:
            entry["release_form"] = {"same_tokens": "release_form" in self.same}
        for name, letter in LETTERS.items():
            side = _WITHOUT + name
            if side in first:
                row = {"off": name, "letter": letter, "same_tokens": side in self.same}
                entry["ablation"].append(row | {"token_passes": first[side].token_passes()})
        return entry


def measure(case: Case, repeats: int = 3, on_side: OnSide = lambda name: None) -> dict[str, Any]:
    """One entry of the benchmark's JSON; a case whose tokens differ has no times, nor has such a side."""
    examined = Examination(case, on_side)
    entry, first = examined.entry, examined.first
    if not entry["same_tokens"]:
        return entry
    runs: dict[str, list[Run]] = {name: [] for name in examined.sides if name in examined.same}
    for name, done in runs.items():
        if first[name].seconds > _SLOWEST_SECONDS:
            done.append(first[name])
    for turn in range(repeats):
        for name, done in runs.items():
            if not done or first[name].seconds <= _SLOW_SECONDS:
                on_side(f"{name}, run {turn + 1} of {repeats}")
                done.append(examined.sides[name]())
    seconds = {name: statistics.median(run.seconds for run in done) for name, done in runs.items()}
    fast = seconds["fast"]
    entry["seconds"] = {name: value for name, value in seconds.items() if not name.startswith(_WITHOUT)}
    entry["timed_runs"] = {name: len(runs[name]) for name in entry["seconds"]}
    entry["speedup"] = seconds["sequential"] / fast
    entry["seconds_to_best_of_n"] = fast / seconds["best_of_n"]
    if "release_form" in seconds:
        entry["speedup_over_release_form"] = seconds["release_form"] / fast
        done = runs["release_form"]
        # The passes over [L, V] alone, to be compared with the release's own.
        step = statistics.median(run.stages()["descent"] / run.steps for run in done if run.steps)
        entry["release_form"] |= {"steps": done[0].steps, "seconds_a_step": step}
    entry["stage_seconds"] = {
        name: _medians([run.stages() for run in runs[name]]) for name in ("sequential", "fast")
    }
    for row in entry["ablation"]:
        if row["same_tokens"]:
            row["seconds"] = seconds[_WITHOUT + row["off"]]
            row["slowdown"] = row["seconds"] / fast
    return entry


def all_same(entry: dict[str, Any]) -> bool:
    """Whether every side of an entry returned the sequential loop's tokens."""
    rows = [entry, *entry.get("ablation", ()), entry.get("release_form", entry)]
    return all(row["same_tokens"] for row in rows)


def _sides(case: Case, samples: int) -> Sides:
    given = (case.lm, case.rm, case.config)
    loops: dict[str, SequentialLoop | BatchedLoop] = {
        "sequential": SequentialLoop(*given),
        "fast": BatchedLoop(*given, batch_size=case.batch_size),
        "one_proposal": BatchedLoop(*given, batch_size=case.batch_size, proposals=1),
    }
    if case.release_form:
        loops["release_form"] = ReleaseFormLoop(*given)
    for name in LETTERS if case.ablated else ():
        # Company is other prompts' too.
        batch_size = 1 if name == "batching" else case.batch_size
        without = replace(Accelerations(), **{name: False})
        loops[_WITHOUT + name] = BatchedLoop(*given, batch_size=batch_size, accelerations=without)
    sides: Sides = {name: lambda loop=loop: decode(loop, case.problems) for name, loop in loops.items()}
    sampling, most = case.config.rollout_sampling, case.batch_size * samples
    sampler = SampleLoop(case.lm, case.rm, sampling, count=samples, batch_size=most)
    return sides | {"best_of_n": lambda: best_of_n(sampler, case.problems)}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in runs[0]}
