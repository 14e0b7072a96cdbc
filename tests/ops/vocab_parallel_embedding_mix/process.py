"""A process of those that share a vocabulary: its part of the mix against the op that has it whole.

Its import is all that a new process has to import.
"""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nabla_fast.errors import RowError
from nabla_fast.ops import backend_status, embedding_mix, use_backend
from nabla_fast.ops.vocab_parallel import vocab_parallel_embedding_mix

from ..harness import to_float64
from ..inputs import BF16, F16, F32, F64, Draw
from ..interpreted import mended

ROWS, VOCABULARY = 5, 47
BOUNDS = {2: (0, 31, VOCABULARY), 3: (0, 1, 29, VOCABULARY)}


def calls(draw: Draw) -> dict[str, dict]:
    """Arguments of embedding_mix by name, the same in every process."""
    tables = draw.tables(VOCABULARY, [(7, F64), (4, F64)])
    plain = {"logits": draw.logits(ROWS, VOCABULARY, F64, masked=0.3), "tables": tables}
    slice_masked = plain["logits"].clone()
    slice_masked[:, :29], slice_masked[:, 29:] = -torch.inf, draw.normal(ROWS, VOCABULARY - 29, dtype=F64)
    ties = torch.zeros(ROWS, VOCABULARY, dtype=F64)
    ties[1, 5:], ties[2, 30:] = 1.0, 2.0
    return {
        "plain": plain,
        "cold, direct": plain | {"tau": 0.1, "direct": draw.normal(ROWS, VOCABULARY, dtype=F64)},
        "hot, noise": plain | {"tau": 10.0, "noise": draw.noise(ROWS)},
        "a slice masked whole": plain | {"logits": slice_masked},
        "equal logits": plain | {"logits": ties},
        "no rows": plain | {"logits": plain["logits"][:0]},
        "half precision": {
            "logits": draw.logits(ROWS, VOCABULARY, F32),
            "tables": draw.tables(VOCABULARY, [(7, BF16), (4, F32)]),
        },
    }


def mixed(op, arguments: dict, cotangents: list[torch.Tensor], hard: bool):
    """Mixes and gradient."""
    logits = arguments["logits"].detach().clone().requires_grad_()
    mixes = op(**arguments | {"logits": logits}, hard=hard)
    grads = [c.to(m.dtype) for c, m in zip(cotangents, mixes, strict=True)]
    (grad,) = torch.autograd.grad(mixes, logits, grads)
    return [mix.detach() for mix in mixes], grad


def work(rank: int, size: int, rendezvous: str, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    columns = slice(*BOUNDS[size][rank : rank + 2])
    draw = Draw(seed)
    with use_backend("torch"):
        for name, whole in calls(draw).items():
            cotangents = [draw.normal(len(whole["logits"]), width, dtype=F64) for width in (7, 4)]
            part = whole | {
                "logits": whole["logits"][:, columns],
                "tables": [table[columns] for table in whole["tables"]],
                "first": columns.start,
            }
            if "direct" in whole:
                part["direct"] = whole["direct"][:, columns]
            for hard, backends in itertools.product((True, False), (["torch"], [])):
                mixes, grad = mixed(embedding_mix, whole, cotangents, hard)
                # Without a name, products of float32 with a slice's tables are those of the CPU kernels.
                with use_backend(*backends):
                    ours, our_grad = mixed(vocab_parallel_embedding_mix, part, cotangents, hard)
                exact = {"rtol": 1e-10, "atol": 1e-12}
                single = {"rtol": 1e-5, "atol": 1e-6}
                for mix, wanted, table in zip(ours, mixes, whole["tables"], strict=True):
                    assert mix.dtype == table.dtype
                    if hard:
                        assert torch.equal(mix, wanted), name
                    elif mix.dtype == BF16:
                        torch.testing.assert_close(mix, wanted, rtol=2**-7, atol=2**-9)
                    else:
                        torch.testing.assert_close(mix, wanted, **exact if mix.dtype == F64 else single)
                bounds = exact if our_grad.dtype == F64 else single
                torch.testing.assert_close(our_grad, grad[:, columns], **bounds)
        refusals(columns, draw)
    if backend_status()["triton"] is None:
        from nabla_fast.triton_kernels.vocab_parallel import VocabularySlice

        kernels = mock.patch.object(VocabularySlice, "mix", autospec=True, side_effect=VocabularySlice.mix)
        with mended(), use_backend("triton", "torch"), kernels as mixed_by_kernels:
            triton_slices(size, rank, draw)
            assert mixed_by_kernels.call_count == 8
            refusals(columns, draw, F32)
    dist.destroy_process_group()


def triton_slices(size: int, rank: int, draw: Draw) -> None:
    """The Triton kernels, on slices of more than one of their own, against float64."""
    vocabulary = 2 * 4096 + 131
    first = (0, 4102)[rank] if size == 2 else (0, 1, 4102)[rank]
    end = (4102, vocabulary)[rank] if size == 2 else (1, 4102, vocabulary)[rank]
    for dtype, tables, options in (
        (F32, ((7, F32), (4, F32)), {"tau": 0.7}),
        (F32, ((7, F32),), {"noise": draw.noise(ROWS), "direct": draw.normal(ROWS, vocabulary)}),
        (BF16, ((7, BF16), (4, F16)), {"direct": draw.normal(ROWS, vocabulary)}),
        (BF16, ((7, BF16),), {"noise": draw.noise(ROWS), "tau": 1.7}),
    ):
        logits = draw.logits(ROWS, vocabulary, dtype, masked=0.3)
        logits[1, :first] = -torch.inf
        dist.broadcast(logits, size - 1)
        whole = {"logits": logits, "tables": draw.tables(vocabulary, tables), **options}
        part = whole | {
            "logits": logits[:, first:end],
            "tables": [table[first:end] for table in whole["tables"]],
            "first": first,
        }
        if "direct" in whole:
            part["direct"] = whole["direct"][:, first:end]
        exact = to_float64(whole)
        cotangents = [draw.normal(ROWS, width, dtype=kind).double() for width, kind in tables]
        for hard in (True, False):
            ours, our_grad = mixed(vocab_parallel_embedding_mix, part, cotangents, hard)
            with use_backend("torch"):
                mixes, grad = mixed(embedding_mix, exact, cotangents, hard)
            for mix, wanted in zip(ours, mixes, strict=True):
                bounds = {F32: 1e-5, F16: 2**-9, BF16: 2**-7}[mix.dtype]
                error = (mix.double() - wanted).abs().amax(dim=1)
                assert (error <= bounds * wanted.abs().amax(dim=1)).all(), (dtype, hard)
            bounds = {F32: 1e-5, BF16: 2**-7}[our_grad.dtype]
            error = (our_grad.double() - grad[:, first:end]).abs().amax(dim=1)
            assert (error <= bounds * grad.abs().amax(dim=1)).all(), (dtype, hard)


def refusals(columns: slice, draw: Draw, dtype: torch.dtype = F64) -> None:
    """A bad row is an error in every process, whoever has the logit."""
    tables = draw.tables(VOCABULARY, [(3, dtype)])
    for value, reason in ((torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "no finite")):
        logits = draw.normal(ROWS, VOCABULARY, dtype=dtype)
        logits[3, slice(None) if value == -torch.inf else VOCABULARY - 1] = value
        part = {"tables": [tables[0][columns]], "first": columns.start}
        with pytest.raises(RowError, match=reason) as error:
            vocab_parallel_embedding_mix(logits[:, columns], **part)
        assert "row 3" in str(error.value)
