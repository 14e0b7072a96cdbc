"""Ops on plain tensors: a mix with its gradient, statistics of rows, a descent. No model is needed."""

import torch

from nabla_fast import ops, use_backend

N, V, H = 4, 32_000, 256
generator = torch.Generator().manual_seed(0)
logits = torch.randn(N, V, generator=generator).mul_(3).requires_grad_()  # [N, V]
embeddings = torch.randn(V, H, generator=generator)  # [V, H]

# Softmax-relaxed rows mix the table; hard=True would take one-hot rows forward.
(mix,) = ops.embedding_mix(logits, [embeddings], tau=0.7, hard=False)  # [N, H]
mix.square().sum().backward()
print("mix", list(mix.shape), "gradient", list(logits.grad.shape))

stats = ops.token_stats(logits.detach())
print("argmax", stats.argmax.tolist(), "confidence", [round(c, 3) for c in stats.confidence.tolist()])

# Adam steps under a constant gradient that speaks against the likeliest token, until another one leads.
z = logits.detach().clone()  # changed in place
grad = torch.zeros(N, V).scatter_(1, stats.argmax[:, None], 1.0)
state = ops.AdamState.zeros(z)
descent = ops.dto_descent(z, grad, state, ops.cosine_schedule(20, 0.02))
print("steps", state.step.tolist(), "moved", descent.flipped.tolist())

# The same by plain PyTorch, whatever kernels there are.
with use_backend("torch"):
    reference = ops.token_stats(logits.detach())
torch.testing.assert_close(stats, reference)
