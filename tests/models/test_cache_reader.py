"""Suffixes behind caches of the models' own kinds, against full recomputation."""

from __future__ import annotations

import functools
import gc
import random

import families
import pytest
import tiny_models
import torch
from torch import nn

from nabla_fast.errors import ModelError
from nabla_fast.models.backbone import Forward, backbone
from nabla_fast.models.cache_reader import CacheReader
from nabla_fast.models.cache_sequences import CachedSequence
from nabla_fast.models.paged_kv import PoolExhausted
from nabla_fast.models.reader import padded_ids
from nabla_fast.models.readers import suffix_reader
from nabla_fast.models.whole_reader import WholeReader

# Name → whether its sequences can be cut back anywhere, whether gradients begin behind the cache.
CACHED = {
    "bart": (True, True),
    "bloom": (True, True),
    "falcon, alibi": (True, True),
    "mpt": (True, True),
    "lfm2": (False, True),
    "mamba": (False, False),
    "mamba2": (False, True),
    "falcon_mamba": (False, False),
    "qwen3_next": (False, True),
    "rwkv": (False, False),
    "gemma3": (True, True),
    "mistral, window 8": (True, True),
}
# Others have a softmax, norms or a scan in float32, whatever their dtype.
EXACT = {"bart", "falcon, alibi", "lfm2", "gemma3", "mistral, window 8"}


def model(name: str) -> nn.Module:
    made = families.language_model(name, dtype=torch.float64)
    if hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("eager")  # grouped products have no float64
    return made.requires_grad_(False)


def bound(name: str) -> float:
    return 1e-12 if name in EXACT else 1e-5


def whole(lm: nn.Module, ids: list[int]) -> torch.Tensor:
    """States [S, H] from one pass over everything."""
    forward = Forward(backbone(lm))
    return forward.states(input_ids=torch.tensor([ids]), use_cache=False)[0]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", CACHED)
def test_random_forks_and_cuts_read_what_one_pass_reads(name: str):
    lm = model(name)
    reader = CacheReader(lm)
    assert (reader.cuts_back, reader.frozen_gradients) == CACHED[name]
    chance, pool = random.Random(0), reader.pool(1, spacing=4)
    group = pool.group()
    # Each sequence beside the tokens that it has read.
    alive: list[tuple[CachedSequence, list[int]]] = [(group.sequence(), [])]
    forked = 0
    for _ in range(25):
        chosen = chance.sample(range(len(alive)), min(len(alive), chance.randint(1, 3)))
        parts = [
            [chance.randrange(2, families.VOCABULARY) for _ in range(chance.randint(1, 6))] for _ in chosen
        ]
        parts = [
            part if len(alive[n][1]) + len(part) <= 30 else [5]
            for n, part in zip(chosen, parts, strict=True)
        ]
        lengths = list(map(len, parts))
        sequences = [alive[n][0] for n in chosen]
        with torch.no_grad():
            states = reader.read(sequences, lengths, ids=padded_ids(parts, torch.device("cpu")), store=True)
        for n, part, found in zip(chosen, parts, states, strict=True):
            sequence, tokens = alive[n]
            tokens += part
            assert sequence.length == len(tokens)
            assert error(found[: len(part)], whole(lm, tokens)[-len(part) :]) <= bound(name)
        sequence, tokens = alive[chance.choice(chosen)]
        length = chance.randint(0, len(tokens))
        fork = sequence.fork(length)
        forked += 0 < fork.length < len(tokens)
        assert (
            max(0, length - 4 if not reader.cuts_back and reader._reading.manner.several else 0)
            <= fork.length
            <= length
        )
        alive.append((fork, tokens[: fork.length]))
        sequence, tokens = alive[chance.randrange(len(alive))]
        if chance.random() < 0.3:
            sequence.truncate(chance.randint(0, len(tokens)))
            del tokens[sequence.length :]
        alive = [pair for pair in alive if len(pair[1]) < 30][-6:] or [(group.sequence(), [])]
    assert forked >= 3
    group.free()
    assert pool.tokens == 0


