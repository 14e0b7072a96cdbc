"""Ops: the mathematics in plain PyTorch, and faster backends registered on it by name.

``@op`` turns a function into an :class:`Op`. Its body is the ``torch`` backend and the oracle that
every other backend is tested against. The op is also a ``torch.library`` custom op
(``torch.ops.nabla_fast.<name>``), so that ``torch.compile`` keeps it whole and autograd sees it.

    @op(arguments={"rows": floats("N", "M"), "head": floats("V", "M")})
    def token_stats(rows: Tensor, head: Tensor | None = None, *, tau: float = 1.0) -> TokenStats: ...

    @token_stats.check
    def check_token_stats(rows, head, *, tau): ...  # raises InputError for what the table cannot say

    @token_stats.fake
    def fake_token_stats(rows, head, *, tau): ...  # shapes and dtypes of the results

    @token_stats.backend("cpu", refuses=lambda rows, head, **_: None if rows.is_cpu else "rows is on a GPU")
    def token_stats_cpu(rows, head, *, tau): ...

``rules`` says what arguments must be, ``schema`` reads the signature, ``backends`` says which backends
there are and which are forced, ``dispatch`` holds the op and chooses a backend for each call.
"""

from nabla_fast.ops.registry.backends import (
    BACKENDS,
    PREFERENCE,
    allowed,
    backend_status,
    forced,
    set_backend,
    use_backend,
)
from nabla_fast.ops.registry.dispatch import Op, all_ops, op
from nabla_fast.ops.registry.rules import FLOATS, Table, floats, integers, tensors

__all__ = [
    "BACKENDS",
    "FLOATS",
    "PREFERENCE",
    "Op",
    "Table",
    "all_ops",
    "allowed",
    "backend_status",
    "floats",
    "forced",
    "integers",
    "op",
    "set_backend",
    "tensors",
    "use_backend",
]
