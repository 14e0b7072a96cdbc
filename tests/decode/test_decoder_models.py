"""The decoder and its models: left as found, followed when they change, of half precision."""

from __future__ import annotations

import pytest
import torch
from tiny_models import causal_lm, reward_model, shared_lm, shared_reward_model
from torch import nn

from nabla_fast import DTOConfig, NablaDecoder, Result, VocabularyAlignment
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.reference.optimizer import TextualOptimizer
from nabla_fast.decode.stop import StopStrings
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.results import Stats

CONFIG = DTOConfig(iters=3, lr=1.0, nll_coeff=0.1, confidence_threshold=None, max_generations=4)
PROMPT, CONTEXT = [5, 9, 3, 14], ([7, 4, 11], [8])
SHUFFLED = VocabularyAlignment(torch.arange(24).flip(0))


def decode(decoder: NablaDecoder) -> Result:
    (result,) = decoder.generate([PROMPT], max_new_tokens=6, reward_context=[CONTEXT])
    return result


def fresh(lm: nn.Module, rm: nn.Module, **options) -> Result:
    """What a decoder made just now returns."""
    return decode(NablaDecoder(lm, rm, None, config=CONFIG, loop="sequential", **options))


def same(ours: Result, theirs: Result) -> bool:
    return (ours.token_ids, ours.reward, ours.revisions) == (
        theirs.token_ids,
        theirs.reward,
        theirs.revisions,
    )


# -- left as found -----------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list:
    flags = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    return [*flags, *((name, module.training) for name, module in model.named_modules())]


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_found(fails):
    lm, rm = causal_lm("qwen2"), reward_model("qwen2")
    lm.train()
    lm.model.layers[0].eval()
    lm.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    rm.requires_grad_(False)
    rm.score.weight.requires_grad_(True)
    before = state_of(lm), state_of(rm)
    weights = [value.clone() for model in (lm, rm) for value in model.state_dict().values()]

    decoder = NablaDecoder(lm, rm, None, config=CONFIG, loop="sequential")
    assert (state_of(lm), state_of(rm)) == before
    if fails:
        with pytest.raises(ValueError, match="empty"):
            decoder.generate([[]])
    else:
        assert decode(decoder).revisions
    assert (state_of(lm), state_of(rm)) == before
    after = [value for model in (lm, rm) for value in model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, weights, strict=True))


