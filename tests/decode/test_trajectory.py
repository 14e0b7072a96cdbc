"""The gradient of a trajectory against plain autograd of the whole loss over [L, V]."""

from __future__ import annotations

import pytest
import torch
from naive_loop import NaiveLoop
from tiny_models import VOCABULARY, causal_lm, reward_model, shared_lm, shared_reward_model
from torch import Tensor

from nabla_fast import DTOConfig, VocabularyAlignment
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.stop import StopStrings
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.results import Stats

PROMPT, PREFIX, SUFFIX = [5, 9, 3, 20], [7, 4, 11], [8, 6]
COMMITTED = [12, 3, 17]
TOKENS = torch.tensor([4, 22, 4, 9, 15, 3, 7, 7, 19, 10, 21])
# LM, reward model: grouped-query attention, tied and untied tables, scaled embeddings, an encoder.
PAIRS = [
    ("qwen2", "qwen2"),
    ("qwen2_tied", "llama"),
    ("llama", "bert"),
    ("gemma3", "gemma3"),
    ("qwen3", None),
    ("gpt2", "qwen3"),
    ("mistral", "gpt2"),
]


def problem() -> Problem:
    return Problem(tuple(PROMPT), tuple(PREFIX), tuple(SUFFIX), 0, 64, frozenset(), StopStrings())


def gradient_of(
    lm, rm, config: DTOConfig, *, committed=COMMITTED, tokens: Tensor = TOKENS, logits: Tensor | None = None
) -> tuple[TrajectoryGradient, Stats]:
    """The package's G at hard tokens, or at softmax(logits/τ)."""
    stats = Stats()
    faced = None if rm is None else RewardModel(rm, VocabularyAlignment.identity())
    gradients = GradientModel(LanguageModel(lm), faced, config)
    with torch.no_grad():
        if logits is None:
            return gradients.hard(problem(), committed, tokens, stats), stats
        return gradients.soft(problem(), committed, logits, stats), stats


def naive_gradient(lm, rm, config, *, committed=COMMITTED, tokens=TOKENS, logits=None) -> Tensor:
    """G by autograd of the full loss with respect to y [L, V]."""
    if logits is None:
        y = torch.nn.functional.one_hot(tokens, VOCABULARY).double()
    else:
        y = torch.softmax(logits.double() / config.tau, dim=-1)
    loop = NaiveLoop(lm, rm, config, PROMPT, PREFIX, SUFFIX)
    return loop.onehot_grad(committed, y)


def random_logits(dtype: torch.dtype = torch.float64, length: int = len(TOKENS)) -> Tensor:
    return 3 * torch.randn(length, VOCABULARY, dtype=dtype)


def assert_rows(gradient: TrajectoryGradient, expected: Tensor, **tolerance) -> None:
    count = len(expected)
    torch.testing.assert_close(gradient.rows(count), expected, **tolerance)
    torch.testing.assert_close(gradient.rows(1), expected[:1], **tolerance)
    torch.testing.assert_close(gradient.norms(), expected.norm(dim=-1), **tolerance)


TIGHT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
@pytest.mark.parametrize(("lm", "rm"), PAIRS)
def test_rows_and_norms(lm, rm, relaxation):
    models = shared_lm(lm), None if rm is None else shared_reward_model(rm)
    config = DTOConfig(reward_coeff=1.5, nll_coeff=0.3, tau=0.7)
    at = {"logits": random_logits()} if relaxation == "soft" else {}
    assert_rows(gradient_of(*models, config, **at)[0], naive_gradient(*models, config, **at), **TIGHT)


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
@pytest.mark.parametrize("committed", [[], COMMITTED])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 30])
def test_lengths(length, committed, relaxation):
    models = shared_lm("qwen2"), shared_reward_model("qwen2")
    config = DTOConfig(nll_coeff=0.5)
    at = {"committed": committed, "tokens": torch.arange(length) * 7 % VOCABULARY}
    if relaxation == "soft":
        at["logits"] = random_logits(length=length)
    assert_rows(gradient_of(*models, config, **at)[0], naive_gradient(*models, config, **at), **TIGHT)


@pytest.mark.parametrize("coefficients", [(0.0, 0.5), (2.0, 0.0), (0.0, 0.0)])
def test_coefficients_of_zero(coefficients):
    models = shared_lm("qwen2"), shared_reward_model("qwen2")
    config = DTOConfig(reward_coeff=coefficients[0], nll_coeff=coefficients[1])
    gradient, stats = gradient_of(*models, config)
    assert_rows(gradient, naive_gradient(*models, config), **TIGHT)
    assert (stats.token_passes["rm"] == 0) == (config.reward_coeff == 0)


@pytest.mark.parametrize(("nll_coeff", "backwards"), [(0.1, 1), (0.0, 0)])
def test_token_passes(nll_coeff, backwards):
    models = shared_lm("qwen2"), shared_reward_model("qwen2")
    _, stats = gradient_of(*models, DTOConfig(nll_coeff=nll_coeff))
    # The last token predicts nothing that counts, so the LM does not read it.
    read = len(PROMPT) + len(COMMITTED) + len(TOKENS) - 1
    assert stats.token_passes["lm"] == read * (1 + backwards)
    assert stats.token_passes["rm"] == 2 * (len(PREFIX) + len(COMMITTED) + len(TOKENS) + len(SUFFIX))
    assert stats.gradient_passes == 1


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
@pytest.mark.parametrize(
    ("lm_dtype", "rm_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.float64, torch.float32, 1e-4),
        (torch.float32, torch.float64, 1e-4),
        (torch.bfloat16, torch.bfloat16, 0.1),
        (torch.float32, torch.bfloat16, 0.1),
        (torch.bfloat16, torch.float32, 0.1),
        (torch.float16, torch.bfloat16, 0.1),
    ],
)
def test_dtypes(lm_dtype, rm_dtype, tolerance, relaxation):
    """Against float64 models with the same rounded weights; the tolerance is a share of ‖G_i‖."""
    config = DTOConfig(nll_coeff=0.3)
    lm, rm = causal_lm("qwen2", dtype=lm_dtype), reward_model("qwen2", dtype=rm_dtype)
    logits = random_logits(torch.float64 if lm_dtype == torch.float64 else torch.float32)
    at = {"logits": logits} if relaxation == "soft" else {}
    gradient, _ = gradient_of(lm, rm, config, **at)
    rows, norms = gradient.rows(len(TOKENS)), gradient.norms()
    assert rows.dtype in (torch.float32, torch.float64)
    expected = naive_gradient(lm.double(), rm.double(), config, **at)
    error = (rows - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < tolerance
    torch.testing.assert_close(norms, rows.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_weights_get_no_gradient():
    lm, rm = causal_lm("qwen2"), reward_model("qwen2")
    for model in (lm, rm):
        model.requires_grad_(True)
    gradient_of(lm, rm, DTOConfig())
    assert all(p.grad is None for model in (lm, rm) for p in model.parameters())
