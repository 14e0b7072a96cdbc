"""Heads as models ship them: tokens and gradients of loops over the model's own logits."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from naive_loop import Naive, NaiveLoop
from tiny_models import VOCABULARY, causal_lm, shared_reward_model
from torch import Tensor, nn

from nabla_fast import DTOConfig, ModelError, NablaDecoder, Result, SamplingConfig, VocabularyAlignment
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.stop import StopStrings
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.models.heads import DenseHead, HeadMap, TiledHead
from nabla_fast.results import Stats

PREFIX, SUFFIX = [7, 4, 11], [8, 6]
COMMITTED, TOKENS = [12, 3, 17], torch.tensor([4, 22, 4, 9, 15, 3, 7, 7, 19, 10, 21])


class Int8Rows(Tensor):
    """A weight of int8 numbers with a scale a row, which knows slices and ``dequantize()`` as torchao's."""

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor) -> Int8Rows:
        rows = Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype)
        rows.values, rows.scales = values, scales
        return rows

    def __init__(self, values: Tensor, scales: Tensor):
        pass

    def dequantize(self) -> Tensor:
        return self.values * self.scales

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].dequantize(), *args[2:])
        if function is Tensor.__getitem__:
            return cls(args[0].values[args[1]], args[0].scales[args[1]])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scales)
        raise NotImplementedError(f"{function} of packed rows")


def pack(module: nn.Linear) -> None:
    """Pack a layer's weight."""
    weight = module.weight.detach()
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    rows = Int8Rows((weight / scales).round().to(torch.int8), scales)
    module.weight = nn.Parameter(rows, requires_grad=False)


def packed(model: nn.Module) -> nn.Module:
    """The model with a packed head."""
    pack(model.lm_head)
    return model


def packed_layers(model: nn.Module) -> nn.Module:
    """The model with packed weights in all linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            pack(module)
    return model


def low_rank(model: nn.Module, modules: tuple[str, ...] = ("lm_head", "q_proj")) -> nn.Module:
    """The model with PEFT adapters, which are not 0, on its head and its queries, or other modules."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(modules),
        ensure_weight_tying=model.config.tie_word_embeddings,
    )
    model = peft.get_peft_model(model, config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    return model


def low_rank_embeddings(model: nn.Module) -> nn.Module:
    return low_rank(model, ("embed_tokens", "v_proj"))


def int8(model: nn.Module) -> nn.Module:
    """The model in float32, which int8 products need, with a head of int8 weights and a scale a row."""
    model = model.float()
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "lm_head"
    )
    return model


def int8_layers(model: nn.Module) -> nn.Module:
    """The model in float32 with int8 weights in all linear layers."""
    quantization = pytest.importorskip("torchao.quantization")
    model = model.float()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def padded(model: nn.Module) -> nn.Module:
    """The model with table and head resized to more rows than the tokenizer has."""
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    return model


def unchanged(model: nn.Module) -> nn.Module:
    return model


