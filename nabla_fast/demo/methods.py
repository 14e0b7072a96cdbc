"""Four ways to answer held-out Countdown problems with the bundled models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer
from nabla_fast.config import DTOConfig
from nabla_fast.decoder import NablaDecoder
from nabla_fast.demo import countdown
from nabla_fast.demo.settings import BATCH, CONFIG, GREEDY, MAX_NEW_TOKENS, SAMPLES, SAMPLING
from nabla_fast.demo.statistics import wilson
from nabla_fast.results import Result, SampleResult, Stats
from nabla_fast.sampler import Sampler

Advance = Callable[[int], None]


@dataclass
class MethodReport:
    """Answers, accuracy and cost of one method on the problems it has done.

    Attributes:
        correct: one flag a problem done.
        stats: cost, summed over those problems.
        seconds: wall-clock.
        peak_bytes: most memory above the start's, or None where the platform does not tell.
    """

    correct: list[bool] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    seconds: float = 0.0
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry of the demo's JSON."""
        solved, done = sum(self.correct), len(self.correct)
        return {
            "accuracy": solved / done if done else None,
            "ci95": list(wilson(solved, done)) if done else None,
            "problems": done,
            "rollouts": self.stats.generations,
            "rounds": self.stats.rounds,
            "generated_tokens": self.stats.generated_tokens,
            "token_passes": dict(self.stats.token_passes),
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }


class Demo:
    """The bundled models, and the methods that use them.

    Args:
        device: a torch device.
        dtype: of the models; see ``load_language_model``.
        config: of ∇-decoding.
    """

    def __init__(self, device: str = "cpu", dtype: str = "auto", config: DTOConfig = CONFIG):
        self.tokenizer = load_tokenizer(bundled("tokenizer"))
        lm, rm = (
            load_language_model(bundled("lm"), device, dtype),
            load_reward_model(bundled("rm"), device, dtype),
        )
        given = lm, rm, self.tokenizer
        self._decoders = {
            loop: NablaDecoder(*given, config=config, loop=loop, batch_size=BATCH // SAMPLES)
            for loop in ("batched", "sequential")
        }
        self._greedy = Sampler(lm, None, self.tokenizer, sampling=GREEDY, batch_size=BATCH)
        self._several, self._best = (
            Sampler(lm, judge, self.tokenizer, count=SAMPLES, sampling=SAMPLING, batch_size=BATCH)
            for judge in (None, rm)
        )

    def greedy(self, problems: Sequence[countdown.Problem], report: MethodReport, advance: Advance) -> None:
        """The likeliest token at each position."""
        self._answer(self._greedy, problems, 0, report, advance, lambda n, result: result.text)

    def self_consistency(
        self, problems: Sequence[countdown.Problem], seed: int, report: MethodReport, advance: Advance
    ) -> None:
        """The most frequent of N sampled answers."""

        def most_frequent(n: int, result: SampleResult) -> str:
            return countdown.majority([candidate.text for candidate in result.candidates]) or result.text

        self._answer(self._several, problems, seed, report, advance, most_frequent)

    def best_of_n(
        self, problems: Sequence[countdown.Problem], seed: int, report: MethodReport, advance: Advance
    ) -> None:
        """The one of N sampled answers that the reward model likes best."""
        self._answer(self._best, problems, seed, report, advance, lambda n, result: result.text)

    def nabla(
        self,
        problems: Sequence[countdown.Problem],
        seed: int,
        report: MethodReport,
        advance: Advance,
        *,
        loop: str,
        results: dict[int, Result],
    ) -> None:
        """∇-decoding by the "batched" or the "sequential" loop; ``results`` receives what it returns."""

        def kept(n: int, result: Result) -> str:
            results[n] = result
            return result.text

        self._answer(self._decoders[loop], problems, seed, report, advance, kept)

    def _answer(
        self,
        decoder: NablaDecoder,
        problems: Sequence[countdown.Problem],
        seed: int,
        report: MethodReport,
        advance: Advance,
        chosen: Callable[[int, Any], str],
    ) -> None:
        """Decode all problems; ``chosen`` gives the answer of a problem's index and result."""
        peaks: list[int] = []

        def on_result(n: int, result: Result) -> None:
            _add(report.stats, result.stats)
            peaks.append(result.stats.peak_bytes or 0)
            report.correct.append(countdown.check(problems[n], chosen(n, result)))
            advance(1)

        start = time.perf_counter()
        try:
            decoder.generate(
                [countdown.render(problem) for problem in problems],
                seed=[seed + n for n in range(len(problems))],
                max_new_tokens=MAX_NEW_TOKENS,
                on_result=on_result,
            )
        finally:  # also where it is interrupted
            report.seconds = time.perf_counter() - start
            report.peak_bytes = max(peaks, default=None)


def _add(total: Stats, part: Stats) -> None:
    for name in (
        "generations",
        "rejections",
        "speculated",
        "rounds",
        "generated_tokens",
        "gradient_passes",
    ):
        setattr(total, name, getattr(total, name) + getattr(part, name))
    for model, passes in part.token_passes.items():
        total.token_passes[model] += passes
