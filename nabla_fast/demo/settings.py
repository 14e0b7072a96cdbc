"""What the demo's methods are given; its parser needs no more."""

from __future__ import annotations

from nabla_fast.config import DTOConfig, SamplingConfig

SAMPLES = 8  # of self-consistency and Best-of-N, and the generations ∇ may use
MAX_NEW_TOKENS = 40  # the longest answer has 26 characters and an EOS
BATCH = 256  # responses rolled out, and scored, at a time
SAMPLING = SamplingConfig(temperature=0.7, top_k=20, top_p=0.8)
GREEDY = SamplingConfig(temperature=0.0)
CONFIG = DTOConfig(max_generations=SAMPLES, rollout_sampling=SAMPLING)
