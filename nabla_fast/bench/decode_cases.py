"""Cases of the decode benchmark: prompts, a pair of models, a configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer
from nabla_fast.config import DTOConfig, SamplingConfig
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.prompts import render_chat, response_tail
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.decode.stop import StopStrings
from nabla_fast.demo import countdown
from nabla_fast.models import LanguageModel, RewardModel, VocabularyAlignment
from nabla_fast.results import Stats

# Found on problems of seed 1000: with steps of this size the bundled LM's tokens move often enough for
# more than 5 generations a prompt; with the default of 0.01 its prompts end after 3.
MANY = DTOConfig(lr=0.5, confidence_threshold=None, max_generations=16)
SKIPPED = 0.89  # share of positions that the paper's gradient threshold leaves out
GREEDY = SamplingConfig(temperature=0.0)

# Logits of a new model are so flat that every redrawn token is another. With its head scaled by this, 7 or
# 8 of 10 are the old one again, as with the bundled models, and as many positions share a generation.
_HEAD_SCALE = 16.0

_DEMO_PROBLEMS = 500  # of seed 0: the demo's and the model card's
_CALIBRATION_SEED, _MEASURED_SEED = 1000, 2000
_CALIBRATION_PROBLEMS = 150
_MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class Case:
    """Prompts decoded with one pair of models.

    Attributes:
        batch_size: prompts that the batched loop takes at once.
        note: what the name does not say, for people.
        ablated: whether each acceleration is also switched off alone.
        release_form: whether the release's form of the inner loop is measured too.
    """

    name: str
    lm: LanguageModel
    rm: RewardModel
    config: DTOConfig
    problems: list[Problem]
    batch_size: int
    note: str = ""
    ablated: bool = True
    release_form: bool = False

    @property
    def is_half(self) -> bool:
        """Whether the models' weights are in half precision."""
        return self.lm.table.dtype in (torch.bfloat16, torch.float16)

    def in_dtype(self, dtype: torch.dtype) -> Case:
        """The same with the models' weights in another dtype."""
        lm, rm = (copy.deepcopy(model.model).to(dtype) for model in (self.lm, self.rm))
        return replace(self, lm=LanguageModel(lm), rm=RewardModel(rm, VocabularyAlignment.identity()))


@dataclass(frozen=True)
class Named:
    """A case that is built when it is asked for."""

    name: str
    build: Callable[[torch.device], Case]


def named_cases(*, quick: bool = False, dtype: torch.dtype = torch.float32) -> list[Named]:
    """The benchmark's cases in the order of running; ``quick`` makes them small enough for a test.

    Args:
        dtype: of the models' weights, float32 or half precision.
    """
    prompts = 2 if quick else 16
    many = replace(MANY, max_generations=4) if quick else MANY
    some = {
        "bundled, one prompt at a time": partial(_of_bundled, DTOConfig(), prompts, 1),
        f"bundled, {prompts} prompts together": partial(_of_bundled, DTOConfig(), prompts, prompts),
        "bundled, many generations, no threshold": partial(_of_bundled, many, prompts, prompts),
        "bundled, many generations, gradient threshold": partial(_with_threshold, many, prompts, prompts),
    }
    sizes = ((1_000, 12), (3_000, 16)) if quick else ((32_768, 64), (151_936, 128))
    for vocabulary, length in sizes:
        for how, config in (
            ("sampled", DTOConfig()),
            ("greedy", DTOConfig(rollout_sampling=GREEDY)),
        ):
            name = f"random, V={vocabulary}, L={length}, {how} rollouts"
            some[name] = partial(_of_random, config, vocabulary, length)
    vocabulary, length = sizes[-1]
    name = f"random, V={vocabulary}, L={length}, beside the release's form"
    some[name] = partial(_of_release, vocabulary, length)
    return [Named(name, partial(_named, name, build, dtype)) for name, build in some.items()]


