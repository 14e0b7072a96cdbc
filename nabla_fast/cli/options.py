"""Command-line options: how help shows them, and those for DTOConfig, models and devices."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any, Literal

from nabla_fast.config import DTYPES, DTOConfig, SamplingConfig

# Before Python 3.13 argparse appends this to the help of BooleanOptionalAction.
_APPENDED = " (default: %(default)s)"

# Fields of DTOConfig, in words.
_HELP = {
    "parameter": "the descent moves logits, or the hidden states that give them",
    "update": "positions of a rollout that a descent moves",
    "relaxation": "how a token becomes differentiable",
    "iters": "Adam steps a position",
    "lr": "peak learning rate",
    "min_lr_ratio": "lowest learning rate of the cosine schedule, as a share of --lr",
    "warmup_steps": "steps of linear warm-up, at most --iters",
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
}
_SAMPLING = {"rollout_sampling": "", "resample_sampling": "resample-"}
_SAMPLING_HELP = {
    ("temperature", "rollout_sampling"): "temperature of rollouts; 0: greedy",
    ("temperature", "resample_sampling"): "temperature at optimized positions; 0: the same as 1",
    ("top_k", "rollout_sampling"): "likeliest tokens that rollouts draw from; 0: all",
    ("top_k", "resample_sampling"): "likeliest tokens that optimized positions draw from; 0: all",
    ("top_p", "rollout_sampling"): "probability mass that rollouts draw from",
    ("top_p", "resample_sampling"): "probability mass that optimized positions draw from",
}


class CommandParser(argparse.ArgumentParser):
    """A parser, and by inheritance its subparsers, whose help shows every option's default."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": _DefaultsFormatter, **options})


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


def add_config_options(parser: argparse.ArgumentParser, defaults: DTOConfig) -> None:
    """One option a field of DTOConfig, with ``defaults`` as defaults."""
    group = parser.add_argument_group("decoding")
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


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _add_sampling_options(group: Any, prefix: str, target: str, defaults: SamplingConfig) -> None:
    for field in dataclasses.fields(SamplingConfig):
        default = getattr(defaults, field.name)
        group.add_argument(
            f"--{prefix}{field.name.replace('_', '-')}",
            dest=f"{target}.{field.name}",
            type=type(default),
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
        settings[target] = SamplingConfig(**{f.name: values[f"{target}.{f.name}"] for f in fields})
    return DTOConfig(**settings)


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

    from nabla_fast.errors import InputError

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

    from nabla_fast.errors import InputError

    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
