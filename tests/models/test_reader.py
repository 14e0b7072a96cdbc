"""Suffixes after a frozen, paged prefix against full recomputation."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from nabla_fast.errors import InputError, ModelError
from nabla_fast.models.paged_attention import PagedPass
from nabla_fast.models.paged_kv import PoolExhausted
from nabla_fast.models.reader import PagedReader

EXACT = ("qwen2", "qwen2_tied", "qwen3", "llama", "mistral", "gemma2", "gemma3", "gpt_oss", "phi", "gpt2")
EXACT += ("granite", "cohere")
TOTALS, PREFIXES = (7, 12, 9), (3, 10, 5)


def decoder(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    config, lm, _, fields = tiny_models.ARCHITECTURES[name]
    torch.manual_seed(0)
    settings = {"vocab_size": tiny_models.VOCABULARY, "pad_token_id": 0} | fields
    if name in ("gemma2", "gpt_oss"):
        settings["initializer_range"] = 0.4  # scores beyond the cap, weights beside the sinks
    model = getattr(transformers, lm)(getattr(transformers, config)(**settings))
    if name == "gemma2":
        model.set_attn_implementation("eager")  # sdpa leaves its cap out
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # grouped products have no float64
    return model.to(dtype).eval().requires_grad_(False)


def ragged() -> list[torch.Tensor]:
    return [torch.randint(3, tiny_models.VOCABULARY, (total,)) for total in TOTALS]


def differences(model: PreTrainedModel) -> tuple[float, float]:
    """Largest relative difference of hidden states, and of gradients, from full recomputation."""
    reader = PagedReader(model)
    pool = reader.pool(40, block_size=4)
    table = model.get_input_embeddings()
    ids = ragged()
    sequences = [pool.sequence() for _ in ids]
    heads = pad_sequence([row[:n] for row, n in zip(ids, PREFIXES, strict=True)], batch_first=True)
    before = reader.read(sequences, PREFIXES, ids=heads, store=True)
    suffixes = [table(row[n:]).detach().requires_grad_() for row, n in zip(ids, PREFIXES, strict=True)]
    lengths = list(map(len, suffixes))
    after = reader.read(sequences, lengths, embeddings=pad_sequence(suffixes, batch_first=True))
    states, gradients = [], []
    for b, (row, n) in enumerate(zip(ids, PREFIXES, strict=True)):
        own = table(row[n:]).detach().requires_grad_()
        whole = torch.cat([table(row[:n]).detach(), own])[None]
        full = model.base_model(inputs_embeds=whole, use_cache=False).last_hidden_state[0]
        paged = torch.cat([before[b, :n], after[b, : lengths[b]]])
        states.append((full - paged).detach().abs().amax() / full.detach().abs().amax())
        cotangent = torch.randn_like(full[n:])
        (expected,) = torch.autograd.grad(full[n:], own, cotangent)
        (found,) = torch.autograd.grad(after[b, : lengths[b]], suffixes[b], cotangent, retain_graph=True)
        assert expected.abs().amax() > 0
        gradients.append((expected - found).abs().amax() / expected.abs().amax())
    return float(torch.stack(states).max()), float(torch.stack(gradients).max())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_states_and_gradients_are_those_of_full_recomputation(name: str, dtype: torch.dtype, bound: float):
    if name in ("gemma2", "gpt_oss"):
        bound = max(bound, 2e-6)  # a softmax and norms of their own are float32's in any dtype
    state, gradient = differences(decoder(name, dtype))
    assert state <= bound
    assert gradient <= bound


def test_left_padding_changes_nothing():
    # The same tokens through transformers' own left-padded batch; positions count from the first token.
    model = decoder("qwen2")
    ids = ragged()
    width = max(TOTALS)
    batch = torch.stack([torch.cat([torch.zeros(width - len(r), dtype=torch.int64), r]) for r in ids])
    mask = torch.stack([torch.cat([torch.zeros(width - len(r)), torch.ones(len(r))]) for r in ids]).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    padded = model.base_model(
        input_ids=batch, attention_mask=mask, position_ids=positions
    ).last_hidden_state
    reader = PagedReader(model)
    pool = reader.pool(40, block_size=4)
    states = reader.read([pool.sequence() for _ in ids], TOTALS, ids=pad_sequence(ids, batch_first=True))
    for b, row in enumerate(ids):
        torch.testing.assert_close(
            states[b, : len(row)], padded[b, width - len(row) :], rtol=1e-12, atol=1e-12
        )


def test_reading_in_pieces_is_reading_at_once():
    model = decoder("qwen3")
    reader = PagedReader(model)
    (ids,) = (torch.randint(3, tiny_models.VOCABULARY, (1, 11)),)
    pool = reader.pool(40, block_size=4)
    whole = reader.read([pool.sequence()], [11], ids=ids)
    sequence = pool.sequence()
    pieces = [
        reader.read([sequence], [stop - start], ids=ids[:, start:stop], store=True)
        for start, stop in ((0, 1), (1, 6), (6, 7), (7, 11))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_a_cap_that_the_model_itself_leaves_out_is_refused_by_name():
    model = decoder("gemma2")
    if not model._supports_sdpa:
        pytest.skip("this release of transformers refuses it itself")
    model.set_attn_implementation("sdpa")
    line = (
        "^Gemma2ForCausalLM caps attention scores at 0.5, and its attention 'sdpa' leaves the cap out: load"
    )
    with pytest.raises(ModelError, match=line):
        PagedReader(model)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_reach_the_attention(name: str, monkeypatch: pytest.MonkeyPatch):
    model, given = decoder(name), []
    attend = PagedPass.attend

    def noted(self: PagedPass, *arguments: object, **options: object) -> torch.Tensor:
        given.append(options)
        return attend(self, *arguments, **options)

    monkeypatch.setattr(PagedPass, "attend", noted)
    PagedReader(model)
    assert given[-1]["softcap"] == getattr(model.config, "attn_logit_softcapping", None)
    assert (given[-1]["sinks"] is None) == (name == "gemma2")


def test_the_models_own_attention_comes_back():
    model = decoder("qwen2")
    before = model.config._attn_implementation
    reader = PagedReader(model)
    sequence = reader.pool(1, block_size=4, limit=1).sequence()
    with pytest.raises(PoolExhausted):
        reader.read([sequence], [9], ids=torch.ones(1, 9, dtype=torch.int64), store=True)
    assert sequence.length == 0
    assert sequence.pool.free_blocks == 1
    assert model.config._attn_implementation == before


def test_a_failed_extension_leaves_all_sequences_as_they_were():
    reader = PagedReader(decoder("qwen2"))
    pool = reader.pool(3, block_size=4, limit=3)
    sequences = [pool.sequence(), pool.sequence()]
    with pytest.raises(PoolExhausted):
        reader.read(sequences, [8, 8], ids=torch.ones(2, 8, dtype=torch.int64), store=True)
    assert [s.length for s in sequences] == [0, 0]
    assert pool.free_blocks == 3


def test_a_pool_that_grows_between_reads_keeps_the_prefixes():
    model = decoder("qwen2")
    reader = PagedReader(model)
    pool = reader.pool(1, block_size=4)
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 11))
    whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    sequences = [pool.sequence(), pool.sequence()]
    pieces, sizes = [], []
    for part in ids.split(3, dim=1):
        pieces.append(reader.read(sequences, [part.shape[1]] * 2, ids=part, store=True))
        sizes.append(pool.blocks)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-12, atol=1e-12)
    assert sizes[0] < sizes[1] < sizes[-1]


def test_sequences_of_different_pools_are_refused():
    reader = PagedReader(decoder("qwen2"))
    ours, theirs = reader.pool(4, block_size=4), reader.pool(4, block_size=4)
    sequences = [ours.sequence(), ours.sequence(), theirs.sequence()]
    with pytest.raises(InputError, match="sequence 2 lies in another pool than sequence 0"):
        reader.read(sequences, [1, 1, 1], ids=torch.ones(3, 1, dtype=torch.int64), store=True)
    assert [s.length for s in sequences] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_follow_the_longest_sequence_are_refused(kind: str):
    # Beside a long sequence, such a model reads a short one with other frequencies than alone.
    scaling = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    if kind == "longrope":
        model = tiny_models.causal_lm("llama")
        model.model.rotary_emb.rope_type = kind
    else:
        model = tiny_models.causal_lm("llama", rope_parameters=scaling)
    with pytest.raises(ModelError, match=f"LlamaForCausalLM has rotary embeddings of type '{kind}'"):
        PagedReader(model.requires_grad_(False))
