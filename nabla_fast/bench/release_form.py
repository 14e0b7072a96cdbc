"""The form of the published release's inner loop: every step passes over all [L, V] rows.

A reconstruction to measure against, not the release's code. Of a trajectory of L tokens it moves the
first row alone, yet makes G [L, V], softmax, argmax, relaxed gradient and Adam of all rows; G comes from a
forward+backward of both models over the whole sequence. In its favour, embeddings are looked up instead of
mixed from dense one-hot rows, G is centred once and not at every step, and Adam is torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.continuation import Continuation
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.gradient import GradientModel, TrajectoryGradient
from nabla_fast.decode.reference.loop import SequentialLoop
from nabla_fast.decode.relaxed import Relaxed
from nabla_fast.decode.timing import timed
from nabla_fast.errors import InputError
from nabla_fast.models import LanguageModel, RewardModel
from nabla_fast.ops import cosine_schedule
from nabla_fast.ops.adam import BETA1, BETA2, EPSILON
from nabla_fast.results import Stats

# Settings that the release's inner loop is known for; others would be another program.
_ONLY = {
    "parameter": "logits",
    "update": "first",
    "relaxation": "straight_through",
    "schedule": "cosine",
    "weight_decay": 0.0,
}


class ReleaseFormLoop(SequentialLoop):
    """The sequential loop with the release's form of descent; it returns the same tokens.

    Attributes:
        steps: taken in all decodes, each over [L, V].
    Raises:
        InputError: the config asks for latents, for all rows to move, or for another relaxation.
    """

    def __init__(self, lm: LanguageModel, rm: RewardModel | None, config: DTOConfig):
        for name, value in _ONLY.items():
            if getattr(config, name) != value:
                raise InputError(
                    f"the release's form is reconstructed for {name}={value!r} alone, "
                    f"got {getattr(config, name)!r}"
                )
        super().__init__(lm, rm, config)
        self._gradients = _WholeGradients(lm, rm, config)
        self.steps = 0
        self._schedule = cosine_schedule(
            config.iters, config.lr, min_ratio=config.min_lr_ratio, warmup_steps=config.warmup_steps
        ).tolist()

    def _resample(self, problem: Problem, committed: list[int], current: Continuation, stats: Stats) -> int:
        z = self._lm.logits(current.hidden)
        self._descend(problem, committed, z, stats)
        return self._redraw(problem, committed, z[:1])

    def _descend(self, problem: Problem, committed: list[int], z: Tensor, stats: Stats) -> None:
        """K steps on z [L, V], in place; a moved hard token asks for G anew."""
        tau = self._config.tau
        # The mask that keeps the first row's gradient.
        moved = torch.zeros(len(z), 1, dtype=z.dtype, device=z.device)
        moved[0] = 1
        adam = torch.optim.Adam([z], betas=(BETA1, BETA2), eps=EPSILON)
        tokens = z.argmax(dim=-1)
        grad = self._whole_gradient(problem, committed, tokens, stats)
        for step, rate in enumerate(self._schedule):
            self.steps += 1
            with timed(stats, "descent"):
                p = torch.softmax(z / tau, dim=-1)
                mean = (p * grad).sum(dim=-1, keepdim=True) / p.sum(dim=-1, keepdim=True)
                z.grad = p.mul_(grad - mean).div_(tau).mul_(moved)
                adam.param_groups[0]["lr"] = rate
                adam.step()
                now = z.argmax(dim=-1)
                flipped = not torch.equal(now, tokens)
            if flipped and step + 1 < len(self._schedule):
                tokens = now
                grad = self._whole_gradient(problem, committed, tokens, stats)

    def _whole_gradient(
        self, problem: Problem, committed: list[int], tokens: Tensor, stats: Stats
    ) -> Tensor:
        """G [L, V], centred at the hard tokens: by that the small differences in it survive float32."""
        with timed(stats, "gradient"):
            grad = self._gradients.hard(problem, committed, tokens, stats).rows(len(tokens))
            stats.llm_calls += 4
            return grad.sub_(grad.gather(1, tokens[:, None]))


class _WholeGradients(GradientModel):
    def at(
        self, problem: Problem, committed: list[int], relaxed: Relaxed, stats: Stats
    ) -> TrajectoryGradient:
        return _WholeGradient(**vars(super().at(problem, committed, relaxed, stats)))


class _WholeGradient(TrajectoryGradient):
    def norms(self) -> Tensor:
        """‖G_i‖₂ of all positions [L], from G [L, V]."""
        return self.rows(len(self.hidden)).norm(dim=-1)
