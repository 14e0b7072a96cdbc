"""The Triton dto_descent_latents: golden numbers, passes over the head, several splits, bad rows."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import RowError
from nabla_fast.ops import AdamState, Descent, backend_status, dto_descent_latents

from ..contract import BackendContract
from ..harness import interpreted, map_tensors, to_float64
from ..inputs import BF16, F32, Draw, far_columns
from ..shared.descents import DescentOverlaps, descent_arguments
from ..shared.golden_descents import check_golden_descent
from ..shared.triton_descents import (
    DEVICE,
    ON_DEVICE,
    TritonDescent,
    descend_,
    descended,
    follows,
    same,
)
from .cases import DTO_DESCENT_LATENTS

if why := backend_status()["triton"]:
    pytest.skip(why, allow_module_level=True)

from nabla_fast.triton_kernels.common import presets

pytestmark = ON_DEVICE


class TestContract(BackendContract):
    tested, backend = DTO_DESCENT_LATENTS, "triton"


class TestOverlaps(DescentOverlaps):
    op, backend, hidden = dto_descent_latents, "triton", 5


class TestDescent(TritonDescent):
    kind = "latents"


# Interpreted, a trajectory of rows that all move takes minutes.
@pytest.mark.skipif(DEVICE == "cuda", reason="the golden models are on the CPU")
@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow), 5])
def test_golden_descent(n: int, golden_models, golden_models_64, monkeypatch: pytest.MonkeyPatch):
    check_golden_descent(dto_descent_latents, "triton", n, golden_models, golden_models_64, monkeypatch)


def test_latents_of_several_slices_and_splits(draw: Draw):
    arguments = descent_arguments(draw, 2, 4500, hidden=7, iters=2, noise=True, tau=0.7)
    follows(descended(arguments), descended(to_float64(arguments), "torch"))


def configured(**changes: int) -> AbstractContextManager[Any]:
    """Inside, launches of the kernels have a changed configuration."""
    kernel, device = "dto_descent_latents", torch.device(DEVICE)
    changed = {
        (kernel, kind): presets.config(kernel, kind, device) | changes for kind in ("half", "float32")
    }
    return mock.patch.dict(presets._forced, changed)


@pytest.fixture
def splits() -> Iterator[None]:
    """In an interpreter a small vocabulary has several splits, of more than one tile."""
    with configured(**{"PROGRAMS": 5} if interpreted("triton") else {}):
        yield


SPLITS = pytest.mark.usefixtures("splits")


def scheduled(draw: Draw, rows: int, **options: Any) -> dict[str, Any]:
    """Latents whose vocabulary has several splits of several tiles."""
    vocabulary = 421 if interpreted("triton") else 20_011
    return descent_arguments(draw, rows, vocabulary, hidden=140, iters=2, lr=0.05, **options)


def in_passes(arguments: dict[str, Any], few: int) -> tuple[Descent, Tensor, AdamState]:
    """The descent where up to ``few`` rows read the head once a step."""
    with configured(FEW=few):
        return descended(arguments)


@SPLITS
@pytest.mark.parametrize("head", [F32, BF16], ids=["float32", "bf16"])
def test_one_pass_over_the_head_has_the_bits_of_two(head: torch.dtype, draw: Draw):
    arguments = scheduled(draw, 3, head=head, noise=True, tau=0.7)
    arguments["until"] = torch.tensor([2, 2, 1])
    arguments["grad"][1, 40] = torch.nan
    once, twice = in_passes(arguments, 3), in_passes(arguments, 0)
    assert (once[2].step > 0).all()
    assert once[1][1].isnan().all()
    same_or_nan(once, twice)


def same_or_nan(first: tuple, second: tuple) -> None:
    """Agreement to the bit where a spoiled row is NaN."""
    plain = [
        map_tensors(lambda t: t.nan_to_num(7.0) if t.is_floating_point() else t, x) for x in (first, second)
    ]
    assert same(*plain)
    assert all(
        torch.equal(a.isnan(), b.isnan())
        for a, b in zip((first[1], *first[2]), (second[1], *second[2]), strict=True)
    )


@SPLITS
@pytest.mark.parametrize("head", [F32, BF16], ids=["float32", "bf16"])
def test_a_latent_alone_has_the_bits_that_it_has_among_seventeen(head: torch.dtype, draw: Draw):
    arguments = scheduled(draw, 17, head=head)
    together = descended(arguments)
    for row in (0, 16):
        only = slice(row, row + 1)
        own = map_tensors(lambda t, only=only: t[only] if len(t) == 17 else t, arguments)
        alone = descended(own)
        assert same(alone, map_tensors(lambda t, only=only: t[only], together))


@SPLITS
def test_sums_of_a_few_rows_at_a_time_have_the_same_bits(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    kernels = importlib.import_module("nabla_fast.triton_kernels.dto_descent_latents")
    arguments = scheduled(draw, 17, group=True)
    together = descended(arguments)
    monkeypatch.setattr(kernels, "_PARTIAL_BYTES", 1)  # 16 rows and 1
    assert same(together, descended(arguments))


@SPLITS
def test_latents_without_probability_do_not_matter(draw: Draw):
    arguments = scheduled(draw, 2)
    # Logits of −inf by overflow, the head being finite.
    arguments["h"][:, 0], arguments["head"][7:-20:5, 0] = 1e10, -3e38
    gone = arguments["grad"].clone()
    gone[:, 7:-20:5] = torch.tensor([torch.nan, torch.inf])[:, None]
    ours = descended(arguments)
    assert ours[1].isfinite().all()
    assert (ours[2].step > 0).all()
    assert same(ours, descended(arguments | {"grad": gone}))
    assert same(ours, in_passes(arguments, 0))


@pytest.mark.parametrize("stride", [2**24 + 5, 2**26 + 5], ids=["several chunks", "one chunk"])
def test_chunks_of_a_head_more_than_2_31_elements_apart(stride: int, tmp_path: Path, draw: Draw):
    hidden = 200
    if DEVICE == "cuda":
        pytest.skip("files back no memory of a GPU")
    config = presets.config("dto_descent_latents", "float32", torch.device(DEVICE))
    assert (hidden // config["DEPTH"] - 1) * config["DEPTH"] * stride > 2**31
    assert (config["DEPTH"] * stride > 2**31) == (stride > 2**25)
    arguments = descent_arguments(draw, 2, 33, hidden=hidden, iters=2)
    far = far_columns(tmp_path / "head", arguments["head"], stride)
    expected = descended(arguments)
    # Not a clone, which would bring the columns together.
    assert same(expected, descend_(map_tensors(torch.clone, arguments) | {"head": far}))


def test_a_latent_whose_logits_are_bad(draw: Draw):
    arguments = descent_arguments(draw, 2, 130, hidden=5, iters=1)
    arguments["h"][1, 2] = torch.nan
    with pytest.raises(RowError, match="row 1 has a NaN logit"):
        descended(arguments)
