"""Weight decay, schedules and the noise's scale: as the naive loop has them, and alike in both loops."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from naive_loop import NaiveLoop
from test_decoder import TOKENIZER, make_case, models
from tiny_models import causal_lm, reward_model, shared_lm, shared_reward_model

from nabla_fast import DTOConfig, InputError, NablaDecoder, SamplingConfig
from nabla_fast.config import PRESETS
from nabla_fast.decode.parameter import initial_parameter
from nabla_fast.decode.plain_descent import plain_descent_
from nabla_fast.decode.schedule import learning_rates
from nabla_fast.models.heads import DenseHead
from nabla_fast.ops import (
    AdamState,
    GumbelNoise,
    cosine_schedule,
    dto_descent,
    dto_descent_latents,
    use_backend,
)

CASES = range(48)


def changed(n: int) -> DTOConfig:
    """The config of case n with the options by chance; half the cases have weight decay."""
    chance, config = random.Random(n), make_case(n).config
    return replace(
        config,
        confidence_threshold=None,
        weight_decay=chance.choice([0.0, 0.0, 0.03, 1.0]),
        schedule=chance.choice(["cosine", "linear", "constant"]),
        gumbel_scale=chance.choice([0.0, 0.5, 3.0]) if config.relaxation == "gumbel" else 1.0,
    )


@pytest.mark.filterwarnings("ignore:.*does not score its last token's state:UserWarning")
@pytest.mark.parametrize("n", CASES)
def test_tokens_are_those_of_the_naive_loop_in_both_loops(n):
    case, config = make_case(n), changed(n)
    lm, rm = models(case)
    given = lm, rm, config, case.prompt, *case.context
    expected = NaiveLoop(*given, eos=case.eos, tokenizer=TOKENIZER, **case.options).decode()
    ended = bool(expected.tokens) and expected.tokens[-1] in case.eos
    for loop in ("sequential", "batched"):
        decoder = NablaDecoder(lm, rm, TOKENIZER, config=config, loop=loop)
        (result,) = decoder.generate([case.prompt], reward_context=[case.context], **case.options)
        assert result.token_ids == (expected.tokens[:-1] if ended else expected.tokens)
        ours = [(r.position, r.old_token, r.new_token, r.accepted) for r in result.revisions]
        assert ours == expected.proposals
        assert result.stats.generations == expected.generations
        rewards = [
            (r.reward_after, r.reward_before) for r in result.revisions if r.reward_after is not None
        ]
        for pair, theirs in zip(rewards, expected.rewards, strict=True):
            assert pair == pytest.approx(theirs, abs=1e-9)


def test_the_cases_reach_every_mode_and_postfix_rows_that_move():
    seen: Counter[str] = Counter()
    for n in CASES:
        config = changed(n)
        seen[config.schedule] += 1
        if config.weight_decay:
            seen[f"{config.relaxation}, {config.update}, {config.parameter}"] += 1
        if config.relaxation == "gumbel":
            seen[f"scale {config.gumbel_scale}"] += 1
    assert len(seen) == 3 + 12 + 3, seen


@pytest.mark.parametrize("relaxation", ["straight_through", "gumbel", "soft"])
@pytest.mark.parametrize(
    "options", [{"weight_decay": 1.0}, {"schedule": "constant"}, {"gumbel_scale": 4.0}], ids=str
)
def test_each_option_changes_answers(relaxation, options):
    if "gumbel_scale" in options and relaxation != "gumbel":
        with pytest.raises(InputError, match=r"^gumbel_scale must be 1 with relaxation=.*, got 4\.0$"):
            DTOConfig(relaxation=relaxation, **options)
        return
    config = DTOConfig(
        relaxation=relaxation,
        iters=8,
        lr=0.4,
        min_lr_ratio=0.0,
        confidence_threshold=None,
        rollout_sampling=SamplingConfig(1.0),
        resample_sampling=SamplingConfig(1.0),
    )
    prompts = [[3 + n % 9, 4, 5 + n % 7] for n in range(24)]
    given = shared_lm("qwen2"), shared_reward_model("qwen2"), None
    answers = []
    for settings in ({}, options):
        decoder = NablaDecoder(*given, config=replace(config, **settings))
        results = decoder.generate(prompts, max_new_tokens=8)
        answers.append([[(r.position, r.new_token) for r in result.revisions] for result in results])
    assert answers[0] != answers[1]


def test_many_prompts_together_are_those_of_the_sequential_loop():
    config = DTOConfig(
        relaxation="gumbel",
        gumbel_scale=2.0,
        weight_decay=0.1,
        schedule="linear",
        iters=6,
        lr=0.5,
        confidence_threshold=None,
        max_generations=5,
    )
    prompts = [[3 + n % 9, 4, 5 + n % 7][: 1 + n % 3] for n in range(16)]
    given = shared_lm("qwen2"), shared_reward_model("qwen2"), None
    answers = [
        [
            result.token_ids
            for result in NablaDecoder(*given, config=config, loop=loop).generate(
                prompts, max_new_tokens=9, seed=list(range(16))
            )
        ]
        for loop in ("sequential", "batched")
    ]
    assert answers[0] == answers[1]


# -- the plain descent -------------------------------------------------------------------------------


@pytest.mark.parametrize("parameter", ["logits", "latents"])
@pytest.mark.parametrize("noisy", [False, True])
def test_without_decay_the_plain_descent_is_the_op(parameter, noisy):
    config = DTOConfig(parameter=parameter, relaxation="gumbel" if noisy else "straight_through", tau=0.7)
    hidden, head = torch.randn(4, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    grad, schedule = torch.randn(4, 11, dtype=torch.float64), cosine_schedule(9, 0.3)
    noise = GumbelNoise(torch.arange(4), torch.arange(4)) if noisy else None
    group = torch.tensor([0, 0, 1, 1])
    ours = initial_parameter(config, hidden, DenseHead(head))
    theirs, states = ours.clone(), [AdamState.zeros(ours) for _ in range(2)]
    options = {"until": torch.tensor([9, 9, 5, 5]), "group": group, "noise": noise}
    found = plain_descent_(config, ours, grad, states[0], schedule, DenseHead(head), **options)
    with use_backend("torch"):
        if parameter == "logits":
            expected = dto_descent(theirs, grad, states[1], schedule, tau=0.7, **options)
        else:
            expected = dto_descent_latents(theirs, head, grad, states[1], schedule, tau=0.7, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.token, expected.token)
    assert torch.equal(found.flipped, expected.flipped)
    assert torch.equal(states[0].step, states[1].step)


def test_a_masked_token_stays_masked_under_decay():
    config = DTOConfig(weight_decay=0.5)
    z = torch.randn(2, 7, dtype=torch.float64)
    z[:, 3] = -torch.inf
    options = {"until": None, "group": None, "noise": None}
    plain_descent_(
        config,
        z,
        torch.randn(2, 7, dtype=torch.float64),
        AdamState.zeros(z),
        cosine_schedule(5, 0.1),
        z,
        **options,
    )
    assert bool((z[:, 3] == -torch.inf).all())
    assert bool(z[:, :3].isfinite().all())
    z[1, 2] = torch.nan
    with pytest.raises(ValueError, match="row 1"):
        plain_descent_(
            config, z, torch.zeros_like(z), AdamState.zeros(z), cosine_schedule(5, 0.1), z, **options
        )


# -- schedules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_schedules(warmup):
    def rates(**options):
        config = DTOConfig(iters=10, lr=0.5, min_lr_ratio=0.3, warmup_steps=warmup, **options)
        return learning_rates(config, torch.device("cpu"))

    cosine = cosine_schedule(10, 0.5, min_ratio=0.3, warmup_steps=warmup)
    assert torch.equal(rates(), cosine)
    for schedule in ("linear", "constant"):
        found = rates(schedule=schedule)
        assert found.dtype == torch.float64
        assert torch.allclose(found[:warmup], cosine[:warmup])
    constant = rates(schedule="constant")[warmup:]
    assert constant.tolist() == [0.5] * (10 - warmup)
    linear = rates(schedule="linear")[warmup:].tolist()
    steps = 10 - warmup
    assert linear == pytest.approx([0.5 * max(0.3, 1 - k / steps) for k in range(steps)])


# -- presets -----------------------------------------------------------------------------------------


def test_presets_are_the_scripts_of_the_release():
    for name in PRESETS:
        config = DTOConfig.preset(name)
        assert (config.iters, config.lr, config.min_lr_ratio, config.nll_coeff) == (20, 0.01, 0.1, 1e-3)
        assert (config.reward_coeff, config.max_generations, config.confidence_threshold) == (1.0, 8, 0.97)
        assert (config.update, config.rejection, config.weight_decay) == ("first", True, 0.0)
    math, aime, amc = map(DTOConfig.preset, ("math500", "aime", "amc"))
    for config in (math, aime):
        assert config.parameter == "logits"
        assert config.rollout_sampling == SamplingConfig(0.6, None, 0.95)
        assert config.resample_sampling == SamplingConfig(0.5, None, 0.95)
    assert (math.grad_threshold, aime.grad_threshold, amc.grad_threshold) == (4, 8, 4)
    assert amc.parameter == "latents"
    assert amc.rollout_sampling == SamplingConfig(0.7, 20, 0.8)
    assert amc.resample_sampling == SamplingConfig(0.5, 20, 0.8)
    assert [DTOConfig.preset_max_new_tokens(name) for name in ("math500", "aime", "amc")] == [
        1024,
        3072,
        1024,
    ]
    defaults = replace(DTOConfig(), parameter="latents", grad_threshold=4.0)
    assert defaults == amc


@pytest.mark.parametrize("name", ["math", "", None, 3, ["aime"]])
def test_presets_that_there_are_not(name):
    for ask in (DTOConfig.preset, DTOConfig.preset_max_new_tokens):
        with pytest.raises(InputError, match=r"^preset must be one of 'math500', 'aime', 'amc', got "):
            ask(name)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_a_preset_decodes_with_the_models_own_top_k(name, loop):
    lm, rm = causal_lm("qwen2"), reward_model("qwen2")
    lm.generation_config.top_k = 3
    config = replace(DTOConfig.preset(name), grad_threshold=0.1)
    prompts = [[5, 9, 3], [7, 4]]
    decoder = NablaDecoder(lm, rm, None, config=config, loop=loop)
    said = config
    if name != "amc":
        said = replace(
            config,
            rollout_sampling=SamplingConfig(0.6, 3, 0.95),
            resample_sampling=SamplingConfig(0.5, 3, 0.95),
        )
    other = NablaDecoder(lm, rm, None, config=said, loop="sequential")
    answers = [made.generate(prompts, max_new_tokens=8) for made in (decoder, other)]
    assert [r.token_ids for r in answers[0]] == [r.token_ids for r in answers[1]]
    assert answers[0][0].stats.generations > 1
