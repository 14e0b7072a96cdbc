"""Time of a gradient pass over a suffix of a frozen prefix, beside two passes that people write."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nabla_fast.models.reader import PagedReader

PREFIX, SUFFIX = 2048, 128
# The pass must be at least this many times as fast as each of the others.
TARGETS = {"recomputed": 4.0, "concatenated": 1.2}
# Of the largest gradient, between passes.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def measure_prefix(
    device: torch.device, repeats: int = 3, *, quick: bool = False, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Milliseconds of forward and backward of 8 layers to the embeddings of the suffix, three ways.

    ``paged``: the prefix's keys and values are read from a pool. ``recomputed``: the model reads prefix and
    suffix. ``concatenated``: transformers' own passes, after a cache of the prefix to which each layer's
    keys and values are concatenated. There are no times if the three gradients differ.

    Args:
        dtype: of the model; None: bfloat16 on a GPU, float32 elsewhere.
    """
    prefix, suffix = (32, 8) if quick else (PREFIX, SUFFIX)
    causal = _model(device, quick, dtype)
    model = causal.model
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, prefix + suffix), generator=generator).to(device)
    embedded = model.embed_tokens(ids).detach()
    cotangent = torch.randn(1, suffix, model.config.hidden_size, generator=generator)
    cotangent = cotangent.to(device=device, dtype=embedded.dtype)
    sides = _sides(causal, ids[:, :prefix], embedded[:, :prefix])

    def timed(states: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        own = embedded[:, prefix:].clone().requires_grad_()
        _wait(device)
        start = time.perf_counter()
        states(own)[:, -suffix:].backward(cotangent)
        _wait(device)
        return time.perf_counter() - start, own.grad.float()

    gradients = {name: timed(side)[1] for name, side in sides.items()}
    expected = gradients["recomputed"]
    errors = {
        name: float((g - expected).abs().max() / expected.abs().max()) for name, g in gradients.items()
    }
    result: dict[str, Any] = {
        "prefix": prefix,
        "suffix": suffix,
        "dtype": str(embedded.dtype).removeprefix("torch."),
        "errors": errors,
        "same_gradients": max(errors.values()) <= _TOLERANCE[embedded.dtype],
        "targets": TARGETS,
    }
    if not result["same_gradients"]:
        return result
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(timed(side)[0])
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return result | {"ms": ms, "faster": {name: ms[name] / ms["paged"] for name in TARGETS}}


def _model(device: torch.device, quick: bool, dtype: torch.dtype | None) -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=2 if quick else 8,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


@torch.no_grad()
def _sides(causal: LlamaForCausalLM, ids: Tensor, prefix: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of the suffix's embeddings [1, S, H] that return states, the suffix's last."""
    reader, model = PagedReader(causal), causal.model
    sequence = reader.pool(blocks=prefix.shape[1] // 16 + 2).sequence()
    reader.read([sequence], [prefix.shape[1]], ids=ids, store=True)
    frozen = [(layer.keys, layer.values) for layer in model(ids, use_cache=True).past_key_values.layers]

    def concatenated(own: Tensor) -> Tensor:
        cache = DynamicCache()  # a new one each time: a pass extends it
        for index, (keys, values) in enumerate(frozen):
            cache.update(keys, values, index)
        return model(inputs_embeds=own, past_key_values=cache, use_cache=True).last_hidden_state

    return {
        "paged": lambda own: reader.read([sequence], [own.shape[1]], embeddings=own),
        "recomputed": lambda own: model(inputs_embeds=torch.cat([prefix, own], dim=1)).last_hidden_state,
        "concatenated": concatenated,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
