"""Launches of dto_descent: z and its moments are float32, G is what the dtype says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nabla_fast.triton_kernels.dto_descent import dto_descent
from tools.compile_check.recording import Launch
from tools.compile_check.work import Work, size

ROWS, VOCABULARY, ITERS = 16, 151_936, 2


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    z, first, second = (torch.empty(ROWS, VOCABULARY, device="meta") for _ in range(3))
    grad = torch.empty(ROWS, VOCABULARY, dtype=dtype, device="meta")
    step = torch.empty(ROWS, dtype=torch.int64, device="meta")
    schedule = torch.empty(ROWS, ITERS, dtype=torch.float64, device="meta")
    plain = {"until": None, "group": None, "tau": 1.0, "noise": None}
    everything = {"until": step, "group": step, "tau": 1.0, "noise": (step, step)}
    if dtype != torch.float16:
        yield "plain", lambda: dto_descent(z, grad, first, second, step, schedule, **plain)
    if dtype == torch.float32:
        yield "noise, groups", lambda: dto_descent(z, grad, first, second, step, schedule, **everything)


def _noise(launch: Launch) -> list[torch.Tensor]:
    return [] if launch["noise_ptr"] is None else [launch["noise_ptr"]]


def _survey(launch: Launch) -> Work:
    z, grad = launch["z_ptr"], launch["grad_ptr"]
    return Work(z.numel(), reads=[z, grad, *_noise(launch)], writes=[launch["sums_ptr"]])


def _sums(launch: Launch) -> tuple[torch.Tensor, int]:
    """The sums of one turn."""
    return launch["sums_ptr"], size(launch["sums_ptr"]) // 2


def _step(launch: Launch) -> Work:
    state = [launch["z_ptr"], launch["first_ptr"], launch["second_ptr"]]
    once = [*state, launch["grad_ptr"], *_noise(launch)]
    # Each of a row's programs joins the sums of all slices.
    loaded = size(*once) + launch["slices"] * _sums(launch)[1]
    return Work(
        state[0].numel(), reads=[*once, _sums(launch)], writes=[*state, _sums(launch)], loaded=loaded
    )


def _team(launch: Launch) -> Work:
    return Work(launch["rows"] * launch["slices"], reads=[_sums(launch)])


WORK = {
    "dto_descent._survey_kernel": _survey,
    "dto_descent._step_kernel": _step,
    "dto_descent._team_kernel": _team,
    "dto_descent._finish_kernel": _team,
}
