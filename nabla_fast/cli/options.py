"""Command-line options that stand for the fields of DTOConfig, and for the models."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from nabla_fast.config import DTOConfig, SamplingConfig

_CHOICES = {
    "parameter": ("logits", "latents"),
    "update": ("first", "all"),
    "relaxation": ("straight_through", "soft", "gumbel"),
}
_SAMPLING = {"rollout_sampling": "", "resample_sampling": "resample-"}
_HELP = {
    "iters": "Adam steps a position",
    "lr": "peak learning rate",
    "reward_coeff": "weight of the reward",
    "nll_coeff": "weight of the likelihood",
    "confidence_threshold": "optimize positions with confidence up to this ('none': all)",
    "entropy_threshold": "optimize positions with at least this entropy, in nats",
    "grad_threshold": "optimize positions with at least this gradient norm",
    "max_generations": "rollouts a prompt may use",
}


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def add_config_options(parser: argparse.ArgumentParser, defaults: DTOConfig) -> None:
    """One option a field of DTOConfig, with ``defaults`` as defaults."""
    group = parser.add_argument_group("decoding")
    for field in dataclasses.fields(DTOConfig):
        default = getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {
            "default": default,
            "help": f"{_HELP.get(field.name, '')} ({default})".strip(),
        }
        if field.name in _SAMPLING:
            _add_sampling_options(group, _SAMPLING[field.name], field.name, default)
        elif field.name == "rejection":
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=default,
                help="keep only what scores higher",
            )
        elif field.name in _CHOICES:
            group.add_argument(flag, choices=_CHOICES[field.name], **options)
        elif field.name.endswith("_threshold"):
            group.add_argument(flag, type=_number_or_none, metavar="X", **options)
        else:
            group.add_argument(flag, type=type(default), metavar="X", **options)


def _add_sampling_options(group: Any, prefix: str, target: str, defaults: SamplingConfig) -> None:
    what = "resampling" if prefix else "rollouts"
    for field in dataclasses.fields(SamplingConfig):
        default = getattr(defaults, field.name)
        group.add_argument(
            f"--{prefix}{field.name.replace('_', '-')}",
            dest=f"{target}.{field.name}",
            type=type(default),
            default=default,
            metavar="X",
            help=f"{field.name} of {what} ({default})",
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


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where and in which dtype the models run."""
    from nabla_fast.checkpoints import DTYPES

    parser.add_argument("--device", default="cpu", help="a torch device (cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the models; auto: float32 on the CPU, the checkpoint's own elsewhere",
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
