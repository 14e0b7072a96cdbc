"""Command-line options: how help shows them, and those for DTOConfig, models and devices."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

from nabla_fast.config import DTYPES, PRESETS, DTOConfig, SamplingConfig
from nabla_fast.errors import InputError

# Before Python 3.13 argparse appends this to the help of BooleanOptionalAction.
_APPENDED = " (default: %(default)s)"

# Fields of DTOConfig, in words.
_HELP = {
    "parameter": "the descent moves logits, or the hidden states that give them",
    "update": "positions of a rollout that a descent moves",
    "relaxation": "how a token becomes differentiable",
    "iters": "Adam steps a position",
    "lr": "peak learning rate",
    "min_lr_ratio": "lowest learning rate of a schedule that falls, as a share of --lr",
    "warmup_steps": "steps of linear warm-up, at most --iters",
    "weight_decay": "Adam's weight decay, of all positions of a rollout",
    "tau": "temperature of the relaxation",
    "reward_coeff": "weight of the reward",
    "nll_coeff": "weight of the likelihood",
    "confidence_threshold": "optimize positions with confidence up to this; 'none': all",
    "entropy_threshold": "optimize positions with at least this entropy, in nats; 'none': all",
    "grad_threshold": "optimize positions with at least this gradient norm; 'none': all",
    "max_generations": "rollouts a prompt may use, the first one counted",
    "rejection": "keep a new rollout only if its reward is higher",
    "draws": "torch's generators, or noise that is a function of seed, position and token; auto: torch's "
    "on the CPU",
    "schedule": "how the learning rate goes after the warm-up",
    "gumbel_scale": "factor of the noise of --relaxation gumbel",
}
_SAMPLING = {"rollout_sampling": "", "resample_sampling": "resample-"}
_SAMPLING_HELP = {
    (
        "temperature",
        "rollout_sampling",
    ): "temperature of rollouts; 0: greedy; 'model': rollouts draw as the model's generation config says",
    ("temperature", "resample_sampling"): "temperature at optimized positions; 0: the same as 1",
    ("top_k", "rollout_sampling"): "likeliest tokens that rollouts draw from; 0: all; 'model': as the "
    "model's generation config says",
    ("top_k", "resample_sampling"): "likeliest tokens that optimized positions draw from; 0: all; "
    "'model': as the model's generation config says",
    ("top_p", "rollout_sampling"): "probability mass that rollouts draw from",
    ("top_p", "resample_sampling"): "probability mass that optimized positions draw from",
}


# Options that may leave their value to the model's generation config.
_MODELS = {
    ("temperature", "rollout_sampling"),
    ("top_k", "rollout_sampling"),
    ("top_k", "resample_sampling"),
}


class CommandParser(argparse.ArgumentParser):
    """A parser, and by inheritance its subparsers, whose help shows every option's default."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": _DefaultsFormatter, **options})
        self._presets: dict[str, dict[str, Any]] = {}

    def add_presets(self, group: Any, presets: dict[str, dict[str, Any]], **options: Any) -> None:
        """``--preset``: its values are defaults, so that other options count wherever they stand.

        Args:
            group: of the parser's options, where help shows it.
            presets: for each choice, a default for each destination.
        """
        self._presets = presets
        group.add_argument("--preset", choices=tuple(presets), **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As the base class has it, with the defaults of ``--preset``."""
        chosen = None
        if self._presets:
            first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
            first.add_argument("--preset")
            # What is wrong with the options is said by the parser itself, below.
            with suppress(argparse.ArgumentError):
                chosen = first.parse_known_args(args)[0].preset
        values = self._presets.get(chosen, {})
        before = {name: self.get_default(name) for name in values}
        self.set_defaults(**values)
        try:
            return super().parse_known_args(args, namespace)
        finally:
            self.set_defaults(**before)


class _DefaultsFormatter(argparse.HelpFormatter):
    """Appends the default to each option's help, unless the help says "(default: …)" itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").removesuffix(_APPENDED)
        if not action.option_strings or action.default is argparse.SUPPRESS or "(default: " in text:
            return text
        return f"{text} (default: {_shown(action.default)})"


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if default is None or default == []:
        return "none"
    return str(default).replace("%", "%%")


def add_config_options(parser: CommandParser, defaults: DTOConfig, *, tokens: str | None = None) -> None:
    """One option a field of DTOConfig, with ``defaults`` as defaults, and ``--preset``.

    Args:
        tokens: destination of the parser's option for the most tokens of a response, which a preset sets.
    """
    group = parser.add_argument_group("decoding")
    presets = {}
    for name in PRESETS:
        config = DTOConfig.preset(name)
        presets[name] = _destinations(config) | {"rollout_defaults": config.rollout_sampling}
        if tokens is not None:
            presets[name][tokens] = DTOConfig.preset_max_new_tokens(name)
    parser.add_presets(
        group,
        presets,
        help="settings of the official release's script for a benchmark, where options do not say otherwise"
        + ("; of --max-new-tokens too" if tokens else ""),
    )
    parser.set_defaults(rollout_defaults=defaults.rollout_sampling)
    hints = typing.get_type_hints(DTOConfig)
    for field in dataclasses.fields(DTOConfig):
        default, hint = getattr(defaults, field.name), hints[field.name]
        if field.name in _SAMPLING:
            _add_sampling_options(group, _SAMPLING[field.name], field.name, default)
            continue
        options: dict[str, Any] = {"default": default, "help": _HELP.get(field.name)}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            options["choices"] = typing.get_args(hint)
        else:
            options["type"] = _number_or_none if hint == float | None else hint
            options["metavar"] = "N" if hint is int else "X"
        group.add_argument("--" + field.name.replace("_", "-"), **options)


def _destinations(config: DTOConfig) -> dict[str, Any]:
    """Values of a config by the destinations of its options."""
    values = {name: getattr(config, name) for name in DTOConfig.names() if name not in _SAMPLING}
    for target in _SAMPLING:
        for field in dataclasses.fields(SamplingConfig):
            values[f"{target}.{field.name}"] = getattr(getattr(config, target), field.name)
    return values


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _or_model(kind: type) -> Any:
    """A number of a kind, or None for "model"."""

    def read(text: str) -> Any:
        return None if text.lower() == "model" else kind(text)

    read.__name__ = kind.__name__  # as argparse says what is wrong
    return read


def _add_sampling_options(group: Any, prefix: str, target: str, defaults: SamplingConfig) -> None:
    for field in dataclasses.fields(SamplingConfig):
        default = getattr(defaults, field.name)
        group.add_argument(
            f"--{prefix}{field.name.replace('_', '-')}",
            dest=f"{target}.{field.name}",
            type=_or_model(type(default)) if (field.name, target) in _MODELS else type(default),
            default=default,
            metavar="N" if isinstance(default, int) else "X",
            help=_SAMPLING_HELP.get((field.name, target)),
        )


def config_from(arguments: argparse.Namespace) -> DTOConfig:
    """The DTOConfig that the options describe.

    Raises:
        InputError: a value is out of its range.
    """
    values = vars(arguments)
    settings = {name: values[name] for name in DTOConfig.names() if name not in _SAMPLING}
    for target in _SAMPLING:
        fields = dataclasses.fields(SamplingConfig)
        given = {f.name: values[f"{target}.{f.name}"] for f in fields}
        if given["temperature"] is None:
            _expect_alone(values, given)
        settings[target] = None if given["temperature"] is None else SamplingConfig(**given)
    return DTOConfig(**settings)


def _expect_alone(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse what ``--temperature model`` leaves without effect."""
    for name in ("top_k", "top_p"):
        if given[name] != getattr(values["rollout_defaults"], name):
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} has no effect beside --temperature model: leave one of them out")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    """``--threads``, as :func:`set_threads` takes it."""
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """The device and the dtype of the models."""
    parser.add_argument("--device", default="cpu", help="the models' torch device")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="the models' dtype; auto: float32 on the CPU, the checkpoint's own elsewhere",
    )


def check_device(device: str) -> str:
    """The device's name if torch has it.

    Raises:
        InputError: the name is unknown, or the device is not there.
    """
    import torch

    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("nothing is computed there")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def set_threads(threads: int | None) -> None:
    """Torch's CPU threads; None leaves its choice.

    Raises:
        InputError: fewer than one.
    """
    import torch

    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
