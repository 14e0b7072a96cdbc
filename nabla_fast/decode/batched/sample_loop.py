"""Many responses to each of many prompts, by the batched loop's passes and without a descent."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.batched.executor import Executor
from nabla_fast.decode.batched.loop import BatchedLoop
from nabla_fast.decode.batched.pools import RewardSequences, SequenceGroups
from nabla_fast.decode.batched.problem_state import Request
from nabla_fast.decode.batched.requests import Read, Sample, Score
from nabla_fast.decode.batched.steps import Capture
from nabla_fast.decode.draws import PhiloxStream
from nabla_fast.decode.problem import Decoded, Problem
from nabla_fast.decode.rewarding import expect_finite
from nabla_fast.models import LanguageModel, Reward, RewardSum
from nabla_fast.models.readers import FrozenSequence
from nabla_fast.models.reward_sequence import ScoreMemory
from nabla_fast.models.whole_reader import OwnForward, WholeReader
from nabla_fast.results import Stats


def sample_config(sampling: SamplingConfig) -> DTOConfig:
    """A configuration of rollouts alone: no gradient is taken, and draws are Philox's."""
    return DTOConfig(
        max_generations=1, nll_coeff=0.0, reward_coeff=0.0, rollout_sampling=sampling, draws="philox"
    )


class SampleLoop(BatchedLoop):
    """Draws ``count`` responses to each problem, and scores them where there is a reward model.

    A prompt is read once, and so is what the reward model reads before a response; a response that has
    ended leaves the batch. Response n of a problem draws from the stream (seed, length of the prompt, n):
    it depends neither on other problems nor on the other responses.

    Args:
        lm, rm, max_kv_tokens, turns, capture: as of :class:`BatchedLoop`.
        count: responses a problem, ≥ 1.
        batch_size: responses rolled out at once, ≥ 1: of as many problems as fit in whole, of one at least.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rm: RewardSum | Reward | None,
        sampling: SamplingConfig,
        *,
        count: int,
        batch_size: int = 128,
        max_kv_tokens: int | None = None,
        turns: int | None = None,
        capture: Capture | None = None,
    ):
        super().__init__(
            lm,
            rm,
            sample_config(sampling),
            batch_size=max(1, batch_size // count),
            max_kv_tokens=max_kv_tokens,
            turns=turns,
            capture=capture,
        )
        self._count, self._most = count, batch_size

    def _steps(
        self,
        problem: Problem,
        groups: SequenceGroups,
        stats: Stats,
        active_problems: Callable[[], int],
    ) -> Generator[list[Request], None, list[Decoded]]:
        return _SampleState(self._executor, groups, problem, stats).steps(self._count, self._most)


class _SampleState:
    """The responses of one problem."""

    def __init__(self, executor: Executor, groups: SequenceGroups, problem: Problem, stats: Stats):
        self._executor, self._groups, self._problem, self._stats = executor, groups, problem, stats

    def steps(self, count: int, most: int) -> Generator[list[Request], None, list[Decoded]]:
        """Yield requests until all responses are there, at most ``most`` rollouts at once."""
        problem, stats = self._problem, self._stats
        prompt = Read(problem, stats, None, self._groups.lm.sequence(), problem.prompt_ids)
        prefixes = self._prefixes()
        yield [prompt, *(read for read in prefixes if isinstance(read, Read))]
        bases = RewardSequences(read.sequence if isinstance(read, Read) else read for read in prefixes)
        memories: list[ScoreMemory] = [{} for _ in bases]
        decoded: list[Decoded] = []
        for start in range(0, count, most):
            samples = list(self._samples(prompt, range(start, min(start + most, count))))
            stats.generations += len(samples)
            stats.rounds += 1
            yield samples
            responses = [sample.tokens for sample in samples]
            stats.llm_calls += sum(map(len, responses))
            rewards: list[float | None] = [None] * len(responses)
            if self._executor.rm is not None:
                # Forks of the bases, in which what precedes a response has been read.
                scores = [Score(problem, stats, bases, 0, response, memories) for response in responses]
                yield scores
                rewards = [expect_finite(score.reward, score.response) for score in scores]
                for score in scores:
                    score.sequences.free()
            decoded += [Decoded(*pair, []) for pair in zip(responses, rewards, strict=True)]
        return decoded

    def _samples(self, prompt: Read, numbers: range) -> Iterator[Sample]:
        ids, seed = self._problem.prompt_ids, self._problem.seed
        for n in numbers:
            stream = PhiloxStream(seed, len(ids), n)
            yield Sample(
                self._problem,
                self._stats,
                prompt.sequence,
                len(ids),
                [],
                stream,
                [],
                state=prompt.state,
            )

    def _prefixes(self) -> list[Read | FrozenSequence]:
        """What is to be read before a response, one a reward; an empty sequence where nothing is kept."""
        found: list[Read | FrozenSequence] = []
        for n, reader in enumerate(self._executor.reward_readers):
            empty, (before, _) = self._groups.rewards[n].sequence(), self._problem.reward_context(n)
            keeps = not isinstance(reader, (OwnForward, WholeReader))
            read = Read(self._problem, self._stats, n, empty, before, purpose="score")
            found.append(read if keeps and before else empty)
        return found
