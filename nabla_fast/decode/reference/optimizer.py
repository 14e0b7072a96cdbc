"""Gradient descent on the relaxed tokens of one trajectory: DTO."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.decode.descent import hard_descent_, moving_rows, soft_step_
from nabla_fast.decode.parameter import initial_parameter, parameter_logits
from nabla_fast.decode.problem import Problem
from nabla_fast.decode.reference.gradient import GradientModel
from nabla_fast.decode.schedule import learning_rates
from nabla_fast.decode.timing import timed
from nabla_fast.decode.trajectory import TrajectoryGradient
from nabla_fast.ops import AdamState, GumbelNoise
from nabla_fast.results import Stats


class TextualOptimizer:
    """K Adam steps on the parameter of a rollout's first position, or of all of them."""

    def __init__(self, gradients: GradientModel, config: DTOConfig):
        self._gradients = gradients
        self._config = config
        self._head = gradients.lm.head
        self._schedule = learning_rates(config, gradients.lm.device)

    def initial(self, hidden: Tensor) -> Tensor:
        """The parameter [n, V or H] of positions that hidden states [n, H] predict, a new tensor."""
        return initial_parameter(self._config, hidden, self._head)

    def logits(self, parameter: Tensor) -> Tensor:
        """z [n, V] of a parameter."""
        return parameter_logits(self._config, parameter, self._head)

    def _rows(self, gradient: TrajectoryGradient, count: int) -> Tensor:
        """G [count, V] as the first rows are descended along."""
        first = 1 if self._config.update == "first" else count
        return moving_rows(self._config, gradient.rows(first), [count])

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
        rows_noise = None if noise is None else GumbelNoise(noise.seed[:count], noise.position[:count])
        while True:
            with timed(stats, "gradient"):
                gradient = self._rows(self._gradients.hard(problem, committed, tokens, stats), count)
                stats.llm_calls += 4
            with timed(stats, "descent"):
                descent = hard_descent_(
                    self._config,
                    parameter,
                    gradient,
                    state,
                    self._schedule,
                    self._head,
                    group=group,
                    noise=rows_noise,
                )
                tokens[:count] = descent.token
                if int(state.step[0]) == self._config.iters:
                    return

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
        for rate in self._schedule:
            with timed(stats, "gradient"):
                trajectory = self._gradients.soft(problem, committed, logits, stats)
                stats.llm_calls += 4
            with timed(stats, "descent"):
                rows = self._rows(trajectory, count)
                soft_step_(self._config, parameter, logits[:count], rows, state, rate, self._head)
