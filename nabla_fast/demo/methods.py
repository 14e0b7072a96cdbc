"""Four ways to answer held-out Countdown problems with the bundled models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nabla_fast.best_of_n import sample_batch
from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer
from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.prompts import render_chat, response_tail
from nabla_fast.decode.timing import PeakMemory
from nabla_fast.decoder import NablaDecoder
from nabla_fast.demo import countdown
from nabla_fast.demo.statistics import wilson
from nabla_fast.models import LanguageModel, RewardModel, VocabularyAlignment
from nabla_fast.results import Result, Stats

SAMPLES = 8  # of self-consistency and Best-of-N, and the generations ∇ may use
MAX_NEW_TOKENS = 40  # the longest answer has 26 characters and an EOS
BATCH = 256  # responses rolled out, and sequences scored, at a time
SAMPLING = SamplingConfig(temperature=0.7, top_k=20, top_p=0.8)
GREEDY = SamplingConfig(temperature=0.0)
CONFIG = DTOConfig(max_generations=SAMPLES, rollout_sampling=SAMPLING)

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
        self._decoders = {
            loop: NablaDecoder(
                lm, rm, self.tokenizer, config=config, loop=loop, batch_size=BATCH // SAMPLES
            )
            for loop in ("batched", "sequential")
        }
        self._lm, self._rm = LanguageModel(lm), RewardModel(rm, VocabularyAlignment.identity())
        self._tail = response_tail(self.tokenizer)

    def greedy(self, problems: Sequence[countdown.Problem], report: MethodReport, advance: Advance) -> None:
        """The likeliest token at each position."""
        with _measured(report, self._lm):
            for start in range(0, len(problems), BATCH):
                part = problems[start : start + BATCH]
                answers, _ = self._sample(part, 1, GREEDY, 0, report.stats)
                self._finish(part, [texts[0] for texts in answers], report, advance)

    def self_consistency(
        self, problems: Sequence[countdown.Problem], seed: int, report: MethodReport, advance: Advance
    ) -> None:
        """The most frequent of N sampled answers."""
        with _measured(report, self._lm):
            for start in range(0, len(problems), BATCH // SAMPLES):
                part = problems[start : start + BATCH // SAMPLES]
                answers, _ = self._sample(part, SAMPLES, SAMPLING, seed + start, report.stats)
                chosen = [countdown.majority(texts) or texts[0] for texts in answers]
                self._finish(part, chosen, report, advance)

    def best_of_n(
        self, problems: Sequence[countdown.Problem], seed: int, report: MethodReport, advance: Advance
    ) -> None:
        """The one of N sampled answers that the reward model likes best."""
        with _measured(report, self._lm):
            for start in range(0, len(problems), BATCH // SAMPLES):
                part = problems[start : start + BATCH // SAMPLES]
                answers, responses = self._sample(part, SAMPLES, SAMPLING, seed + start, report.stats)
                sequences = [
                    [*self._prompt(problem), *response, *self._tail]
                    for problem, group in zip(part, responses, strict=True)
                    for response in group
                ]
                report.stats.token_passes["rm"] += sum(map(len, sequences))
                rewards = self._rm.score(sequences).view(len(part), SAMPLES)
                best = rewards.argmax(dim=1).tolist()
                chosen = [texts[b] for texts, b in zip(answers, best, strict=True)]
                self._finish(part, chosen, report, advance)

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

        peaks: list[int] = []

        def on_result(n: int, result: Result) -> None:
            results[n] = result
            _add(report.stats, result.stats)
            peaks.append(result.stats.peak_bytes or 0)
            self._finish([problems[n]], [result.text], report, advance)

        with _measured(report, self._lm):
            self._decoders[loop].generate(
                [countdown.render(problem) for problem in problems],
                seed=[seed + n for n in range(len(problems))],
                max_new_tokens=MAX_NEW_TOKENS,
                on_result=on_result,
            )
        report.peak_bytes = max(peaks, default=None)  # the decoder measures a call's own

    def _prompt(self, problem: countdown.Problem) -> tuple[int, ...]:
        return render_chat(self.tokenizer, [{"role": "user", "content": countdown.render(problem)}])

    def _sample(
        self,
        problems: Sequence[countdown.Problem],
        count: int,
        sampling: SamplingConfig,
        seed: int,
        stats: Stats,
    ) -> tuple[list[list[str]], list[list[list[int]]]]:
        """Texts and tokens of ``count`` responses a problem."""
        prompts = [self._prompt(problem) for problem in problems]
        responses = sample_batch(self._lm, prompts, count, sampling, seed, MAX_NEW_TOKENS, stats)
        texts = [self.tokenizer.batch_decode(group, skip_special_tokens=True) for group in responses]
        return texts, responses

    @staticmethod
    def _finish(
        problems: Sequence[countdown.Problem],
        answers: Sequence[str],
        report: MethodReport,
        advance: Advance,
    ) -> None:
        report.correct += [countdown.check(p, a) for p, a in zip(problems, answers, strict=True)]
        advance(len(problems))


class _measured:
    """Wall-clock and peak memory of a method, also where it is interrupted."""

    def __init__(self, report: MethodReport, lm: LanguageModel):
        self._report, self._peak, self._start = report, PeakMemory(lm.device), time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._report.seconds = time.perf_counter() - self._start
        self._report.peak_bytes = self._peak.bytes()


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
