"""The backend of the CUDA library: when it is chosen, and what it says when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nabla_fast._native import cuda_library
from nabla_fast.errors import BackendUnavailable
from nabla_fast.ops import (
    AdamState,
    cosine_schedule,
    dto_descent,
    dto_descent_latents,
    embedding_mix,
    use_backend,
)
from nabla_fast.ops.limits import cuda_backend


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, cuda_kernels: None) -> list[str]:
    """The functions that are called, in order."""
    calls: list[str] = []
    call = cuda_library.call

    def counted(function: str, *arguments: object) -> None:
        calls.append(function)
        call(function, *arguments)

    monkeypatch.setattr(cuda_library, "call", counted)
    return calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors are on the CPU")
def test_the_host_of_device_code_runs_where_it_is_asked_for(chosen: list[str]):
    z, table = torch.randn(2, 9), torch.randn(9, 4)
    embedding_mix(z, [table])
    assert not chosen
    with use_backend("cuda"):
        embedding_mix(z.requires_grad_(), [table])[0].sum().backward()
        state = AdamState.zeros(z)
        dto_descent(z.detach(), torch.randn(2, 9), state, cosine_schedule(2, 0.01))
        h = torch.randn(2, 4)
        grad, state = torch.randn(2, 9), AdamState.zeros(h)
        dto_descent_latents(h, table, grad, state, cosine_schedule(2, 0.01))
    assert chosen == ["embedding_mix", "embedding_mix_backward", "dto_descent", "dto_descent_latents"]


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(cuda_library.HOST_VARIABLE, raising=False)
    monkeypatch.setattr("nabla_fast._native.library.CUDA_LIBRARY", Path("/nowhere/library.so"))
    cuda_library._load.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match=r"library.so is not built: `make cuda` [^\n]+$"):
            use_backend("cuda").__enter__()
    finally:
        cuda_library._load.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors are on the CPU")
def test_tensors_elsewhere_are_refused_by_name():
    z = torch.zeros(2, 9)
    assert (
        cuda_backend.refusal(9, logits=z) == "logits is on the CPU (the CUDA kernels run on CUDA devices)"
    )
    assert cuda_backend.refusal(9, tables=[z]).startswith("tables[0] is on the CPU")
    assert cuda_backend.refusal(2**30 + 1) == (
        "the vocabulary has 1073741825 tokens (the CUDA kernels take 2^30)"
    )


def test_a_refused_call_says_why(cuda_kernels: None):
    z = torch.zeros(2, 9, device="cuda" if torch.cuda.is_available() else "cpu")
    args = cuda_library.MixArgs(rows=2, vocab=9)
    args.logits = cuda_library.matrix(z)
    with pytest.raises(RuntimeError, match="nabla_fast_cuda_embedding_mix: tau is not in"):
        cuda_library.call("embedding_mix", args, {"logits": z}, z.device)
