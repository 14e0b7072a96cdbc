"""Costs that a decode reports, against those that the models were seen to cause."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
from tiny_models import causal_lm, reward_model, shared_lm, shared_reward_model
from torch import nn

from nabla_fast import DTOConfig, NablaDecoder, Result, SamplingConfig
from nabla_fast.models.reader import PagedReader

PROMPT, CONTEXT = [5, 9, 3, 14], ([7, 4, 11], [8])
STAGES = {"rollout", "selection", "gradient", "descent", "reward", "total"}


class Passes:
    """Counts the tokens that a transformers model's forwards and backwards go through."""

    def __init__(self):
        self.forward = self.backward = 0
        self.without_gradient: list[int] = []  # tokens of each such forward

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        read = next(tensor for tensor in given if tensor is not None)
        tokens = read.shape[0] * read.shape[1]
        self.forward += tokens
        if not output.last_hidden_state.requires_grad:
            self.without_gradient.append(tokens)
        else:
            output.last_hidden_state.register_hook(lambda _: self._went_back(tokens))

    def _went_back(self, tokens: int) -> None:
        self.backward += tokens

    @property
    def total(self) -> int:
        return self.forward + self.backward


@contextmanager
def counted(model: nn.Module) -> Iterator[Passes]:
    passes = Passes()
    handle = model.base_model.register_forward_hook(passes, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "settings",
    [
        {"relaxation": "straight_through"},
        {"relaxation": "straight_through", "update": "all", "parameter": "latents"},
        {"relaxation": "gumbel", "grad_threshold": 0.1},
        {"relaxation": "soft"},
        {"nll_coeff": 0.0, "grad_threshold": 0.1},
        {"reward_coeff": 0.0},
        {"rejection": False},
        {"max_generations": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("lm", "rm"), [("qwen2", "qwen2"), ("mistral", "bert")])
def test_token_passes_are_what_the_models_read(lm, rm, settings):
    config = DTOConfig(**{"iters": 3, "lr": 1.0, "confidence_threshold": None, **settings})
    lm, rm = shared_lm(lm, eos_token_id=None), shared_reward_model(rm)
    decoder = NablaDecoder(lm, rm, None, config=config, loop="sequential")
    with counted(lm) as read, counted(rm) as scored:
        (result,) = decoder.generate([PROMPT], max_new_tokens=7, reward_context=[CONTEXT])
    assert result.stats.token_passes == {"lm": read.total, "rm": scored.total}
    assert (read.backward > 0) == (config.nll_coeff > 0 and config.max_generations > 1)
    assert (scored.backward > 0) == (config.reward_coeff > 0 and config.max_generations > 1)


def test_rollouts_read_no_token_twice():
    lm = shared_lm("qwen2", eos_token_id=None)
    decoder = NablaDecoder(lm, None, None, config=DTOConfig(max_generations=1), loop="sequential")
    with counted(lm) as read:
        decoder.generate([PROMPT], max_new_tokens=7)
    assert read.total == len(PROMPT) + 7 - 1  # the last token is drawn and not read


def test_rollouts_share_their_prefix():
    hot = SamplingConfig(temperature=9.0)
    config = DTOConfig(iters=3, confidence_threshold=None, max_generations=4, resample_sampling=hot)
    lm, rm = shared_lm("qwen2", eos_token_id=None), shared_reward_model("qwen2")
    decoder, prompt = NablaDecoder(lm, rm, None, config=config, loop="sequential"), [3, 4] * 25
    with counted(lm) as read:
        (result,) = decoder.generate([prompt], max_new_tokens=9)
    assert result.stats.generations == 4
    assert sum(read.without_gradient) <= len(prompt) + 4 * 9


@pytest.mark.parametrize("max_generations", [1, 6])
def test_no_trajectory_is_scored_twice(max_generations):
    config = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=max_generations)
    lm, rm = shared_lm("qwen2", eos_token_id=None), shared_reward_model("qwen2")
    decoder = NablaDecoder(lm, rm, None, config=config, loop="sequential")
    with counted(rm) as scored:
        (result,) = decoder.generate([PROMPT], max_new_tokens=9, reward_context=[CONTEXT])
    assert len({revision.accepted for revision in result.revisions}) == (max_generations > 1) * 2
    assert len(scored.without_gradient) == 1 + len(result.revisions)


def test_fields_are_filled():
    config = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, grad_threshold=0.0, max_generations=4)
    decoder = NablaDecoder(
        shared_lm("qwen2", eos_token_id=None),
        shared_reward_model("qwen2"),
        None,
        config=config,
        loop="sequential",
    )
    (result,) = decoder.generate([PROMPT], max_new_tokens=7, reward_context=[CONTEXT])
    stats = result.stats
    assert stats.generations == 4
    assert (stats.rounds, stats.speculated) == (4, 0)
    assert stats.gradient_passes >= 2 * len(result.revisions)  # one to select, one to descend
    assert set(stats.seconds) == STAGES
    assert all(seconds > 0 for seconds in stats.seconds.values())
    stages = sum(seconds for stage, seconds in stats.seconds.items() if stage != "total")
    assert stages <= stats.seconds["total"]
    assert stages > 0.5 * stats.seconds["total"]  # nothing large is left out
    assert stats.peak_bytes is None or stats.peak_bytes >= 0


