"""Training of the language model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.training.data import END_ID, PAD_ID, VOCAB_SIZE, Pool, lm_batch

LABEL_SMOOTHING = 0.01
BATCH = 128


def config(**overrides) -> Qwen2Config:
    """The architecture of all models here: 0.8M parameters."""
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=None,
        # On a CPU and at this length the plain attention is faster than the fused one.
        attn_implementation="eager",
        **overrides,
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    phase = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * phase)))


class Optimizer:
    """Muon for the matrices of the layers, AdamW for the rest.

    Muon needs about half the examples here; its rate is scaled to AdamW's, so both share one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            in_layer = ".layers." in name and parameter.ndim == 2
            (matrices if in_layer else others).append(parameter)
        self._parts = [
            torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self._parameters = [*matrices, *others]

    def step(self, lr: float) -> None:
        """Clip, update with the learning rate ``lr`` and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad()


def train(
    model: Qwen2ForCausalLM,
    pool: Pool,
    *,
    steps: int,
    peak_lr: float,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """Minimize the cross-entropy of the answers' tokens, in place.

    ``report`` gets the step and the loss after each step.
    """
    rng = random.Random(seed)
    optimizer = Optimizer(model)
    model.train()
    for step in range(steps):
        inputs, labels = lm_batch(pool, rng, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), label_smoothing=LABEL_SMOOTHING
        )
        loss.backward()
        optimizer.step(learning_rate(step, steps, peak_lr))
        report(step, loss.item())
