"""The configurations of Triton's kernels: every device has one for all of them."""

from __future__ import annotations

import json

import pytest
import torch

from nabla_fast.triton_kernels.common import presets

ENTRIES = json.loads(presets.PATH.read_text())
KERNELS = ENTRIES["default"]["kernels"]
KERNELS_OF_3_6 = ENTRIES["sm_90, Triton 3.6"]["kernels"]


def test_every_entry_says_whether_it_was_measured():
    for name, entry in ENTRIES.items():
        assert entry.keys() == {"measured", "kernels"}, name
        assert entry["measured"] is None or entry["measured"].keys() == {"date", "torch", "triton"}, name


def test_no_entry_has_what_the_default_lacks():
    for name, entry in ENTRIES.items():
        for kernel, kinds in entry["kernels"].items():
            for operands, config in kinds.items():
                default = KERNELS[kernel][operands]
                assert config.keys() == default.keys(), f"{name}: {kernel}, {operands}"


@pytest.mark.parametrize("release", ["Triton 3.6", "Triton 3.7", "Triton 3.9"])
@pytest.mark.parametrize(
    "architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "sm_75 of no entry"]
)
def test_an_architecture(architecture: str, release: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(presets, "_RELEASE", release)
    names = (f"{architecture}, {release}", architecture, "default")
    known = [ENTRIES[name]["kernels"] for name in names if name in ENTRIES]
    with presets.assumed(architecture):
        for kernel, kinds in KERNELS.items():
            for operands in kinds:
                expected = next(found for entry in known if (found := entry.get(kernel, {}).get(operands)))
                assert presets.config(kernel, operands, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("architecture", "early"),
    [("sm_80", False), ("sm_90", True), ("sm_120", True), ("gfx942", False), ("sm_75 of no entry", False)],
)
def test_which_launches_start_early(architecture: str, early: bool):
    assert not presets.starts_early(torch.device("cpu"))
    with presets.assumed(architecture):
        assert presets.starts_early(torch.device("cpu")) is early


def test_a_release_of_triton_comes_first(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cpu")
    with presets.assumed("sm_90"):
        others = presets.config("vocabulary_product", "half", device)
        monkeypatch.setattr(presets, "_RELEASE", "Triton 3.6")
        config = presets.config("dto_descent_latents", "half", device)
        assert config == KERNELS_OF_3_6["dto_descent_latents"]["half"]
        assert config != ENTRIES["sm_90"]["kernels"]["dto_descent_latents"]["half"]
        assert presets.config("vocabulary_product", "half", device) == others


def test_a_kernel_that_has_none():
    with pytest.raises(KeyError, match="no default for nothing, half"):
        presets.config("nothing", "half", torch.device("cpu"))


def test_forced_for_a_while():
    device = torch.device("cpu")
    before = presets.config("vocabulary_product", "half", device)
    with presets.forced("vocabulary_product", "half", {"ROWS": 1}):
        assert presets.config("vocabulary_product", "half", device) == {"ROWS": 1}
        assert presets.config("vocabulary_product", "split", device) != {"ROWS": 1}
    assert presets.config("vocabulary_product", "half", device) == before
