"""A second set of modules over the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from tiny_models import causal_lm
from torch import nn

from nabla_fast.models.replica import replica, short_sighted

IDS = torch.tensor([[5, 9, 3, 14, 20, 7, 7, 11]])


def states(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(input_ids=IDS, use_cache=False).last_hidden_state


@pytest.mark.parametrize("kind", ["qwen2_tied", "gpt2", "gemma3"])
def test_a_replica_reads_what_its_model_reads(kind):
    model = causal_lm(kind)
    copied = replica(model)
    assert torch.equal(states(copied), states(model))
    assert [id(w) for w in copied.parameters()] == [id(w) for w in model.parameters()]
    assert not set(copied.modules()) & set(model.modules())


def test_weights_are_shared_and_configs_are_not():
    model = causal_lm("qwen2")
    copied = replica(model)
    before = model.config._attn_implementation
    copied.config._attn_implementation = "eager"
    assert copied.model.layers[0].self_attn.config is copied.config
    assert model.config._attn_implementation == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert torch.allclose(states(copied), states(model), atol=1e-5)  # eager attention rounds otherwise
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    assert torch.allclose(states(copied), states(model), atol=1e-5)


def test_hooks_of_the_model_are_the_replicas_too():
    model = causal_lm("qwen2")
    copied = replica(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: torch.zeros(1, 8, 16).double())
    assert torch.equal(states(copied), states(model))
    handle.remove()
    assert states(copied).abs().amax() > 0


def test_forwards_that_are_bound_to_a_module_are_bound_to_its_copy():
    """As accelerate puts its hooks on: the forward is a partial of the module and of its former forward."""
    model = causal_lm("qwen2")
    for module in model.modules():
        former = module.forward
        module._old_forward = former
        module.forward = functools.partial(
            lambda m, *given, **named: m._old_forward(*given, **named), module
        )
    copied = replica(model)
    seen = []
    for module in copied.modules():
        module.register_forward_pre_hook(lambda m, _: seen.append(m))
    expected = states(model)
    seen.clear()
    assert torch.equal(states(copied), expected)
    assert len(seen) > 10
    assert set(seen) <= set(copied.modules())


def test_forwards_that_hold_a_module_hold_its_copy():
    """As by hand: a function around a module's own forward, which counts its calls."""
    model, calls = causal_lm("qwen2"), []

    def wrapped(module: nn.Module) -> Callable[..., object]:
        forward = module.forward

        def run(*given, **named):
            calls.append(module)
            return forward(*given, **named)

        return run

    for module in model.modules():
        module.forward = wrapped(module)
    copied, expected = replica(model), states(model)
    calls.clear()
    assert torch.equal(states(copied), expected)
    assert len(calls) > 10
    assert set(calls) <= set(copied.modules())
    calls.clear()
    states(model)
    assert set(calls) <= set(model.modules())


def test_windows_are_shortened_in_the_replica_alone():
    model = causal_lm("mistral", sliding_window=40)
    shortened = short_sighted(model, 3)
    assert shortened.config.sliding_window == 3
    assert model.config.sliding_window == 40
    assert not torch.allclose(states(shortened)[:, -1], states(model)[:, -1])
    assert torch.allclose(states(shortened)[:, :3], states(model)[:, :3])
    assert short_sighted(model, 40) is None
    assert short_sighted(causal_lm("gpt2"), 3) is None
