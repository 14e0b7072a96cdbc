"""How many tokens a model reads, and through which tables: seen in a pass, as configs may be wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nabla_fast.errors import ModelError

# Fields under which configs state a context, the first that holds a number > 0 counts.
_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "context_length",
)


def stated_context(config: Any) -> int | None:
    """Most tokens that a config says its model reads; None if it does not say."""
    for field in _FIELDS:
        value = getattr(config, field, None)
        if type(value) is int and value > 0:
            return value
    return None


class TableLookups(TorchDispatchMode):
    """Rows that embedding tables are asked for in the passes inside: ``with TableLookups() as lookups``."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Tensor, Tensor]] = []  # a table [R, H], and rows asked for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self._found.append((args[0], args[1].flatten()))
        return func(*args, **(kwargs or {}))

    def context(self, count: int) -> int | None:
        """Most tokens that tables of positions allow, from passes over ``count`` tokens.

        Such a table is asked for ``count`` rows one after another. They may begin behind row 0, where
        some models keep padding.
        """
        sizes = []
        for table, rows in self._found:
            if count > 1 and len(rows) == count and bool((rows.diff() == 1).all()):
                sizes.append(table.shape[0] - int(rows[0]))
        return min(sizes, default=None)

    def refuse_second_table(self, model: nn.Module, ids: Tensor) -> None:
        """Refuse a second way by which tokens [S] reach a model: another table that they are looked up in.

        Raises:
            ModelError: it names the table.
        """
        embeddings = model.get_input_embeddings()
        own = {tensor.data_ptr() for tensor in (*embeddings.parameters(), *embeddings.buffers())}
        names = {weight.data_ptr(): name for name, weight in model.named_parameters()}
        for table, rows in self._found:
            if table.data_ptr() not in own and torch.equal(rows.long().cpu(), ids.cpu()):
                raise ModelError(
                    f"{type(model).__name__} looks tokens up in a second table "
                    f"({names.get(table.data_ptr(), 'one of its own')}), "
                    "which the gradient of its input embeddings leaves out"
                )