@pytest.mark.parametrize("name", [name for name, (_, gradients) in CACHED.items() if gradients])
def test_gradients_of_suffixes_are_those_of_full_recomputation(name: str):
    lm = model(name)
    reader, table = CacheReader(lm), lm.get_input_embeddings()
    pool, ids = reader.pool(1, spacing=4), torch.randint(2, families.VOCABULARY, (3, 14))
    cuts, ends = (5, 5, 9), (14, 12, 14)
    sequences = [pool.sequence() for _ in ids]
    for sequence, row, cut in zip(sequences, ids, cuts, strict=True):
        with torch.no_grad():
            reader.read([sequence], [cut], ids=row[None, :cut], store=True)
    suffixes = [
        table(row[a:b]).detach().requires_grad_() for row, a, b in zip(ids, cuts, ends, strict=True)
    ]
    batch = nn.utils.rnn.pad_sequence(suffixes, batch_first=True)
    lengths = list(map(len, suffixes))
    states = reader.read([s.prefix(s.length) for s in sequences], lengths, embeddings=batch)
    for row, cut, suffix, found in zip(ids, cuts, suffixes, states, strict=True):
        own = suffix.detach().requires_grad_()
        everything = torch.cat([table(row[:cut]).detach(), own])[None]
        full = Forward(backbone(lm)).states(inputs_embeds=everything, use_cache=False)[0, cut:]
        weights = torch.randn_like(full)
        (expected,) = torch.autograd.grad(full, own, weights)
        (ours,) = torch.autograd.grad(found[: len(full)], suffix, weights, retain_graph=True)
        assert error(ours, expected) <= bound(name)
        # A prefix of other tokens gives another gradient: the comparison can tell.
        other = torch.cat([table(row[:cut].flip(0) + 1).detach(), own])[None]
        full = Forward(backbone(lm)).states(inputs_embeds=other, use_cache=False)[0, cut:]
        assert error(torch.autograd.grad(full, own, weights)[0], expected) > 1e-3
    assert [sequence.length for sequence in sequences] == list(cuts)


def test_a_pool_holds_no_more_tokens_than_it_may():
    reader = CacheReader(model("mamba2"))
    pool = reader.pool(1, block_size=4, limit=5)
    sequences = [pool.sequence(), pool.sequence()]
    reader.read(sequences, [8, 8], ids=torch.ones(2, 8, dtype=torch.int64), store=True)
    with pytest.raises(PoolExhausted, match="may hold 20 tokens, 16 are held and 9 more are needed: 25"):
        reader.read(sequences[:1], [1], ids=torch.ones(1, 1, dtype=torch.int64), store=True)
    assert [sequence.length for sequence in sequences] == [8, 8]


@pytest.mark.parametrize("name", ["bloom", "qwen3_next"])
def test_a_sequence_does_not_keep_the_rows_of_others(name: str):
    reader = CacheReader(model(name))
    pool = reader.pool(1, spacing=4)
    sequences = [pool.sequence() for _ in range(4)]
    ids = torch.randint(2, families.VOCABULARY, (4, 7))
    reader.read(sequences, [7, 5, 6, 7], ids=ids, store=True)
    for n in range(3):
        reader.read([sequences[3]], [1], ids=ids[3:, n : n + 1], store=True)  # goes on alone
    assert pool.tokens == (4 * 7 if reader.cuts_back else 7 + 5 + 6) + 10
    for sequence in sequences[1:3]:
        sequence.free()
    assert pool.tokens == 7 + 10
    sequences[0].fork(5).free()
    sequences[0].truncate(5)
    gc.collect()
    assert pool.tokens == (7 if reader.cuts_back else sequences[0].length) + 10
    sequences[3].prefix(6)
    sequences[3].free()
    assert pool.tokens == (7 if reader.cuts_back else sequences[0].length)


def test_the_first_right_way_is_chosen():
    ways = {
        "qwen2": "behind paged keys and values, by the package's own passes",
        "gpt2": "behind paged keys and values, by the model's modules",
        "bloom": "behind a DynamicCache (keys and values shared)",
        "qwen3_next": "behind a DynamicCache (states copied where sequences part)",
        "mamba": "behind a DynamicCache (states copied where sequences part, one token at a time behind it)"
        "; gradients by passes over everything",
        "rwkv": "behind its own cache (states copied where sequences part, one sequence at a time)"
        "; gradients by passes over everything",
        "openai": "anew with each pass",
    }
    assert {name: suffix_reader(model(name)).way for name in ways} == ways


def test_what_is_read_otherwise_behind_a_cache_is_not_read_so(monkeypatch: pytest.MonkeyPatch):
    # A state that a model does not put into its cache: a fork would be read with its brother's.
    lm = model("bloom")
    under, memory = backbone(lm), [torch.zeros(())]
    forward = type(under).forward

    @functools.wraps(forward)
    def remembering(self: nn.Module, *arguments: object, **options: object) -> object:
        output = forward(self, *arguments, **options)
        if options.get("use_cache"):
            output.last_hidden_state = output.last_hidden_state + memory[0]
            memory[0] = output.last_hidden_state.detach().abs().mean()
        return output

    monkeypatch.setattr(type(under), "forward", remembering)
    with pytest.raises(ModelError, match="BloomForCausalLM reads something else behind its cache"):
        CacheReader(lm)
    assert isinstance(suffix_reader(lm), WholeReader)


def test_rotary_embeddings_that_follow_the_longest_sequence_are_refused_by_every_way():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    lm = tiny_models.causal_lm("llama", rope_parameters=scaling)
    with pytest.raises(ModelError, match="LlamaForCausalLM has rotary embeddings of type 'dynamic'"):
        suffix_reader(lm.requires_grad_(False))
