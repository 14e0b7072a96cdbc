"""The configuration of each kernel on each GPU: tile sizes, warps, stages.

``presets.json`` maps a device's name, or its architecture, or ``default``, to kernels and operands. Where
a release of Triton needs more registers than others, ``sm_90, Triton 3.6`` comes before ``sm_90``.
Nothing is tuned when a kernel is called: a choice by timing would differ from run to run, wait for the
device, and break the capture of a graph. ``python -m tools.tune`` measures on a GPU and writes the
file; ``measured`` says when it did, and null that nothing of an entry was timed.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from nabla_fast.plans.plan import other_configuration

PATH = Path(__file__).parent / "presets.json"

Config = dict[str, int]

_RELEASE = "Triton " + ".".join(triton.__version__.split(".")[:2])

_assumed: str | None = None
_forced: dict[tuple[str, str], Config] = {}


@functools.cache
def _presets() -> dict[str, dict]:
    return json.loads(PATH.read_text())


@functools.cache
def _names(device: torch.device) -> tuple[str, ...]:
    """The entries that a device may have, the best one first."""
    if device.type != "cuda":
        return ("interpreter", "default")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return (properties.name, properties.gcnArchName.split(":")[0], "default")
    return (properties.name, f"sm_{properties.major}{properties.minor}", "default")


@contextlib.contextmanager
def assumed(architecture: str) -> Iterator[None]:
    """Inside, every device is taken for one of this architecture: to compile for absent ones."""
    global _assumed
    former, _assumed = _assumed, architecture
    try:
        with other_configuration():
            yield
    finally:
        _assumed = former


def starts_early(device: torch.device) -> bool:
    """Whether a launch may start before the one ahead of it has ended: on NVIDIA's GPUs from sm_90 on."""
    names = (_assumed,) if _assumed else _names(device)
    numbers = (name.removeprefix("sm_") for name in names if name.startswith("sm_"))
    return any(number.isdigit() and int(number) >= 90 for number in numbers)


@contextlib.contextmanager
def forced(kernel: str, operands: str, choice: Config) -> Iterator[None]:
    """Inside, launches of one kernel on one kind of operands have this configuration: to compare some."""
    key = kernel, operands
    _forced[key] = choice
    try:
        with other_configuration():
            yield
    finally:
        del _forced[key]


def config(kernel: str, operands: str, device: torch.device) -> Config:
    """The keyword arguments of a launch.

    Args:
        kernel: name in ``presets.json``.
        operands: what it computes with, as the kernel's file names it.
        device: of the tensors.
    """
    if choice := _forced.get((kernel, operands)):
        return choice
    for name in (_assumed, "default") if _assumed else _names(device):
        for entry in (f"{name}, {_RELEASE}", name):
            kernels = _presets().get(entry, {}).get("kernels", {})
            if operands in (found := kernels.get(kernel, {})):
                return found[operands]
    raise KeyError(f"presets.json has no default for {kernel}, {operands}")
