"""One number of the logits of a classifier's labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from nabla_fast.errors import InputError, ModelError

Weights = Sequence[float] | Mapping[str, float]

_SHOWN = 8  # labels that a message lists


@dataclass(frozen=True)
class LabelChoice:
    """What a reward is of the labels' logits: one of them, or their weighted sum.

    Attributes:
        label: index or name of the one.
        weights: a number a label, in their order, or by their names (0 for those left out).
        probability: of probabilities, softmax over all labels, in place of logits.
        count: labels of the model, once :meth:`among` has seen it.
    Raises:
        InputError: both label and weights are given, or one is not what it should be.
    """

    label: int | str | None = None
    weights: Weights | None = None
    probability: bool = False
    count: int = 1
    _row: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.label is not None and self.weights is not None:
            raise InputError("label and weights exclude each other, got both")
        if self.label is not None and (
            isinstance(self.label, bool) or not isinstance(self.label, (int, str))
        ):
            raise InputError(f"label must be the index or the name of a label, got {self.label!r}")
        if not isinstance(self.probability, bool):
            raise InputError(f"probability must be True or False, got {self.probability!r}")
        weights = self.weights
        if weights is None:
            return
        if hasattr(weights, "tolist"):
            object.__setattr__(self, "weights", weights := weights.tolist())
        if isinstance(weights, str) or not isinstance(weights, (Sequence, Mapping)):
            raise InputError(f"weights must be a number a label, got {type(weights).__name__}")
        numbers = list(weights.values() if isinstance(weights, Mapping) else weights)
        if any(not is_number(w) for w in numbers) or not any(numbers):
            raise InputError(f"weights must be finite numbers that are not all 0, got {weights!r}")

    def among(self, model: nn.Module, wrapper: str = "ClassifierReward") -> LabelChoice:
        """The choice among a model's labels.

        Args:
            wrapper: what a message names to choose with.

        Raises:
            ModelError: the model has several labels and none is chosen, or it does not say how many.
            InputError: what is chosen is not there.
        """
        name = type(model).__name__
        count = getattr(model.config, "num_labels", None)
        if not isinstance(count, int) or count < 1:
            raise ModelError(f"{name} has {count} labels; a reward model has one (num_labels=1)")
        given = getattr(model.config, "id2label", None) or {}
        names = [str(given.get(n, n)) for n in range(count)]
        shown = ", ".join(names[:_SHOWN]) + (", …" if count > _SHOWN else "")
        if self.probability and count == 1:
            raise InputError(f"probability needs several labels, {name} has one")
        if self.label is None and self.weights is None:
            if count > 1:
                raise ModelError(
                    f"{name} has {count} labels ({shown}); a reward model has one (num_labels=1): "
                    f"choose with label=… or weights=… of {wrapper}"
                )
            return replace(self, label=0, count=1)
        if self.weights is None:
            return replace(self, label=_index(self.label, names, name, shown), count=count)
        if isinstance(self.weights, Mapping):
            row = [0.0] * count
            for label, weight in self.weights.items():
                row[_index(label, names, name, shown)] = float(weight)
        else:
            row = [float(weight) for weight in self.weights]
            if len(row) != count:
                raise InputError(
                    f"weights must have one number a label, {count} for {name} ({shown}), got {len(row)}"
                )
        return replace(self, count=count, _row=tuple(row))

    def of(self, logits: Tensor) -> Tensor:
        """[...] of logits [..., labels], differentiable; sums and probabilities in float32 or wider."""
        if self.probability:
            logits = torch.softmax(_wide(logits), dim=-1)
        if self._row is None:
            return logits[..., self.label]
        wide = _wide(logits)
        return (wide * torch.tensor(self._row, dtype=wide.dtype, device=wide.device)).sum(dim=-1)


def is_number(value: object) -> bool:
    """Whether something is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _index(label: int | str, names: list[str], model: str, shown: str) -> int:
    if isinstance(label, str) and names.count(label) == 1:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise InputError(f"label {label!r} is none of the {len(names)} of {model} ({shown})")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