def test_peak_bytes_see_a_large_pass():
    """A prompt of 500 tokens over a vocabulary of 20,000: its logits and tables alone take megabytes."""
    size = {"vocab_size": 20_000, "hidden_size": 64, "max_position_embeddings": 1024}
    lm, rm = causal_lm("llama", **size), reward_model("llama", **size)
    config = DTOConfig(iters=1, confidence_threshold=None, max_generations=2, update="all")
    (result,) = NablaDecoder(lm, rm, None, config=config, loop="sequential").generate(
        [[3] * 500], max_new_tokens=40
    )
    if result.stats.peak_bytes is not None:
        assert 5e6 < result.stats.peak_bytes < 2e9


@pytest.mark.parametrize(
    "settings", [{}, {"relaxation": "soft"}, {"nll_coeff": 0.0}, {"update": "all"}], ids=str
)
def test_passes_of_a_batch_are_tokens_and_padding(monkeypatch, settings):
    """Every position that a pass of the batched loop goes through is one or the other."""
    read = {"lm": 0, "rm": 0}
    original = PagedReader.read

    def reading(self, sequences, lengths, *, ids=None, embeddings=None, store=False):
        name = "lm" if self._model is lm else "rm"
        rows, width = (ids if ids is not None else embeddings).shape[:2]
        # A gradient of the reward always comes back, that of the likelihood where it counts.
        backward = embeddings is not None and (name == "rm" or config.nll_coeff > 0)
        read[name] += rows * width * (2 if backward else 1)
        return original(self, sequences, lengths, ids=ids, embeddings=embeddings, store=store)

    config = DTOConfig(
        **{"iters": 3, "lr": 1.0, "confidence_threshold": None, "max_generations": 4, **settings}
    )
    lm, rm = shared_lm("qwen2", eos_token_id=None), shared_reward_model("qwen2")
    decoder = NablaDecoder(lm, rm, None, config=config, loop="batched")
    prompts = [PROMPT, PROMPT[:2], [*PROMPT, *PROMPT]]
    monkeypatch.setattr(PagedReader, "read", reading)
    results = decoder.generate(prompts, max_new_tokens=7, reward_context=[CONTEXT] * 3)
    for name in ("lm", "rm"):
        tokens = sum(result.stats.token_passes[name] for result in results)
        padding = sum(result.stats.padding_passes[name] for result in results)
        assert tokens + padding == read[name]
        assert padding > 0


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_seconds_of_all_prompts_are_those_of_the_decode(loop):
    config = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, max_generations=4)
    lm, rm = shared_lm("qwen2", eos_token_id=None), shared_reward_model("qwen2")
    decoder = NablaDecoder(lm, rm, None, config=config, loop=loop, batch_size=4)
    start = time.perf_counter()
    handed_over = [None] * 6  # as they were then: a result must not change once it is somebody else's

    def keep(index: int, result: Result) -> None:
        handed_over[index] = deepcopy(result.stats)

    results = decoder.generate(
        [PROMPT] * 6, seed=range(6), max_new_tokens=9, reward_context=[CONTEXT] * 6, on_result=keep
    )
    elapsed = time.perf_counter() - start
    total = sum(result.stats.seconds["total"] for result in results)
    assert 0.5 * elapsed < total <= elapsed
    assert handed_over == [result.stats for result in results]
    for result in results:
        seconds = dict(result.stats.seconds)
        assert 0 < sum(value for stage, value in seconds.items() if stage != "total") <= seconds["total"]