def capped(cap: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, states: cap * torch.tanh(model.get_output_embeddings()(states) / cap)


def scaled(scale: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, states: scale * model.get_output_embeddings()(states)


def alone(model: nn.Module, states: Tensor) -> Tensor:
    return model.get_output_embeddings()(states)


EAGER = {"attn_implementation": "eager"}
# Name → (architecture, fields, change, logits of hidden states, what the head is).
HEADS = {
    "soft cap": ("gemma2", EAGER | {"final_logit_softcapping": 3.0}, unchanged, capped(3.0), "soft cap 3"),
    "bias": ("phi", {}, unchanged, alone, "bias"),
    "scale": ("cohere", {"logit_scale": 0.25}, unchanged, scaled(0.25), "scale 0.25"),
    "scale, divided by": ("granite", {}, unchanged, scaled(1 / 4.0), "scale 0.25"),
    "padded": ("qwen2", {}, padded, alone, "plain"),
    "LoRA": ("qwen2", {}, low_rank, alone, "LoRA"),
    "LoRA, tied": ("qwen2_tied", {}, low_rank, alone, "LoRA"),
    "packed": ("qwen2", {}, packed, alone, "Int8Rows"),
    "packed everywhere": ("qwen2", {}, packed_layers, alone, "Int8Rows"),
    "packed, capped": (
        "gemma2",
        EAGER | {"final_logit_softcapping": 3.0, "tie_word_embeddings": False},
        packed,
        capped(3.0),
        "Int8Rows, soft cap 3",
    ),
    "int8": ("qwen2", {}, int8, alone, "Int8Tensor"),
    "LoRA on the embeddings": ("qwen2", {}, low_rank_embeddings, alone, "plain"),
    "int8 everywhere": ("qwen2", {}, int8_layers, alone, "Int8Tensor"),
    "int8, capped": (
        "gemma2",
        EAGER | {"final_logit_softcapping": 3.0, "tie_word_embeddings": False},
        int8,
        capped(3.0),
        "Int8Tensor, soft cap 3",
    ),
}


@cache
def model_of(name: str) -> nn.Module:
    kind, fields, change, _, _ = HEADS[name]
    return change(causal_lm(kind, eos_token_id=None, **fields))


@cache
def in_float64(name: str) -> nn.Module:
    """The model as the naive loop reads it: itself, or one of the same numbers in float64."""
    model = model_of(name)
    if "int8" not in name:
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module.weight.dequantize())
    return model.double()


def naive_loop(name: str, config: DTOConfig, prompt: list[int], **options) -> NaiveLoop:
    model, logits = in_float64(name), HEADS[name][3]
    return NaiveLoop(
        model,
        shared_reward_model("qwen2"),
        config,
        prompt,
        PREFIX,
        SUFFIX,
        token_map=torch.arange(vocabulary(name)) % VOCABULARY,
        logits=lambda states: logits(model, states),
        **options,
    )


def vocabulary(name: str) -> int:
    return LanguageModel(model_of(name)).vocabulary


def alignment(name: str) -> VocabularyAlignment:
    if vocabulary(name) == VOCABULARY:
        return VocabularyAlignment.identity()
    return VocabularyAlignment(torch.arange(vocabulary(name)) % VOCABULARY)


def config_of(n: int) -> DTOConfig:
    chance = random.Random(n)
    return DTOConfig(
        parameter=("logits", "latents")[n % 2],
        update=chance.choice(["first", "all"]),
        relaxation=("straight_through", "gumbel", "soft")[n // 2 % 3],
        max_generations=5,
        iters=4,
        lr=0.5,
        nll_coeff=0.3,
        tau=0.7,
        confidence_threshold=0.995,
        rollout_sampling=SamplingConfig(chance.choice([0.0, 1.0]), 0, 1.0),
        resample_sampling=SamplingConfig(chance.choice([0.0, 0.7]), 0, 1.0),
    )


@cache
def decoded(name: str, n: int, loop: str) -> Result:
    prompt = [random.Random(n).randrange(3, VOCABULARY) for _ in range(5)]
    decoder = NablaDecoder(
        model_of(name),
        shared_reward_model("qwen2"),
        None,
        config=config_of(n),
        loop=loop,
        alignment=alignment(name),
    )
    (result,) = decoder.generate([prompt], reward_context=[(PREFIX, SUFFIX)], seed=n, max_new_tokens=7)
    return result


@cache
def naive(name: str, n: int) -> Naive:
    prompt = [random.Random(n).randrange(3, VOCABULARY) for _ in range(5)]
    return naive_loop(name, config_of(n), prompt, seed=n, max_new_tokens=7, eos=()).decode()


@pytest.mark.parametrize("n", range(6))
@pytest.mark.parametrize("name", HEADS)
def test_both_loops_give_the_tokens_of_the_naive_loop(name, n):
    expected = naive(name, n)
    for loop in ("sequential", "batched"):
        result = decoded(name, n, loop)
        assert result.token_ids == expected.tokens
        ours = [(r.position, r.old_token, r.new_token, r.accepted) for r in result.revisions]
        assert ours == expected.proposals


@pytest.mark.parametrize("name", HEADS)
def test_the_problems_accept_revisions(name):
    assert any(proposal[-1] for n in range(6) for proposal in naive(name, n).proposals)


@pytest.mark.parametrize("name", HEADS)
def test_what_a_head_is_found_to_be(name):
    head = LanguageModel(model_of(name)).head
    assert head.describe() == HEADS[name][4]
    assert isinstance(head, TiledHead if HEADS[name][4][0].isupper() else DenseHead)
    said = NablaDecoder(model_of(name), None, None, loop="sequential").describe()["lm"].partition(",")[0]
    assert said.partition(" (head: ")[2].rstrip(")") == HEADS[name][4].partition(",")[0].replace(
        "plain", ""
    )


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
@pytest.mark.parametrize("name", HEADS)
def test_gradient_against_autograd_over_the_models_logits(name, relaxation):
    config = DTOConfig(reward_coeff=1.5, nll_coeff=0.3, tau=0.7)
    loop = naive_loop(name, config, [5, 9, 3, 20])
    lm = LanguageModel(model_of(name))
    reward = RewardModel(shared_reward_model("qwen2"), alignment(name))
    gradients, stats = GradientModel(lm, reward, config), Stats()
    problem = Problem((5, 9, 3, 20), tuple(PREFIX), tuple(SUFFIX), 0, 64, frozenset(), StopStrings())
    with torch.no_grad():
        if relaxation == "soft":
            logits = 3 * torch.randn(len(TOKENS), lm.vocabulary, dtype=torch.float64)
            found = gradients.soft(problem, COMMITTED, logits, stats)
            y = torch.softmax(logits / config.tau, dim=-1)
        else:
            found = gradients.hard(problem, COMMITTED, TOKENS, stats)
            y = nn.functional.one_hot(TOKENS, lm.vocabulary).double()
    expected = loop.onehot_grad(COMMITTED, y)
    if "int8" in name:  # float32 of a whole model
        close = {"atol": 2e-5 * float(expected.abs().max()), "rtol": 1e-4}
    else:
        close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(found.rows(len(TOKENS)), expected, check_dtype=False, **close)
    torch.testing.assert_close(found.norms(), expected.norm(dim=-1), check_dtype=False, **close)


@pytest.mark.parametrize("loop", ["sequential", "batched"])
def test_an_adapter_that_is_trained_switched_off_and_on(loop):
    model = low_rank(causal_lm("qwen2", eos_token_id=None))
    config = replace(config_of(1), rollout_sampling=SamplingConfig(0))
    decoder = NablaDecoder(model, None, None, config=config, loop=loop)

    def tokens() -> list[int]:
        found = decoder.generate([[5, 9, 3]], seed=0, max_new_tokens=7)[0].token_ids
        assert found == NaiveLoop(model, None, config, [5, 9, 3], max_new_tokens=7, eos=()).decode().tokens
        return found

    before = tokens()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 2.0)
    assert tokens() != before
    with model.disable_adapter():
        plain = NablaDecoder(causal_lm("qwen2", eos_token_id=None), None, None, config=config, loop=loop)
        assert tokens() == plain.generate([[5, 9, 3]], seed=0, max_new_tokens=7)[0].token_ids
    model.merge_adapter()
    merged = tokens()
    model.unmerge_adapter()
    assert tokens() == merged


def adapted(**fields) -> nn.Module:
    """A Qwen2 with one PEFT adapter of these settings, in float64."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(causal_lm("qwen2"), peft.LoraConfig(r=2, **fields)).double().eval()


def test_adapters_that_are_more_than_a_product_are_refused_while_they_are_on():
    model = adapted(target_modules=["lm_head"], use_dora=True)
    refusal = r"Qwen2ForCausalLM has a LoRA variant on its output head \(DoRA, adapter default\)"
    with pytest.raises(ModelError, match=refusal):
        LanguageModel(model)
    with model.disable_adapter():
        assert LanguageModel(model).head.describe() == "LoRA"


def test_adapters_outside_of_layers_are_refused():
    peft = pytest.importorskip("peft")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match=r"PeftModelForCausalLM.*PROMPT_TUNING.*virtual tokens"):
        LanguageModel(peft.get_peft_model(causal_lm("qwen2"), prompts).double())
    invoked = adapted(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"adapter default whose weights depend on the text \(aLoRA\)"):
        LanguageModel(invoked)


@pytest.mark.parametrize("kind", ["IA3Config", "VeraConfig", "LoHaConfig", "AdaLoraConfig"])
def test_other_adapters_on_the_head_are_refused_by_name(kind):
    peft = pytest.importorskip("peft")
    fields = {"IA3Config": {"feedforward_modules": []}, "AdaLoraConfig": {"total_step": 10}}.get(kind, {})
    config = getattr(peft, kind)(target_modules=["lm_head"], **fields)
    model = peft.get_peft_model(causal_lm("qwen2"), config).double()
    with pytest.raises(ModelError, match=r"adapter on its output head \(peft\.tuners\..*merge_and_unload"):
        LanguageModel(model)


@pytest.mark.parametrize("wrap", [low_rank, lambda model: torch.compile(model, backend="eager")])
def test_a_cap_that_changes_inside_a_wrapper_is_noticed(wrap):
    model = wrap(causal_lm("gemma2", eos_token_id=None, final_logit_softcapping=3.0, **EAGER))
    decoder = NablaDecoder(model, None, None, config=config_of(0), loop="sequential")
    assert "soft cap 3" in decoder.describe()["lm"]
    model.config.final_logit_softcapping = 0.125
    decoder.generate([[5, 9, 3]], max_new_tokens=2)
    assert "soft cap 0.125" in decoder.describe()["lm"]


@pytest.mark.parametrize(
    "change", [lambda z: 1.03 * z, lambda z: z + 0.3 * z.std() * torch.eye(VOCABULARY)[7].to(z)]
)
def test_logits_a_little_off_are_refused_in_half_precision_too(change):
    model = causal_lm("qwen2", dtype=torch.bfloat16)
    assert LanguageModel(model).head.describe() == "plain"
    model.lm_head.register_forward_hook(lambda _, __, z: change(z))
    with pytest.raises(ModelError, match="logits are not its output head times"):
        LanguageModel(model)


def test_a_config_with_fields_that_raise_is_read():
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this release of transformers has no Gemma 4")
    config = transformers.Gemma4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        sliding_window=8,
        pad_token_id=0,
    )
    assert LanguageModel(transformers.Gemma4ForCausalLM(config).eval()).head.vocabulary == VOCABULARY


class Subclass(Tensor):
    """A tensor of one's own that is a tensor like others."""


def test_a_weight_of_a_class_of_ones_own_is_read():
    model = causal_lm("qwen2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Subclass))
    assert type(LanguageModel(model).head.weight) is Tensor


class Unsliced(Int8Rows):
    """A weight that knows no slices of itself."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__:
            raise NotImplementedError("no slices")
        return super().__torch_function__(function, types, args, kwargs)


class OfActivations(Int8Rows):
    """A weight that rounds what it is multiplied with."""

    act_quant_kwargs = "int8"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Unsliced, "has an output head packed as Unsliced.*without quantization"),
        (OfActivations, r"rounds activations while it runs, lm_head\.weight first \(OfActivations\)"),
    ],
)
def test_packings_that_are_refused_by_name(kind, said):
    model = packed(causal_lm("qwen2"))
    rows = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(kind(rows.values, rows.scales), requires_grad=False)
    with pytest.raises(ModelError, match=f"Qwen2ForCausalLM {said}"):
        LanguageModel(model)


def test_a_map_in_words():
    assert str(HeadMap()) == ""
    assert str(HeadMap(torch.zeros(3), 0.5, 30.0)) == "bias, scale 0.5, soft cap 30"
