"""Paged attention against plain attention over a contiguous sequence, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from nabla_fast.errors import InputError
from nabla_fast.ops import backend_status, prefix_attention, use_backend

from ..contract import BackendContract, LibraryContract
from ..harness import to_float64
from ..inputs import F64, Case, Draw
from .cases import PREFIX_ATTENTION, PREFIX_ATTENTION_BACKWARD, attention_arguments


class TestContract(BackendContract):
    tested, backend = PREFIX_ATTENTION, "torch"


class TestBackwardContract(BackendContract):
    tested, backend = PREFIX_ATTENTION_BACKWARD, "torch"


class TestLibrary(LibraryContract):
    tested = PREFIX_ATTENTION


class TestBackwardLibrary(LibraryContract):
    tested = PREFIX_ATTENTION_BACKWARD


def contiguous(a: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch's attention, and the logsumexp by exponentials, a sequence at a time."""
    outputs, logsumexps = [], []
    groups = a["q"].shape[1] // a["k"].shape[1]
    for b, length in enumerate(a["prefix_lengths"].tolist()):
        prefix = [
            a[pool][a["block_tables"][b]].flatten(0, 1)[:length] for pool in ("key_pool", "value_pool")
        ]
        keys, values = (
            torch.cat([part.transpose(0, 1), own[b]], dim=1).repeat_interleave(groups, dim=0)
            for part, own in zip(prefix, (a["k"], a["v"]), strict=True)
        )
        query = length + torch.arange(a["q"].shape[2])[:, None]
        distance = query - torch.arange(keys.shape[1])
        seen = (distance >= 0) & (distance < (a["window"] or keys.shape[1]))
        scores = torch.einsum("hsd,hpd->hsp", a["q"][b], keys) * a["scale"]
        if a["softcap"] is not None:
            scores = a["softcap"] * torch.tanh(scores / a["softcap"])
        weights = torch.where(seen, scores.exp(), 0.0)
        total = weights.sum(dim=-1)
        if a["sinks"] is not None:
            total = total + a["sinks"].exp()[:, None]
        logsumexps.append(total.log())
        if a["softcap"] is None and a["sinks"] is None:
            outputs.append(F.scaled_dot_product_attention(a["q"][b], keys, values, seen, scale=a["scale"]))
        else:
            outputs.append(torch.einsum("hsp,hpd->hsd", weights, values) / total[..., None])
    return torch.stack(outputs), torch.stack(logsumexps)


@pytest.mark.parametrize("case", PREFIX_ATTENTION.cases, ids=lambda case: case.name)
def test_it_is_attention_over_the_whole_sequence(case: Case, draw: Draw):
    arguments = to_float64(case.make(draw))
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
    expected, logsumexp = contiguous(arguments)
    found, found_logsumexp = prefix_attention(**arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_logsumexp, logsumexp.detach(), rtol=1e-12, atol=1e-12)
    cotangent = draw.normal(*found.shape, dtype=F64)
    ours = torch.autograd.grad(found, leaves, cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.0, "sinks": True}], ids=str)
def test_gradcheck(options: dict, draw: Draw):
    a = attention_arguments(draw, prefixes=(0, 5), suffix=3, dtype=F64, **options)
    leaves = [a.pop(name).requires_grad_() for name in ("q", "k", "v")]
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, **a).output, leaves)


def test_what_lies_behind_a_prefix_in_its_blocks_does_not_matter(draw: Draw):
    a = attention_arguments(draw, prefixes=(5, 2), suffix=3)
    before = prefix_attention(**a)
    assert before.logsumexp.isfinite().all()
    for pool in ("key_pool", "value_pool"):
        for b, length in enumerate((5, 2)):
            slots = a[pool].flatten(0, 1)
            for position in range(length, 4 * a["block_tables"].shape[1]):
                slots[a["block_tables"][b, position // 4] * 4 + position % 4] = 1e4
    assert all(map(torch.equal, prefix_attention(**a), before))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"q": torch.zeros(2, 3, 3, 8)}, "query heads must be a multiple of key-value heads, got 3 and 2"),
        (
            {"k": torch.zeros(2, 2, 4, 8)},
            r"k must be floating-point \[2, 2, 3, 8\], got float32 \[2, 2, 4, 8\]",
        ),
        ({"q": torch.zeros(2, 4, 3)}, r"q must be floating-point \[B, Hq, S, D\]"),
        ({"key_pool": torch.zeros(4, 4, 2, 7)}, r"key_pool must be floating-point \[4, 4, 2, 8\]"),
        ({"block_tables": torch.zeros(2, 2)}, "block_tables must be int64"),
        ({"prefix_lengths": torch.zeros(3, dtype=torch.int64)}, "prefix_lengths must be int64"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"softcap": 0.0}, "softcap must be positive and finite, got 0"),
        ({"softcap": math.inf}, "softcap must be positive and finite, got inf"),
        ({"sinks": torch.zeros(3)}, r"sinks must be floating-point \[4\], got float32 \[3\]"),
    ],
)
def test_bad_arguments_get_one_line(change: dict, line: str, draw: Draw):
    arguments = attention_arguments(draw, prefixes=(5, 2), suffix=3) | change
    with pytest.raises(InputError, match=line) as caught:
        prefix_attention(**arguments)
    assert "\n" not in str(caught.value)


def test_the_pool_is_constant_and_the_rest_differentiated_once(draw: Draw):
    a = attention_arguments(draw, prefixes=(5, 2), suffix=3)
    for name in ("q", "k", "v", "key_pool", "value_pool"):
        a[name].requires_grad_()
    (grad,) = torch.autograd.grad(prefix_attention(**a).output.square().sum(), a["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
    prefix_attention(**a).output.sum().backward()
    assert a["k"].grad is not None
    assert a["key_pool"].grad is None
    assert a["value_pool"].grad is None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_logsumexp_has_no_gradient(compiled: bool, draw: Draw):
    a = attention_arguments(draw, prefixes=(5, 2), suffix=3)
    a["q"].requires_grad_()
    call = prefix_attention
    if compiled:
        torch.compiler.reset()
        call = torch.compile(lambda **kwargs: prefix_attention(**kwargs), backend="aot_eager")
    output, logsumexp = call(**a)
    assert output.requires_grad
    assert not logsumexp.requires_grad
    (grad,) = torch.autograd.grad(output.sum() + logsumexp.sum(), a["q"])
    (alone,) = torch.autograd.grad(prefix_attention(**a).output.sum(), a["q"])
    assert torch.equal(grad, alone)


BACKENDS = ["torch"] + [name for name in ("cpu", "triton") if backend_status()[name] is None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_behind_a_prefix_may_be_nan(backend: str, draw: Draw):
    """The rest of its last block, and the block that fills up its table: of sequences whose numbers are."""
    given = attention_arguments(draw, prefixes=(3, 9), suffix=2)
    with use_backend(backend):
        expected = prefix_attention(**given).output
        for name in ("key_pool", "value_pool"):
            given[name][given["block_tables"][0, 0], 3] = math.nan
            given[name][given["block_tables"][0, 1]] = math.nan
        assert torch.equal(prefix_attention(**given).output, expected)
