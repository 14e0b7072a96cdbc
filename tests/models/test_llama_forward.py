"""The flat forward of Llama-type decoders: when it is taken, and that it is theirs."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_models
import torch
from ops.harness import DRAWS, GROSS
from torch import nn

from nabla_fast import NablaDecoder, _native
from nabla_fast.models.llama_layers import can_read
from nabla_fast.models.reader import PagedReader
from nabla_fast.ops import use_backend

KNOWN = ("qwen2", "qwen2_tied", "qwen3", "llama", "mistral")


def reader(model: nn.Module) -> PagedReader:
    return PagedReader(model.requires_grad_(False))


def whole(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def read(paged: PagedReader, ids: torch.Tensor) -> torch.Tensor:
    return paged.read([paged.pool(40, block_size=4).sequence()], [ids.shape[1]], ids=ids)


@pytest.mark.parametrize("kind", KNOWN)
def test_known_layers_are_read_flat(kind):
    model = tiny_models.causal_lm(kind)
    paged = reader(model)
    assert paged._llama_forward is not None
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 13))
    torch.testing.assert_close(read(paged, ids), whole(model, ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "phi", "cohere", "granite"])
def test_other_layers_run_through_their_own_modules(kind):
    assert reader(tiny_models.causal_lm(kind))._llama_forward is None


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(not _native.available(), reason="no C++ extension")
def test_half_precision_widths_that_fill_no_vector(kind, dtype):
    # Widths of 16 and 24 columns are PyTorch's, in float32 too.
    model = tiny_models.causal_lm(kind, dtype=dtype)
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 9))
    exact = whole(model.double(), ids)
    theirs = whole(model.to(dtype), ids)
    ours = read(reader(model), ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().amax() <= 0.01 * (theirs - exact).abs().amax()


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("window", [None, 5])
def test_the_written_backward_is_autograds(kind, window):
    # In float32, where forward and backward are C++, against autograd through the same layers' modules.
    fields = {"hidden_size": 64, "intermediate_size": 48, "head_dim": 16}
    if window is not None:
        fields["sliding_window"] = window
    if kind.startswith("qwen") and window is not None:
        fields |= {"use_sliding_window": True, "max_window_layers": 0}
    model = tiny_models.causal_lm(kind, dtype=torch.float32, **fields)
    paged = reader(model)
    if not _native.available():
        pytest.skip("no C++ extension")
    assert paged._llama_forward._native is not None
    table = model.get_input_embeddings().weight
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 17))
    sequence = paged.pool(40, block_size=4).sequence()
    paged.read([sequence], [7], ids=ids[:, :7], store=True)
    suffix = table[ids[:, 7:]].clone().requires_grad_()
    ours = paged.read([sequence], [10], embeddings=suffix)
    own = table[ids[:, 7:]].double().requires_grad_()
    model = copy.deepcopy(model).double()
    embeddings = torch.cat([model.get_input_embeddings().weight[ids[:, :7]], own], dim=1)
    theirs = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, 7:]
    cotangent = torch.randn_like(ours)
    (expected,) = torch.autograd.grad(theirs, own, cotangent.double())
    (found,) = torch.autograd.grad(ours, suffix, cotangent)
    assert (found - expected).abs().amax() <= 1e-5 * expected.abs().amax()
    assert (ours - theirs).abs().amax() <= 1e-5 * theirs.abs().amax()
    with use_backend("torch"):
        plain = paged.read([sequence], [10], embeddings=suffix)
        (autograds,) = torch.autograd.grad(plain, suffix, cotangent)
    assert (autograds - expected).abs().amax() <= 1e-5 * expected.abs().amax()
    assert not torch.equal(autograds, found)


@pytest.mark.parametrize("suffix", [15, 16, 37])
def test_suffixes_of_any_length_at_every_instruction_set(isa, suffix):
    # Widths that neither fill blocks of weights nor tiles of columns; two sequences, one of them padded.
    fields = {"hidden_size": 208, "intermediate_size": 336, "head_dim": 16, "attention_bias": True}
    model = tiny_models.causal_lm("llama", dtype=torch.float32, **fields)
    paged = reader(model)
    assert paged._llama_forward._native is not None
    exact_model = copy.deepcopy(model).double()
    # As the ops' harness has it: drawn again where the bound is exceeded, PyTorch's worst error growing
    # with the draws. The largest error is one token's, and its rounding is chance.
    worst = 0.0
    for _ in range(DRAWS):
        ids = torch.randint(3, tiny_models.VOCABULARY, (2, suffix))
        pool = paged.pool(40, block_size=4)
        ours = paged.read([pool.sequence(), pool.sequence()], [suffix, suffix - 3], ids=ids)
        theirs, exact = whole(model, ids), whole(exact_model, ids)
        excess = 0.0
        for row, length in enumerate((suffix, suffix - 3)):
            error, of_torch = (
                float((x[row, :length] - exact[row, :length]).abs().amax()) for x in (ours, theirs)
            )
            worst = max(worst, of_torch)
            excess = max(excess, error / (2 * worst + 1e-6 * float(exact[row].abs().amax())))
        if excess <= 1:
            return
        assert excess <= GROSS
    pytest.fail(f"{excess:.2f} times the bound, and more than it in each of {DRAWS} draws")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rotary_embeddings_of_fixed_frequencies_are_read_flat(scaling):
    model = tiny_models.causal_lm("llama", rope_parameters=scaling | {"rope_theta": 10000.0})
    paged = reader(model)
    assert paged._llama_forward is not None
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 40))
    torch.testing.assert_close(read(paged, ids), whole(model, ids), rtol=1e-12, atol=1e-12)


def test_frequencies_that_follow_the_length_are_left_to_the_module():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not can_read(tiny_models.causal_lm("llama", rope_parameters=scaling).base_model)


def test_positions_behind_the_first_table():
    model = tiny_models.causal_lm("qwen2", max_position_embeddings=3000)
    paged = PagedReader(model.requires_grad_(False))
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 2100))
    pool = paged.pool(200)
    sequence = pool.sequence()
    pieces = [
        paged.read([sequence], [part.shape[1]], ids=part, store=True) for part in ids.split(1050, dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole(model, ids), rtol=1e-10, atol=1e-10)


def hooked(model: nn.Module) -> None:
    model.base_model.layers[1].mlp.register_forward_hook(lambda *_: None)


def wrapped(model: nn.Module) -> None:
    class Wrapped(nn.Linear):
        pass

    layer = model.base_model.layers[0].self_attn
    layer.q_proj = Wrapped(layer.q_proj.in_features, layer.q_proj.out_features)


def replaced(model: nn.Module) -> None:
    mlp = model.base_model.layers[0].mlp
    mlp.forward = lambda x: x


@pytest.mark.parametrize("change", [hooked, wrapped, replaced], ids=lambda f: f.__name__)
def test_changed_modules_are_left_to_themselves(change):
    model = tiny_models.causal_lm("qwen2")
    assert can_read(model.base_model)
    change(model)
    assert not can_read(model.base_model)


def test_weights_changed_in_place_are_followed_once_renewed():
    model = tiny_models.causal_lm("llama")
    paged = reader(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    paged.renew()
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 6))
    torch.testing.assert_close(read(paged, ids), whole(model, ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_a_callers_default_dtype_changes_nothing(default):
    fields = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_attention_heads": 2}
    lm = tiny_models.causal_lm("qwen2", dtype=torch.float32, **fields)
    rm = tiny_models.reward_model("qwen2", dtype=torch.float32, **fields)
    prompts = [[5, 9, 3], [7, 4, 4, 11]]
    for loop in ("sequential", "batched"):
        expected = NablaDecoder(lm, rm, None, loop=loop).generate(prompts, max_new_tokens=8)
        torch.set_default_dtype(default)
        try:
            found = NablaDecoder(lm, rm, None, loop=loop).generate(prompts, max_new_tokens=8)
        finally:
            torch.set_default_dtype(torch.float32)
        assert [r.token_ids for r in found] == [r.token_ids for r in expected]


@pytest.mark.parametrize("change", [hooked, wrapped, replaced], ids=lambda f: f.__name__)
def test_modules_changed_behind_a_decoders_back_are_seen(change):
    model = tiny_models.causal_lm("qwen2")
    paged = reader(model)
    assert paged._llama_forward is not None
    change(model)
    paged.renew()
    assert paged._llama_forward is None


def foreign_norm(model: nn.Module) -> None:
    model.base_model.layers[0].input_layernorm = nn.LayerNorm(16)


def foreign_mlp(model: nn.Module) -> None:
    model.base_model.layers[0].mlp = nn.Linear(16, 16)


@pytest.mark.parametrize("change", [foreign_norm, foreign_mlp], ids=lambda f: f.__name__)
def test_known_layers_with_foreign_parts_run_through_their_modules(change):
    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    change(model)
    assert not can_read(model.base_model)
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 6))
    torch.testing.assert_close(read(reader(model), ids), whole(model, ids), rtol=1e-4, atol=1e-4)


def test_a_reader_survives_pickling_and_copying():
    model = tiny_models.causal_lm("qwen2", dtype=torch.float32)
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 6))
    for again in (pickle.loads(pickle.dumps(reader(model))), copy.deepcopy(reader(model))):
        again.renew()
        torch.testing.assert_close(read(again, ids), whole(model, ids), rtol=1e-4, atol=1e-4)


def test_wide_heads_are_left_to_the_modules():
    fields = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 528, "num_attention_heads": 2}
    model = tiny_models.causal_lm("llama", dtype=torch.float32, **fields)
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 6))
    torch.testing.assert_close(read(reader(model), ids), whole(model, ids), rtol=1e-4, atol=1e-4)