def length_case(length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """Two prompts answered with ``length`` tokens by random models of a small vocabulary."""
    lm, rm = random_models(512, device, dtype, hidden=64)
    problems = [random_problem(length, seed) for seed in (7, 8)]
    return Case(f"L={length}", lm, rm, DTOConfig(), problems, 2, ablated=False)


def describe(config: DTOConfig) -> str:
    """The settings that differ from the defaults, in one line."""
    default = DTOConfig()
    parts = []
    for field in fields(DTOConfig):
        value = getattr(config, field.name)
        if value != getattr(default, field.name):
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            if isinstance(value, SamplingConfig):
                shown = "greedy" if value.temperature <= 0 else f"temperature {value.temperature:g}"
            parts.append(f"{field.name}={shown}")
    return ", ".join(parts) or "defaults"


def bundled_models(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, RewardModel]:
    """The models that ship with the package, rounded to ``dtype``, their weights without gradients."""
    lm = load_language_model(bundled("lm"), str(device), "float32").to(dtype)
    rm = load_reward_model(bundled("rm"), str(device), "float32").to(dtype)
    return LanguageModel(_frozen(lm)), RewardModel(_frozen(rm), VocabularyAlignment.identity())


def bundled_problems(lm: LanguageModel, count: int, seed: int = _MEASURED_SEED) -> list[Problem]:
    """Held-out problems of a seed: not those of the demo or the model card, nor those calibrated on."""
    tokenizer = load_tokenizer(bundled("tokenizer"))
    tail = response_tail(tokenizer)
    used = countdown.held_out(_DEMO_PROBLEMS)
    if seed != _CALIBRATION_SEED:
        used += countdown.held_out(_CALIBRATION_PROBLEMS, _CALIBRATION_SEED)
    keys = set(map(_key, used))
    found = [p for p in countdown.held_out(2 * count + 16, seed) if _key(p) not in keys][:count]
    problems = []
    for n, problem in enumerate(found):
        prompt = render_chat(tokenizer, [{"role": "user", "content": countdown.render(problem)}])
        problems.append(Problem(prompt, prompt, tail, n, _MAX_NEW_TOKENS, lm.eos_ids, StopStrings()))
    return problems


def random_models(
    vocabulary: int, device: torch.device, dtype: torch.dtype = torch.float32, *, hidden: int = 256
) -> tuple[LanguageModel, RewardModel]:
    """Two layers, so that the vocabulary is what costs, and a head of some decision."""
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = Qwen2ForCausalLM(Qwen2Config(**shape))
        rm = Qwen2ForSequenceClassification(Qwen2Config(**shape, num_labels=1))
    lm, rm = (_frozen(model.to(device, dtype).eval()) for model in (lm, rm))
    lm.lm_head.weight.mul_(_HEAD_SCALE)
    return LanguageModel(lm), RewardModel(rm, VocabularyAlignment.identity())


def random_problem(length: int, seed: int = 7) -> Problem:
    """32 tokens to be answered with ``length``."""
    prompt = tuple(range(5, 37))
    return Problem(prompt, prompt, (3, 4), seed, length, frozenset(), StopStrings())


def gradient_threshold(
    lm: LanguageModel, rm: RewardModel, config: DTOConfig, problems: Sequence[Problem], share: float
) -> float:
    """The ‖G‖₂ that ``share`` of the positions of the problems' first rollouts are below."""
    gradients = GradientModel(lm, rm, config)
    norms = []
    for problem in problems:
        loop = SequentialLoop(lm, rm, replace(config, max_generations=1))
        ((_, decoded),) = loop.decode([problem], [Stats()])
        norms.append(_norms(lm, gradients, problem, decoded.tokens))
    return float(torch.cat(norms).quantile(share))


def _norms(
    lm: LanguageModel, gradients: GradientModel, problem: Problem, tokens: list[int]
) -> torch.Tensor:
    with torch.no_grad():
        ids = lm.tensor([*problem.prompt_ids, *tokens[:-1]])
        hidden = lm.hidden(ids)[0, len(problem.prompt_ids) - 1 :]
        return gradients.hard(problem, [], lm.logits(hidden).argmax(dim=-1), Stats()).norms()


def _named(
    name: str,
    build: Callable[[torch.device, torch.dtype], Case],
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    return replace(build(device, dtype), name=name)


def _of_bundled(
    config: DTOConfig, prompts: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Case:
    lm, rm = bundled_models(device, dtype)
    return Case("", lm, rm, config, bundled_problems(lm, prompts), batch_size)


def _with_threshold(
    config: DTOConfig, prompts: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Case:
    case = _of_bundled(config, prompts, batch_size, device, dtype)
    separate = bundled_problems(case.lm, 3 * prompts, _CALIBRATION_SEED)
    threshold = gradient_threshold(case.lm, case.rm, config, separate, SKIPPED)
    note = f"the threshold leaves out {SKIPPED:.0%} of the positions of {len(separate)} other problems"
    return replace(case, config=replace(config, grad_threshold=threshold), note=note)


def _of_random(
    config: DTOConfig, vocabulary: int, length: int, device: torch.device, dtype: torch.dtype
) -> Case:
    lm, rm = random_models(vocabulary, device, dtype)
    return Case("", lm, rm, config, [random_problem(length)], 1)


def _of_release(vocabulary: int, length: int, device: torch.device, dtype: torch.dtype) -> Case:
    case = _of_random(DTOConfig(max_generations=3), vocabulary, length, device, dtype)
    note = "the release's form is a reconstruction, not its code"
    return replace(case, ablated=False, release_form=True, note=note)


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _key(problem: countdown.Problem) -> tuple:
    return (*sorted(problem.numbers), problem.target)
