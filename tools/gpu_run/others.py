"""``python -m tools.gpu_run.others``: kernels of Liger and of cut-cross-entropy beside ops that do as much.

None computes what the other does; each pair reads the same large matrices and multiplies as much:

- statistics of logits, and Liger's cross entropy, which writes the gradient over the logits as well;
- statistics from hidden states, and the forward of cut-cross-entropy;
- the straight-through mix of hidden states with its backward, and forward and backward of
  cut-cross-entropy and of Liger's fused cross entropy. The mix takes one product more.

Each row is printed as a line of JSON when it is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import torch

import nabla_fast.ops as ops
from nabla_fast.bench.measure import interleaved

_N, _V, _H = 512, 151_936, 3584

Pair = tuple[str, str, Callable[[], object], Callable[[], object]]


def pairs(device: torch.device) -> Iterator[Pair]:
    """(ours, theirs, and what runs them); what is not installed is not there."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    target = torch.randint(_V, (_N,), device=device)
    hidden, head = normal(_N, _H), normal(_V, _H) * _H**-0.5
    table, cotangent = normal(_V, _H) * _H**-0.5, normal(_N, _H)

    def mix() -> object:
        leaf = hidden.detach().requires_grad_()
        return torch.autograd.grad(ops.linear_embedding_mix(leaf, head, [table]), leaf, [cotangent])

    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        print(f"Liger: {error}", file=sys.stderr)
    else:
        logits = normal(_N, _V)

        def cross_entropy() -> object:
            leaf = logits.detach().requires_grad_()
            return LigerCrossEntropyFunction.apply(leaf, target)

        def fused() -> object:
            leaf = hidden.detach().requires_grad_()
            loss = LigerFusedLinearCrossEntropyFunction.apply(leaf, head, target)
            loss = loss[0] if isinstance(loss, tuple) else loss
            return torch.autograd.grad(loss, leaf)

        yield "token_stats", "Liger cross entropy", lambda: ops.token_stats(logits), cross_entropy
        yield "linear_embedding_mix forward+backward", "Liger fused linear cross entropy", mix, fused
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        print(f"cut-cross-entropy: {error}", file=sys.stderr)
    else:

        def cut() -> object:
            with torch.no_grad():
                return linear_cross_entropy(hidden, head, target, reduction="none")

        def cut_backward() -> object:
            leaf = hidden.detach().requires_grad_()
            return torch.autograd.grad(linear_cross_entropy(leaf, head, target), leaf)

        name = "cut-cross-entropy"
        yield "token_stats of hidden", f"{name} forward", lambda: ops.token_stats(hidden, head), cut
        yield "linear_embedding_mix forward+backward", f"{name} forward+backward", mix, cut_backward


def main() -> int:
    device = torch.device("cuda")
    for ours, theirs, our_call, their_call in pairs(device):
        row = {"op": ours, "other": theirs, "shape": f"N={_N} V={_V} H={_H}", "dtype": "bfloat16"}
        try:
            with ops.use_backend("triton"):
                times = interleaved({"ours": our_call, "other": their_call}, device, seconds=0.5)
            row |= {f"{name}_ms": timing.median_ms for name, timing in times.items()}
        except Exception as error:  # of theirs with this torch or Triton, say: the others go on
            row["error"] = " ".join(str(error).split())[:300]
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
