"""A process of those that share a vocabulary: its part of the mix against the op that has it whole.

Its import is all that a new process has to import.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nabla_fast.errors import RowError
from nabla_fast.ops import GumbelNoise, backend_status, embedding_mix, use_backend
from nabla_fast.ops.embedding_mix import embedding_mix_backward
from nabla_fast.ops.vocab_parallel import vocab_parallel_embedding_mix

from ..harness import Arguments, Results, check
from ..inputs import BF16, F16, F32, F64, Case, Draw
from ..interpreted import mended

ROWS, VOCABULARY = 5, 47
MANY = 2 * 4096 + 131
BOUNDS = {2: (0, 31, VOCABULARY), 3: (0, 1, 29, VOCABULARY)}

Tables = tuple[tuple[int, torch.dtype], ...]
Options = dict[str, Callable[[Draw], Any]]


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
            assert mixed_by_kernels.call_count >= 12
            refusals(columns, draw, F32)
    dist.destroy_process_group()


def triton_slices(size: int, rank: int, draw: Draw) -> None:
    """The Triton kernels, on slices of more than one of their own, by the rule for the ops of a whole."""
    bounds = ((0, 4102), (4102, MANY)) if size == 2 else ((0, 1), (1, 4102), (4102, MANY))
    first, end = bounds[rank]

    def part_of(whole: Arguments) -> Arguments:
        part = whole | {
            "logits": whole["logits"][:, first:end],
            "tables": [table[first:end] for table in whole["tables"]],
            "first": first,
        }
        if whole.get("direct") is not None:
            part["direct"] = whole["direct"][:, first:end]
        return part

    def forward(hard: bool, whole: Arguments) -> Results:
        mixes = vocab_parallel_embedding_mix(**part_of(whole) | {"hard": hard})
        for mix in mixes:
            of_first = mix.clone()
            dist.broadcast(of_first, 0)
            assert torch.equal(mix, of_first), "a mix differs between processes"
        return {f"result[{n}]": mix for n, mix in enumerate(mixes)}

    def backward(whole: Arguments) -> Results:
        given = {name: value for name, value in whole.items() if name != "cotangents"}
        _, grad = mixed(vocab_parallel_embedding_mix, part_of(given), whole["cotangents"], hard=True)
        grads = [grad.new_empty(ROWS, last - start) for start, last in bounds]
        for source, of_slice in enumerate(grads):
            dist.broadcast(grad if source == rank else of_slice, source)
        grads[rank] = grad
        return {"result": torch.cat(grads, dim=1)}

    def arguments(dtype: torch.dtype, tables: Tables, options: Options, draw: Draw) -> Arguments:
        logits = draw.logits(ROWS, MANY, dtype, masked=0.3)
        logits[1, :4102] = -torch.inf
        made = {name: make(draw) for name, make in options.items()}
        return {"logits": logits, "tables": draw.tables(MANY, tables), **made}

    def with_cotangents(dtype: torch.dtype, tables: Tables, options: Options, draw: Draw) -> Arguments:
        made = {"tau": 1.0, "noise": None, "direct": None} | arguments(dtype, tables, options, draw)
        return made | {"cotangents": [draw.normal(ROWS, width, dtype=kind) for width, kind in tables]}

    # Numbers are drawn alike in all processes, results are the same in all: so is what the rule says.
    for dtype, tables, options in (
        (F32, ((7, F32), (4, F32)), {"tau": lambda draw: 0.7}),
        (F32, ((7, F32),), {"noise": noise_of, "direct": direct_of}),
        (BF16, ((7, BF16), (4, F16)), {"direct": direct_of}),
        (BF16, ((7, BF16),), {"noise": noise_of, "tau": lambda draw: 1.7}),
    ):
        for hard in (True, False):
            made = {"hard": lambda draw, hard=hard: hard}
            case = Case(f"{dtype}", partial(arguments, dtype, tables, options | made))
            check(embedding_mix, case, draw, "cpu", partial(forward, hard))
        case = Case(f"{dtype}", partial(with_cotangents, dtype, tables, options))
        check(embedding_mix_backward, case, draw, "cpu", backward)


def noise_of(draw: Draw) -> GumbelNoise:
    return draw.noise(ROWS)


def direct_of(draw: Draw) -> torch.Tensor:
    return draw.normal(ROWS, MANY)


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
