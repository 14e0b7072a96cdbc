"""The mix with its vocabulary spread over processes, against the op that has it whole."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from nabla_fast.errors import InputError
from nabla_fast.ops.vocab_parallel import vocab_parallel_embedding_mix

from ..inputs import F32, Draw
from .process import BOUNDS, work


@pytest.mark.parametrize("size", sorted(BOUNDS))
def test_processes_agree_with_the_whole(size: int, tmp_path: Path, seed: int):
    # The server imports once what each of its children needs, and is no process with threads.
    multiprocessing.set_forkserver_preload(["nabla_fast.ops.vocab_parallel", "pytest"])
    arguments = size, str(tmp_path / "rendezvous"), seed
    mp.start_processes(work, arguments, nprocs=size, start_method="forkserver")


def test_a_table_of_another_slice_is_refused(draw: Draw):
    with pytest.raises(InputError, match="tables"):
        vocab_parallel_embedding_mix(draw.logits(2, 9), draw.tables(8, [(3, F32)]), first=0)
    with pytest.raises(InputError, match="first"):
        vocab_parallel_embedding_mix(draw.logits(2, 9), draw.tables(9, [(3, F32)]), first=-1)
