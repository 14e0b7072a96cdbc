"""The Triton descents beyond the cases that every backend runs: golden numbers, flips, rows gone wrong."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nabla_fast.decode.reference.optimizer
from nabla_fast.errors import RowError
from nabla_fast.ops import (
    AdamState,
    Descent,
    backend_status,
    cosine_schedule,
    dto_descent,
    dto_descent_latents,
    synchronize,
    use_backend,
)
from nabla_fast.triton_kernels.common import presets

from .cases import BF16, F32, F64, Draw
from .cases import dto_descent as arguments_of
from .harness import DEVICES, map_tensors, to_device, to_float64

WHY = backend_status()["triton"]
DEVICE = DEVICES[-1]  # interpreted where there is no GPU
pytestmark = [
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
KINDS = pytest.mark.parametrize("kind", ["logits", "latents"])


def of_kind(kind: str, draw: Draw, rows: int, vocabulary: int, **options: Any) -> dict[str, Any]:
    if kind == "latents":
        options["hidden"] = 24
    return arguments_of(draw, rows, vocabulary, **options)


def descended(arguments: dict[str, Any], backend: str = "triton") -> tuple[Descent, Tensor, AdamState]:
    """What the op returns, with the parameter and the state it leaves, from a copy of the arguments."""
    return descend_(to_device(DEVICE if backend == "triton" else "cpu", arguments), backend)


def descend_(given: dict[str, Any], backend: str = "triton") -> tuple[Descent, Tensor, AdamState]:
    """The same in place; what it leaves, on the CPU."""
    with use_backend(backend):
        result = (dto_descent_latents if "h" in given else dto_descent)(**given)
        synchronize()
    return map_tensors(Tensor.cpu, (result, given["h" if "h" in given else "z"], given["state"]))


def follows(ours: tuple, exact: tuple, tolerance: float = 2e-5) -> None:
    """Same tokens, flips and steps; parameters as close as float32 lets them."""
    assert torch.equal(ours[0].token, exact[0].token)
    assert torch.equal(ours[0].flipped, exact[0].flipped)
    assert torch.equal(ours[2].step, exact[2].step)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=tolerance)


def same(first: tuple, second: tuple, rows: Any = slice(None)) -> bool:
    """Whether rows of two results agree to the bit."""
    pairs = zip((*first[0], first[1], *first[2]), (*second[0], second[1], *second[2]), strict=True)
    return all(torch.equal(a[rows], b[rows]) for a, b in pairs)


# -- golden numbers ----------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="the golden models are on the CPU")
@pytest.mark.parametrize(
    "n",
    # Interpreted, a trajectory of rows that all move takes minutes.
    [n if n in (0, 2, 4, 5) else pytest.param(n, marks=pytest.mark.slow) for n in range(7)],
)
def test_golden_descent(n: int, golden_models, golden_models_64, monkeypatch: pytest.MonkeyPatch):
    golden = pytest.importorskip("test_golden_descent")
    calls = []

    def by_triton(name: str) -> Any:
        def call(parameter: Tensor, *args: Any, **kwargs: Any) -> Descent:
            if parameter.dtype == torch.float64:
                return getattr(nabla_fast.ops, name)(parameter, *args, **kwargs)
            calls.append(name)
            with use_backend("triton"):
                return getattr(nabla_fast.ops, name)(parameter, *args, **kwargs)

        return call

    for name in ("dto_descent", "dto_descent_latents"):
        monkeypatch.setattr(nabla_fast.decode.reference.optimizer, name, by_triton(name))
    numbers = golden.load_file(golden.GOLDEN / "descent.safetensors")
    golden.test_descent(n, golden_models, golden_models_64, numbers)
    assert len(calls) == golden.CASES[n]["grad_steps"]


# -- flips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        torch.full((6,), 0.01, dtype=F64),
        cosine_schedule(6, 0.02, warmup_steps=2),
        cosine_schedule(6, 0.015, min_ratio=0.5),
    ],
    ids=["constant", "warm-up", "floor"],
)
def test_flips_at_the_first_step_at_the_last_and_never(schedule: Tensor):
    # Two equally likely tokens: the gap closes by 2·lr a step.
    closed = 2 * schedule.cumsum(0)
    gap = torch.stack([closed[0] / 2, (closed[-2] + closed[-1]) / 2, closed[-1] * 1.1])
    z = torch.stack([gap, torch.zeros(3)], dim=1).float()
    arguments = {
        "z": z,
        "grad": torch.tensor([[1.0, -1.0]]).expand(3, 2),
        "state": AdamState.zeros(z),
        "schedule": schedule,
    }
    ours = descended(arguments)
    assert ours[0].token.tolist() == [1, 1, 0]
    assert ours[0].flipped.tolist() == [True, True, False]
    assert ours[2].step.tolist() == [1, 6, 6]
    follows(ours, descended(to_float64(arguments), "torch"))


def test_the_first_of_equal_logits_is_the_token():
    # In one slice, and in two.
    z = torch.full((2, 4000), -1.0)
    z[0, [3, 5]], z[1, [20, 2047]] = 2.0, 2.0
    grad = torch.zeros_like(z)
    grad[0, 3], grad[1, 20] = 1.0, 1.0
    arguments = {"z": z, "grad": grad, "state": AdamState.zeros(z), "schedule": cosine_schedule(2, 0.01)}
    (token, flipped), _, state = descended(arguments)
    assert token.tolist() == [5, 2047]
    assert flipped.all()
    assert state.step.tolist() == [1, 1]
    # Without a gradient the first stays ahead of its equal.
    (token, flipped), after, state = descended(arguments | {"grad": torch.zeros_like(z)})
    assert token.tolist() == [3, 20]
    assert not flipped.any()
    assert torch.equal(after, z)


@KINDS
def test_a_group_stops_at_its_earliest_flip_with_the_bits_of_fewer_steps(kind: str, draw: Draw):
    arguments = of_kind(kind, draw, 4, 300, iters=6, gap=0.1, lr=0.05)
    group = torch.tensor([2**40, 3, 2**40, 3])
    (_, alone_flipped), _, alone = descended(arguments)
    together = descended(arguments | {"group": group})
    steps = torch.stack([alone.step[group == g].amin() for g in group])
    assert torch.equal(together[2].step, steps)
    assert torch.equal(together[0].flipped, alone_flipped & (alone.step == steps))
    assert same(together, descended(arguments | {"until": steps}))


# -- large, far apart, misaligned --------------------------------------------------------------------


def test_a_vocabulary_of_todays_size(draw: Draw):
    arguments = arguments_of(draw, 1, 151_936, iters=2, gap=0.5, masked=0.1)
    follows(descended(arguments), descended(to_float64(arguments), "torch"))


def test_latents_of_several_slices_and_splits(draw: Draw):
    arguments = arguments_of(draw, 2, 4500, hidden=7, iters=2, noise=True, tau=0.7)
    follows(descended(arguments), descended(to_float64(arguments), "torch"))


def scheduled(draw: Draw, rows: int, **options: Any) -> dict[str, Any]:
    """Latents whose vocabulary has several splits and, where there is no interpreter, many tiles."""
    vocabulary = 4500 if DEVICE == "cpu" else 20_011
    return arguments_of(draw, rows, vocabulary, hidden=140, iters=2, lr=0.05, **options)


def in_passes(arguments: dict[str, Any], few: int) -> tuple[Descent, Tensor, AdamState]:
    """The descent where up to ``few`` rows read the head once a step."""
    kind = "half" if arguments["head"].dtype == BF16 else "float32"
    config = presets.config("dto_descent_latents", kind, torch.device(DEVICE))
    with presets.forced("dto_descent_latents", kind, config | {"FEW": few}):
        return descended(arguments)


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


@pytest.mark.parametrize("head", [F32, BF16], ids=["float32", "bf16"])
def test_a_latent_alone_has_the_bits_that_it_has_among_seventeen(head: torch.dtype, draw: Draw):
    arguments = scheduled(draw, 17, head=head)
    together = descended(arguments)
    for row in (0, 16):
        only = slice(row, row + 1)
        own = map_tensors(lambda t, only=only: t[only] if len(t) == 17 else t, arguments)
        alone = descended(own)
        assert same(alone, map_tensors(lambda t, only=only: t[only], together))


def test_sums_of_a_few_rows_at_a_time_have_the_same_bits(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    kernels = importlib.import_module("nabla_fast.triton_kernels.dto_descent_latents")
    arguments = scheduled(draw, 17, group=True)
    together = descended(arguments)
    monkeypatch.setattr(kernels, "_PARTIAL_BYTES", 1)  # 16 rows and 1
    assert same(together, descended(arguments))


def test_latents_without_probability_do_not_matter(draw: Draw):
    arguments = scheduled(draw, 2)
    # Logits of −inf by overflow, the head being finite.
    arguments["h"][:, 0], arguments["head"][7:4000:5, 0] = 1e10, -3e38
    gone = arguments["grad"].clone()
    gone[:, 7:4000:5] = torch.tensor([torch.nan, torch.inf])[:, None]
    ours = descended(arguments)
    assert ours[1].isfinite().all()
    assert (ours[2].step > 0).all()
    assert same(ours, descended(arguments | {"grad": gone}))
    assert same(ours, in_passes(arguments, 0))


def test_rows_more_than_2_31_elements_apart(tmp_path: Path, draw: Draw):
    vocabulary, stride = 33, 2**31 + 5
    if DEVICE == "cuda":
        pytest.skip("files back no memory of a GPU")
    arguments = arguments_of(draw, 2, vocabulary, iters=2, noise=True)
    expected = descended(arguments)

    def spread(name: str, tensor: Tensor) -> Tensor:
        size = 4 * (stride + vocabulary)
        storage = torch.UntypedStorage.from_file(str(tmp_path / name), shared=True, nbytes=size)
        far = torch.empty(0).set_(storage, 0, (2, vocabulary), (stride, 1))
        return far.copy_(tensor)

    given = map_tensors(torch.clone, arguments)
    far = {name: spread(name, given[name]) for name in ("z", "grad")}
    assert same(expected, descend_(given | far))


@KINDS
def test_rows_with_gaps_and_one_gradient_for_all(kind: str, draw: Draw):
    arguments = of_kind(kind, draw, 2, 131, iters=3, noise=True)
    arguments["grad"] = arguments["grad"][:1].expand(2, -1)

    def shifted(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or tensor.stride(0) == 0:
            return tensor
        wide = torch.full((len(tensor), tensor.shape[1] + 8), torch.nan, device=tensor.device)
        wide[:, 3:-5] = tensor
        return wide[:, 3:-5]

    given = map_tensors(shifted, map_tensors(lambda tensor: tensor.to(DEVICE), arguments))
    assert same(descended(arguments), descend_(given))


def test_rows_a_few_at_a_time_have_the_same_bits(draw: Draw, monkeypatch: pytest.MonkeyPatch):
    kernels = importlib.import_module("nabla_fast.triton_kernels.dto_descent")
    arguments = arguments_of(draw, 3, 300, iters=3, noise=True, until=True, by_row=True)
    together = descended(arguments)
    monkeypatch.setattr(kernels, "rows_at_once", lambda z, arrays: 2)
    assert same(together, descended(arguments))


# -- rows gone wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"), [(torch.nan, "NaN"), (torch.inf, "[+]inf"), (-torch.inf, "no finite")]
)
def test_a_bad_row_is_named_and_stays(value: float, reason: str, draw: Draw):
    arguments = arguments_of(draw, 3, 300, iters=1)
    arguments["z"][1, slice(None) if value == -torch.inf else 299] = value
    given = to_device(DEVICE, arguments)
    with pytest.raises(RowError, match=f"row 1 has (a )?{reason}"):
        descend_(given)
    for before, after in (
        (arguments["z"], given["z"]),
        *zip(arguments["state"], given["state"], strict=True),
    ):
        assert torch.equal(before[1].nan_to_num(7.0), after[1].cpu().nan_to_num(7.0))
    # The others have taken their step.
    assert given["state"].step.tolist() == [1, 0, 1]


def test_a_latent_whose_logits_are_bad(draw: Draw):
    arguments = arguments_of(draw, 2, 130, hidden=5, iters=1)
    arguments["h"][1, 2] = torch.nan
    with pytest.raises(RowError, match="row 1 has a NaN logit"):
        descended(arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_spoils_its_row_alone(value: float, draw: Draw):
    arguments = arguments_of(draw, 3, 300, iters=3)
    arguments["z"][:, 40] = 20.0
    arguments["grad"][1, 77] = value
    ours, theirs = descended(arguments), descended(arguments, "torch")
    assert torch.equal(ours[0].token, theirs[0].token)
    assert torch.equal(ours[0].flipped, theirs[0].flipped)
    assert torch.equal(ours[2].step, theirs[2].step)
    assert torch.equal(ours[1].isnan(), theirs[1].isnan())
    assert ours[1][1].isnan().all()


def test_the_gradient_of_masked_tokens_does_not_matter(draw: Draw):
    arguments = arguments_of(draw, 2, 300, iters=3, masked=0.5)
    masked = arguments["z"] == -torch.inf
    ours = descended(arguments)
    assert same(ours, descended(arguments | {"grad": arguments["grad"].masked_fill(masked, torch.inf)}))
    assert torch.equal(ours[1] == -torch.inf, masked)
    assert (ours[2].exp_avg[masked] == 0).all()
