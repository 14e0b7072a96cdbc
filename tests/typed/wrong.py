"""Calls of the package each of which a type checker refuses."""

import torch

from nabla_fast import DTOConfig, NablaDecoder, ops

ops.token_stats(torch.randn(2, 5), temperature=0.5)
DTOConfig(iterations=3)
DTOConfig(parameter="hidden")
NablaDecoder(torch.nn.Linear(1, 1), None, None).generate(["a"], max_tokens=3)
