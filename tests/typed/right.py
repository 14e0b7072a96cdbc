"""A caller of the package whose types are right."""

import torch

import nabla_fast
from nabla_fast import DTOConfig, NablaDecoder, SamplingConfig, ops


def use(lm: torch.nn.Module, rm: torch.nn.Module) -> list[str]:
    logits = torch.randn(2, 5)
    stats = ops.token_stats(logits, tau=0.5)
    entropy: torch.Tensor = stats.entropy
    mixes: list[torch.Tensor] = ops.embedding_mix(logits, [torch.randn(5, 3)], hard=False)
    state = ops.AdamState.zeros(logits)
    moved = ops.dto_descent(logits, torch.randn(2, 5), state, ops.cosine_schedule(20, 0.01))
    print(entropy, mixes[0], moved.token)
    config = DTOConfig(parameter="latents", rollout_sampling=SamplingConfig(0.7, 20, 0.8))
    decoder = NablaDecoder(lm, rm, None, config=config, loop="batched")
    results = decoder.generate(["7 3 12 -> 33"], seed=1, max_new_tokens=8)
    best = nabla_fast.best_of_n(lm, rm, None, ["a"], n=4)
    print(best[0].text)
    with nabla_fast.use_backend("torch"):
        return [result.text or "" for result in results]