def test_models_in_training_mode_decode_as_in_evaluation_mode():
    lm, rm = causal_lm("qwen2", attention_dropout=0.5), reward_model("qwen2", attention_dropout=0.5)
    expected = fresh(lm, rm)
    assert same(fresh(lm.train(), rm.train()), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_any_gradient_mode_around_a_decode(context):
    decoder = NablaDecoder(
        shared_lm("qwen2"), shared_reward_model("qwen2"), None, config=CONFIG, loop="sequential"
    )
    expected = decode(decoder)
    assert expected.revisions
    with context():
        assert same(decode(decoder), expected)
        assert same(fresh(shared_lm("qwen2"), shared_reward_model("qwen2")), expected)


# -- followed ----------------------------------------------------------------------------------------

CHANGES = {
    "a weight in place": lambda model: model.base_model.layers[0].mlp.up_proj.weight.mul_(3),
    "the embeddings in place": lambda model: model.get_input_embeddings().weight.mul_(-2),
    "the embeddings replaced": lambda model: model.set_input_embeddings(
        type(model.get_input_embeddings())(24, model.config.hidden_size, None).double()
    ),
    "the embeddings' data replaced": lambda model: setattr(
        model.get_input_embeddings().weight, "data", model.get_input_embeddings().weight.flip(0).clone()
    ),
    "other weights loaded": lambda model: model.load_state_dict(
        {name: value.flip(0) for name, value in model.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("alignment", [None, SHUFFLED], ids=["identity", "shuffled"])
@pytest.mark.parametrize("which", ["lm", "rm"])
def test_changed_weights_are_followed(which, alignment, change):
    models = {"lm": causal_lm("llama"), "rm": reward_model("llama")}
    decoder = NablaDecoder(
        models["lm"], models["rm"], None, config=CONFIG, loop="sequential", alignment=alignment
    )
    before = decode(decoder)
    with torch.no_grad():
        CHANGES[change](models[which])
    after = decode(decoder)
    assert same(after, fresh(models["lm"], models["rm"], alignment=alignment))
    assert not same(after, before)


def test_scaled_embeddings_are_followed():
    lm, rm = causal_lm("gemma3"), reward_model("gemma3")
    decoder = NablaDecoder(lm, rm, None, config=CONFIG, loop="sequential")
    before = decode(decoder)
    with torch.no_grad():
        lm.get_input_embeddings().weight.mul_(-1)
        rm.get_input_embeddings().weight.mul_(-1)
    after = decode(decoder)
    assert same(after, fresh(lm, rm))
    assert not same(after, before)


@pytest.mark.parametrize("which", ["lm", "rm", "both"])
def test_float64_after_float32(which):
    lm, rm = causal_lm("qwen2", dtype=torch.float32), reward_model("qwen2", dtype=torch.float32)
    decoder = NablaDecoder(lm, rm, None, config=CONFIG, loop="sequential")
    before = decode(decoder)
    for name, model in (("lm", lm), ("rm", rm)):
        if which in (name, "both"):
            model.to(torch.float64)
    after = decode(decoder)
    assert same(after, fresh(lm, rm))
    assert (after.reward != before.reward) == (which != "lm")


# -- half precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", ["straight_through", "gumbel", "soft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_decode(dtype, relaxation):
    config = DTOConfig(iters=3, lr=1.0, confidence_threshold=None, relaxation=relaxation)
    lm, rm = causal_lm("qwen2", dtype=dtype), reward_model("qwen2", dtype=dtype)
    decoder = NablaDecoder(lm, rm, None, config=config, loop="sequential")
    result = decode(decoder)
    assert result.revisions
    assert same(result, decode(decoder))


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
def test_a_small_step_moves_a_large_logit_of_a_bf16_model(relaxation):
    """In bf16 a step of 0.01 on a logit of 20 rounds to nothing; the parameter is float32."""
    large = torch.full((), 20.0, dtype=torch.bfloat16)
    assert large - 0.01 == large

    lm = LanguageModel(causal_lm("qwen2", dtype=torch.bfloat16))
    rm = RewardModel(reward_model("qwen2", dtype=torch.bfloat16), VocabularyAlignment.identity())
    config = DTOConfig(iters=1, lr=0.01, nll_coeff=0.1, relaxation=relaxation)
    optimizer = TextualOptimizer(GradientModel(lm, rm, config), config)
    problem = Problem(tuple(PROMPT), *map(tuple, CONTEXT), 0, 64, frozenset(), StopStrings())

    initial = optimizer.initial(torch.randn(1, 16, dtype=torch.bfloat16))
    assert initial.dtype == torch.float32
    rest = torch.randn(3, 24)
    parameter = 20 + 0.1 * torch.randn(1, 24)
    before, logits = parameter.clone(), torch.cat([parameter, rest])
    if relaxation == "soft":
        optimizer.optimize_soft_(problem, [], parameter, logits, Stats())
        assert torch.equal(logits, torch.cat([parameter, rest]))
    else:
        optimizer.optimize_hard_(problem, [], parameter, logits.argmax(dim=-1), None, Stats())
    # The first step of Adam is lr·sign of the gradient.
    torch.testing.assert_close((parameter - before).abs(), torch.full((1, 24), 0.01), atol=1e-4, rtol=0)


def test_latents_of_a_bf16_model_are_float32():
    lm = LanguageModel(causal_lm("qwen2", dtype=torch.bfloat16))
    config = DTOConfig(
        iters=1, lr=0.01, tau=100.0, nll_coeff=0.1, reward_coeff=0.0, parameter="latents", update="all"
    )
    optimizer = TextualOptimizer(GradientModel(lm, None, config), config)
    hidden = 20 * torch.ones(2, 16, dtype=torch.bfloat16)
    parameter = optimizer.initial(hidden)
    assert parameter.dtype == torch.float32
    problem = Problem(tuple(PROMPT), (), (), 0, 64, frozenset(), StopStrings())
    tokens = optimizer.logits(parameter).argmax(dim=-1)
    optimizer.optimize_hard_(problem, [], parameter, tokens, None, Stats())
    moved = (parameter - 20).abs()
    assert moved.max() == pytest.approx(0.01, abs=1e-5)
    assert (moved > 0.009).float().mean() > 0.5
    assert torch.equal(hidden, torch.full_like(hidden, 20))
