"""Settings of a decode: frozen, validated at construction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from nabla_fast.errors import InputError

# What a checkpoint's weights can be loaded as.
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
# Temperatures τ of a relaxation: τ and 1/τ are float32 numbers far from 0 and infinity.
TAU_RANGE = 2.0**-64, 2.0**64
_COLDEST = 1e-30
_MOST_ITERS = 1_000_000  # whose learning rates are a list


def _require(condition: bool, field_name: str, expected: str, value: object) -> None:
    if not condition:
        raise InputError(f"{field_name} must be {expected}, got {value!r}")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn: temperature, then top-k, then top-p.

    Attributes:
        temperature: ≤ 0 means greedy in rollouts and 1 in resampling.
        top_k: tokens kept; 0 keeps all; None is what the model's generation config says.
        top_p: smallest probability mass kept, in (0, 1]; the token that crosses it stays.
    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _require(_finite(self.temperature), "temperature", "a finite number", self.temperature)
        # Below, logits divided by it leave float32.
        coldest = self.temperature <= 0 or self.temperature >= _COLDEST
        _require(coldest, "temperature", f"at least {_COLDEST:g}, or 0 for greedy", self.temperature)
        known = self.top_k is None or (_whole(self.top_k) and self.top_k >= 0)
        _require(known, "top_k", "a whole number ≥ 0, or None for the model's own", self.top_k)
        _require(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)


@dataclass(frozen=True)
class DTOConfig:
    """Settings of Differentiable Textual Optimization and of the loop around it.

    Attributes:
        parameter: what the descent moves: "logits" z or "latents" h with z = W·h.
        update: "first" moves only the first position of a rollout, "all" moves all of them.
        relaxation: "straight_through", "gumbel" (the same with noise on the logits) or "soft".
        iters: Adam steps K a position, at most 1,000,000.
        lr: peak learning rate.
        min_lr_ratio: floor of a schedule that falls, as a share of ``lr``.
        warmup_steps: steps of linear warm-up, at most ``iters``.
        weight_decay: this times the parameter is added to its gradient, as in ``torch.optim.Adam``; at all
            positions, so that those move too which ``update="first"`` leaves without a gradient.
        tau: temperature of the relaxation, from 2⁻⁶⁴ to 2⁶⁴.
        reward_coeff: λ, weight of the reward.
        nll_coeff: ν, weight of the likelihood.
        confidence_threshold: only positions with max softmax(z) ≤ this are optimized; None: all.
        entropy_threshold: only positions with at least this entropy (nats); None: all.
        grad_threshold: only positions with ‖G‖₂ at least this; None: all.
        max_generations: rollouts a prompt may use, the first one counted.
        rejection: keep a new rollout only if its reward is higher; needs a reward model.
        rollout_sampling: how rollouts draw tokens; None: as the model's generation config says, greedily
            unless it has ``do_sample``.
        resample_sampling: how the token of an optimized position is drawn.
        draws: "torch": by torch's generators on the CPU, as the official release; "philox": by noise that
            is a function of seed, position and token, where the logits are; "auto": torch's for a language
            model on the CPU, Philox elsewhere.
        schedule: how the learning rate goes after the warm-up: "cosine" and "linear" fall from ``lr`` to
            ``min_lr_ratio`` of it, "constant" stays.
        gumbel_scale: factor of the noise of ``relaxation="gumbel"``.
    Raises:
        InputError: a value is out of its range.
    """

    parameter: Literal["logits", "latents"] = "logits"
    update: Literal["first", "all"] = "first"
    relaxation: Literal["straight_through", "soft", "gumbel"] = "straight_through"
    iters: int = 20
    lr: float = 0.01
    min_lr_ratio: float = 0.1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    tau: float = 1.0
    reward_coeff: float = 1.0
    nll_coeff: float = 1e-3
    confidence_threshold: float | None = 0.97
    entropy_threshold: float | None = None
    grad_threshold: float | None = None
    max_generations: int = 8
    rejection: bool = True
    rollout_sampling: SamplingConfig | None = field(default_factory=lambda: SamplingConfig(0.7, 20, 0.8))
    resample_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(0.5, 20, 0.8))
    draws: Literal["auto", "torch", "philox"] = "auto"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    gumbel_scale: float = 1.0

    def __post_init__(self) -> None:
        choices = {
            "parameter": ("logits", "latents"),
            "update": ("first", "all"),
            "relaxation": ("straight_through", "soft", "gumbel"),
            "draws": ("auto", "torch", "philox"),
            "schedule": ("cosine", "linear", "constant"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            _require(value in allowed, name, f"one of {', '.join(map(repr, allowed))}", value)
        _require(isinstance(self.rejection, bool), "rejection", "True or False", self.rejection)
        _require(
            _whole(self.iters) and 1 <= self.iters <= _MOST_ITERS,
            "iters",
            f"a whole number from 1 to {_MOST_ITERS:,}",
            self.iters,
        )
        _require(
            _whole(self.max_generations) and self.max_generations >= 1,
            "max_generations",
            "a whole number ≥ 1",
            self.max_generations,
        )
        _require(
            _whole(self.warmup_steps) and 0 <= self.warmup_steps <= self.iters,
            "warmup_steps",
            f"a whole number between 0 and iters={self.iters}",
            self.warmup_steps,
        )
        _require(_finite(self.lr) and self.lr > 0, "lr", "a finite number > 0", self.lr)
        taus = f"from {TAU_RANGE[0]:.3g} to {TAU_RANGE[1]:.3g}"
        _require(_finite(self.tau) and TAU_RANGE[0] <= self.tau <= TAU_RANGE[1], "tau", taus, self.tau)
        for name in ("reward_coeff", "nll_coeff", "weight_decay", "gumbel_scale"):
            value = getattr(self, name)
            _require(_finite(value) and value >= 0, name, "a finite number ≥ 0", value)
        _require(
            self.gumbel_scale == 1 or self.relaxation == "gumbel",
            "gumbel_scale",
            f"1 with relaxation={self.relaxation!r}, which has no noise",
            self.gumbel_scale,
        )
        self._require_share("min_lr_ratio", self.min_lr_ratio)
        if self.confidence_threshold is not None:
            self._require_share("confidence_threshold", self.confidence_threshold)
        for name in ("entropy_threshold", "grad_threshold"):
            value = getattr(self, name)
            _require(
                value is None or (_finite(value) and value >= 0),
                name,
                "None or a finite number ≥ 0",
                value,
            )
        rollouts, resampling = self.rollout_sampling, self.resample_sampling
        known = rollouts is None or isinstance(rollouts, SamplingConfig)
        _require(known, "rollout_sampling", "a SamplingConfig or None", rollouts)
        _require(
            isinstance(resampling, SamplingConfig), "resample_sampling", "a SamplingConfig", resampling
        )

    @staticmethod
    def _require_share(name: str, value: object) -> None:
        _require(_finite(value) and 0 <= value <= 1, name, "between 0 and 1", value)

    @classmethod
    def preset(cls, name: Literal["math500", "aime", "amc"]) -> DTOConfig:
        """The settings of the official release's script for a benchmark.

        They differ from the defaults, which are those of "amc" for logits without ``grad_threshold``. The
        scripts' ``max_new_tokens`` are :meth:`preset_max_new_tokens`.

        Args:
            name: "math500", "aime" (2024 and 2025) or "amc".
        Raises:
            InputError: there is no such preset.

        Example:
            >>> config = DTOConfig.preset("aime")
            >>> config.grad_threshold, config.rollout_sampling
            (8.0, SamplingConfig(temperature=0.6, top_k=None, top_p=0.95))
        """
        return cls(**_preset(name)[0])

    @staticmethod
    def preset_max_new_tokens(name: Literal["math500", "aime", "amc"]) -> int:
        """Most tokens of a response in the official release's script for a benchmark.

        Raises:
            InputError: there is no such preset.

        Example:
            >>> DTOConfig.preset_max_new_tokens("aime")
            3072
        """
        return _preset(name)[1]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The settings' names."""
        return tuple(f.name for f in fields(cls))


# Sampling of the scripts that leave top-k to the model's generation config.
_LONG = {
    "rollout_sampling": SamplingConfig(0.6, None, 0.95),
    "resample_sampling": SamplingConfig(0.5, None, 0.95),
}

# Benchmark → (fields that differ from the defaults, max_new_tokens).
PRESETS: dict[str, tuple[dict[str, Any], int]] = {
    "math500": ({"grad_threshold": 4.0, **_LONG}, 1024),
    "aime": ({"grad_threshold": 8.0, **_LONG}, 3072),
    "amc": ({"parameter": "latents", "grad_threshold": 4.0}, 1024),
}


def _preset(name: str) -> tuple[dict[str, Any], int]:
    known = isinstance(name, str) and name in PRESETS
    _require(known, "preset", f"one of {', '.join(map(repr, PRESETS))}", name)
    return PRESETS[name]
