"""Gradient descent on the relaxed tokens of a trajectory: DTO."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.timing import timed
from nabla_fast.ops import (
    AdamState,
    Descent,
    GumbelNoise,
    cosine_schedule,
    dto_descent,
    dto_descent_latents,
    lm_logits,
    logits_backward,
)
from nabla_fast.ops.adam import adam_step_
from nabla_fast.ops.softmax import softmax_gradient
from nabla_fast.results import Stats


class TextualOptimizer:
    """K Adam steps on the parameter of a rollout's first position, or of all of them."""

    def __init__(self, gradients: GradientModel, config: DTOConfig):
        self._gradients = gradients
        self._config = config
        self._head = gradients.lm.head
        self._schedule = cosine_schedule(
            config.iters, config.lr, min_ratio=config.min_lr_ratio, warmup_steps=config.warmup_steps
        ).to(gradients.lm.device)

    def initial(self, hidden: Tensor) -> Tensor:
        """The parameter of rollout positions whose predicting hidden states are given, fp32 or wider.

        Args:
            hidden: [n, H] in the model's dtype.
        Returns:
            [n, V] logits or [n, H] latents, a new tensor.
        """
        if self._config.parameter == "logits":
            return lm_logits(hidden, self._head)
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True)

    def logits(self, parameter: Tensor) -> Tensor:
        """z of a parameter, [n, V]."""
        return parameter if self._config.parameter == "logits" else lm_logits(parameter, self._head)

    @torch.no_grad()
    def optimize_hard_(
        self,
        problem: Problem,
        committed: list[int],
        parameter: Tensor,
        tokens: Tensor,
        noise: GumbelNoise | None,
        stats: Stats,
    ) -> None:
        """Straight-through and Gumbel descent; changes ``parameter`` and ``tokens`` in place.

        Between two moves of a hard token the loss does not change, so one gradient serves until an
        updated row's argmax leaves its token; then G of all rows is computed anew.

        Args:
            parameter: of the first n positions, from :meth:`initial`; n is 1 or L.
            tokens: ŷ [L] int64, the hard tokens of all positions.
            noise: keys of all L positions' Gumbel noise, or None.
        """
        count = parameter.shape[0]
        state = AdamState.zeros(parameter)
        group = torch.zeros_like(state.step)
        part = None if noise is None else GumbelNoise(noise.seed[:count], noise.position[:count])
        while True:
            with timed(stats, "gradient"):
                gradient = self._gradients.hard(problem, committed, tokens, stats).rows(count)
                stats.llm_calls += 4
            with timed(stats, "descent"):
                descent = self._descend(parameter, gradient, state, group, part)
                tokens[:count] = descent.token
                if int(state.step[0]) == self._config.iters:
                    return

    def _descend(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: AdamState,
        group: Tensor,
        noise: GumbelNoise | None,
    ) -> Descent:
        options = {"group": group, "tau": self._config.tau, "noise": noise}
        if self._config.parameter == "logits":
            return dto_descent(parameter, gradient, state, self._schedule, **options)
        return dto_descent_latents(parameter, self._head, gradient, state, self._schedule, **options)

    @torch.no_grad()
    def optimize_soft_(
        self,
        problem: Problem,
        committed: list[int],
        parameter: Tensor,
        logits: Tensor,
        stats: Stats,
    ) -> None:
        """Soft descent: every step is a forward+backward; changes its arguments in place.

        Args:
            parameter: of the first n positions, from :meth:`initial`; n is 1 or L.
            logits: z [L, V] of all positions.
        """
        count = parameter.shape[0]
        state = AdamState.zeros(parameter)
        for step in range(self._config.iters):
            with timed(stats, "gradient"):
                trajectory = self._gradients.soft(problem, committed, logits, stats)
                stats.llm_calls += 4
            with timed(stats, "descent"):
                z = logits[:count]
                gradient = self._softmax_gradient(z, trajectory.rows(count))
                if self._config.parameter == "latents":
                    gradient = logits_backward(gradient, self._head)
                adam_step_(parameter, gradient, state, self._schedule[step].expand(count))
                logits[:count] = self.logits(parameter)

    def _softmax_gradient(self, z: Tensor, grad: Tensor) -> Tensor:
        return softmax_gradient(
            torch.softmax(z / self._config.tau, dim=-1), grad, z.argmax(dim=-1), self._config.tau
        )
