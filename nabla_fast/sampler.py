"""Sampling and Best-of-N, by the passes that the decoder's rollouts take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.batched.sample_loop import SampleLoop, sample_config
from nabla_fast.decode.problem import Decoded, Problem
from nabla_fast.decode.prompts import Prompt, RewardContext
from nabla_fast.decoder import NablaDecoder
from nabla_fast.errors import InputError
from nabla_fast.models import LanguageModel, RewardSum, VocabularyAlignment
from nabla_fast.models.given_rewards import GivenReward
from nabla_fast.ops.draw_tokens import MOST_VISITS
from nabla_fast.results import Candidate, Result, SampleResult, Stats


class Sampler(NablaDecoder):
    """Draws several responses to each prompt; with a reward model the best of them is the answer.

    The models are read as the decoder reads them, without a gradient: a prompt once, however many responses
    it gets. :meth:`generate` and :meth:`stream` are the decoder's, their results :class:`SampleResult`. Who
    samples once needs no more than :func:`sample` and :func:`best_of_n`.

    Response n of a prompt is drawn by :func:`nabla_fast.ops.draw_tokens`, its noise a function of the
    prompt's seed, the prompt's length, n, position and token. It depends neither on other prompts nor on
    ``count`` nor on the batch; response 0 is the first rollout of a decoder with ``draws="philox"``. The
    same prompt under the same seed gets the same responses: more of them are had by ``count``. (The
    models' own products are not the same to the last bit in every batch: a token that wins by no more than
    their rounding may be another one there.)

    Args:
        lm, tokenizer, reward_tokenizer, alignment: as of :class:`NablaDecoder`.
        reward_model: as there; None: nothing is scored, and the answer is the first response.
        count: responses a prompt, from 1 to 2³⁰.
        sampling: how tokens are drawn; T ≤ 0 is greedy. None: temperature 0.7, top-k 20, top-p 0.8.
        batch_size: responses rolled out, and scored, at once: those of as many prompts as fit in whole.
        max_kv_tokens: most tokens whose keys and values are held at once, a model; None for no limit.
    Raises:
        ModelError: a model has a feature that is not supported, which the line names.
        InputError: an argument is wrong, or the vocabularies differ and there is no alignment.

    Example:
        >>> from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model
        >>> from nabla_fast.checkpoints import load_tokenizer
        >>> lm, rm = load_language_model(bundled("lm")), load_reward_model(bundled("rm"))
        >>> sampler = Sampler(lm, rm, load_tokenizer(bundled("tokenizer")), count=4)
        >>> (result,) = sampler.generate(["7 4 10 3 -> 13"], seed=0, max_new_tokens=40)
        >>> result.reward == max(result.rewards), len(result.candidates)
        (True, 4)
    """

    _kind = SampleResult

    def __init__(
        self,
        lm: nn.Module,
        reward_model: GivenReward | None,
        tokenizer: Any,
        reward_tokenizer: Any = None,
        *,
        count: int = 1,
        sampling: SamplingConfig | None = None,
        batch_size: int = 128,
        max_kv_tokens: int | None = None,
        alignment: VocabularyAlignment | None = None,
    ):
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_VISITS:
            raise InputError(f"count must be a whole number from 1 to {MOST_VISITS}, got {count!r}")
        if sampling is not None and not isinstance(sampling, SamplingConfig):
            raise InputError(f"sampling must be a SamplingConfig, got {type(sampling).__name__}")
        self._count = count
        super().__init__(
            lm,
            reward_model,
            tokenizer,
            reward_tokenizer,
            sample_config(DTOConfig().rollout_sampling if sampling is None else sampling),
            batch_size=batch_size,
            max_kv_tokens=max_kv_tokens,
            alignment=alignment,
        )

    def _expect_gradient(self, rm: RewardSum) -> None:
        """Nothing is descended: a reward without a gradient judges like any other."""

    def _chosen_loop(self, lm: LanguageModel, rm: RewardSum | None) -> SampleLoop:
        loop = SampleLoop(
            lm,
            rm,
            self._resolved.rollout_sampling,
            count=self._count,
            batch_size=self._batch_size,
            max_kv_tokens=self._max_kv_tokens,
        )
        self._warn_if_slow(loop)
        return loop

    def _result(self, problem: Problem, decoded: list[Decoded] | Exception, stats: Stats) -> SampleResult:
        if isinstance(decoded, Exception):
            raise decoded
        found = [super(Sampler, self)._result(problem, response, stats) for response in decoded]
        candidates = [
            Candidate(r.text, r.token_ids, r.reward, r.finish_reason, r.eos_token_id) for r in found
        ]
        return SampleResult.of(candidates, stats)


def sample(
    lm: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    count: int = 1,
    sampling: SamplingConfig | None = None,
    seed: int | Sequence[int] = 42,
    max_new_tokens: int = 1024,
    system_prompt: str | None = None,
    stop: Sequence[str] = (),
    trim_stop: bool = False,
    batch_size: int = 128,
    max_kv_tokens: int | None = None,
    on_result: Callable[[int, Result], None] | None = None,
    on_error: Literal["raise", "keep"] = "raise",
) -> list[SampleResult]:
    """Draw ``count`` responses to each prompt.

    Args:
        lm, tokenizer: as of :class:`NablaDecoder`; no tokenizer is needed if prompts are token ids.
        prompts, seed, max_new_tokens, system_prompt, stop, trim_stop, on_result, on_error: as of
            :meth:`NablaDecoder.generate`.
        count, sampling, batch_size, max_kv_tokens: as of :class:`Sampler`, which says what a response
            depends on.
    Returns:
        One result a prompt, in order, whose ``candidates`` are the responses.
    Raises:
        ModelError, InputError: as of :class:`Sampler`.
        DecodingInterrupted, DecodingFailed: as of :meth:`NablaDecoder.generate`.

    Example:
        >>> from nabla_fast.checkpoints import bundled, load_language_model, load_tokenizer
        >>> lm, tokenizer = load_language_model(bundled("lm")), load_tokenizer(bundled("tokenizer"))
        >>> greedy = SamplingConfig(temperature=0)
        >>> (result,) = sample(lm, tokenizer, ["7 3 12 -> 33"], sampling=greedy, max_new_tokens=40)
        >>> result.text
        '3*7=21,12+21=33'
    """
    sampler = Sampler(
        lm,
        None,
        tokenizer,
        count=count,
        sampling=sampling,
        batch_size=batch_size,
        max_kv_tokens=max_kv_tokens,
    )
    return sampler.generate(
        prompts,
        seed=seed,
        max_new_tokens=max_new_tokens,
        system_prompt=system_prompt,
        stop=stop,
        trim_stop=trim_stop,
        on_result=on_result,
        on_error=on_error,
    )


def best_of_n(
    lm: nn.Module,
    reward_model: GivenReward,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    n: int = 8,
    sampling: SamplingConfig | None = None,
    reward_tokenizer: Any = None,
    seed: int | Sequence[int] = 42,
    max_new_tokens: int = 1024,
    system_prompt: str | None = None,
    stop: Sequence[str] = (),
    trim_stop: bool = False,
    reward_context: Sequence[RewardContext] | None = None,
    batch_size: int = 128,
    max_kv_tokens: int | None = None,
    alignment: VocabularyAlignment | None = None,
    on_result: Callable[[int, Result], None] | None = None,
    on_error: Literal["raise", "keep"] = "raise",
) -> list[SampleResult]:
    """Draw ``n`` responses to each prompt and keep the one with the highest reward, the first of equals.

    Args:
        lm, reward_model, tokenizer, reward_tokenizer, alignment: as of :class:`NablaDecoder`.
        prompts, seed, max_new_tokens, system_prompt, stop, trim_stop: as of :meth:`NablaDecoder.generate`.
        reward_context, on_result, on_error: likewise.
        n: responses a prompt; the first m of them are those of ``n=m``.
        sampling, batch_size, max_kv_tokens: as of :class:`Sampler`.
    Returns:
        One result a prompt, in order: text, tokens and reward of the best response; all of them, in the
        order of drawing, as ``candidates``.
    Raises:
        ModelError, InputError: as of :class:`Sampler`; or there is no reward model.
        DecodingInterrupted, DecodingFailed: as of :meth:`NablaDecoder.generate`.

    Example:
        >>> from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model
        >>> from nabla_fast.checkpoints import load_tokenizer
        >>> lm, rm = load_language_model(bundled("lm")), load_reward_model(bundled("rm"))
        >>> tokenizer = load_tokenizer(bundled("tokenizer"))
        >>> (result,) = best_of_n(lm, rm, tokenizer, ["7 3 12 -> 33"], n=4, seed=0, max_new_tokens=40)
        >>> result.reward == max(result.rewards)
        True
    """
    if reward_model is None:
        raise InputError("best_of_n needs a reward model; nabla_fast.sample draws without one")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise InputError(f"n must be a whole number ≥ 1, got {n!r}")
    sampler = Sampler(
        lm,
        reward_model,
        tokenizer,
        reward_tokenizer,
        count=n,
        sampling=sampling,
        batch_size=batch_size,
        max_kv_tokens=max_kv_tokens,
        alignment=alignment,
    )
    return sampler.generate(
        prompts,
        seed=seed,
        max_new_tokens=max_new_tokens,
        system_prompt=system_prompt,
        stop=stop,
        trim_stop=trim_stop,
        reward_context=reward_context,
        on_result=on_result,
        on_error=on_error,
    )
