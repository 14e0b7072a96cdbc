"""What callers describe rewards with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from nabla_fast.errors import InputError
from nabla_fast.models.alignment import VocabularyAlignment
from nabla_fast.models.labels import LabelChoice, Weights, is_number

REDUCTIONS = ("min", "mean", "last")


@runtime_checkable
class DifferentiableReward(Protocol):
    """A reward of your own: any object with a table and a score.

    The score may read anything that is linear in the one-hot tokens y: it gets Σ_v y[v] table[v] for each
    position. A row can be an embedding, or a few features of the token (is it a digit? how long is it?); a
    constraint seldom needs more, and V columns, the identity, only where it tells every token from
    every other. What the object must keep: the same score for the same embeddings, no change to
    them, and a gradient by autograd. A ``torch.nn.Module`` is in evaluation mode, and gets no weight
    gradients, while it decodes. It reads the LM's
    own tokens; one of another vocabulary has an attribute ``alignment``, and one of another chat template
    ``tokenizer``, as of :class:`ClassifierReward`.

    Attributes:
        table: [V, H] floating point, a row for each token of the LM; with an alignment [V_r, H].

    Example:
        >>> import torch
        >>> class Calm:  # fewer tokens of one kind
        ...     def __init__(self, loud):  # [V] bool
        ...         self.table = loud.float()[:, None]
        ...
        ...     def score(self, embeddings, response):
        ...         return -embeddings[response].sum()
        >>> isinstance(Calm(torch.tensor([False, True])), DifferentiableReward)
        True
    """

    table: Tensor

    def score(self, embeddings: Tensor, response: slice) -> Tensor:
        """The reward of one sequence.

        Args:
            embeddings: [S, H] in the table's dtype, on its device: a row of the table for each token
                of the prompt, the response and what the template puts after it; mixes of rows where the
                response is relaxed.
            response: where in them the response stands.
        Returns:
            One floating-point number, a tensor of shape [] or [1].
        """
        ...


@dataclass(frozen=True, eq=False)
class ClassifierReward:
    """A sequence classifier with several labels: which number of them is the reward.

    Args:
        model: an ``AutoModelForSequenceClassification``.
        label: the index or the name (``config.id2label``) of the label whose logit is the reward.
        weights: or a number for each label, or by name those that are not 0: the reward is the weighted
            sum of logits.
        probability: of probabilities, the softmax over all labels, in place of raw logits.
        tokenizer: the model's, in place of the decoder's ``reward_tokenizer``.
        alignment: of the LM's vocabulary with the model's, in place of the decoder's.
    Raises:
        InputError: an argument is wrong. What the model does not have is refused by the decoder.

    Example:
        >>> reward = ClassifierReward(model, weights={"helpful": 1.0, "verbose": -0.3})  # doctest: +SKIP
        >>> NablaDecoder(lm, reward, tokenizer)  # doctest: +SKIP
    """

    model: nn.Module
    label: int | str | None = None
    weights: Weights | None = None
    probability: bool = False
    tokenizer: Any = None
    alignment: VocabularyAlignment | None = None

    def __post_init__(self) -> None:
        expect_model("ClassifierReward", self.model)
        LabelChoice(self.label, self.weights, self.probability)


@dataclass(frozen=True, eq=False)
class ProcessReward:
    """A process reward model: a token classifier that scores a response where its steps end.

    Steps end at separators in the response, not in the prompt, and with its last token, unless that
    alone follows a separator (an EOS, say). Where they end is a matter of hard tokens, those with the
    largest logits; the scores there are differentiated. A step that two responses have in common keeps the
    score it was given first, unless the model looks ahead.

    Args:
        model: an ``AutoModelForTokenClassification``.
        separator: a token id of the model's vocabulary; or a text: every token whose own text ends with it,
            and the tokens that spell it.
        reduce: "min", "mean" or "last" of the scores of steps.
        label, weights, probability: as of :class:`ClassifierReward`. A score is the raw logit of a label
            unless ``probability`` is asked for.
        tokenizer, alignment: as of :class:`ClassifierReward`.
    Raises:
        InputError: an argument is wrong. What the model does not have is refused by the decoder.

    Example:
        >>> reward = ProcessReward(model, "\\n\\n", label=1, probability=True)  # doctest: +SKIP
    """

    model: nn.Module
    separator: int | str
    reduce: Literal["min", "mean", "last"] = "min"
    label: int | str | None = None
    weights: Weights | None = None
    probability: bool = False
    tokenizer: Any = None
    alignment: VocabularyAlignment | None = None

    def __post_init__(self) -> None:
        expect_model("ProcessReward", self.model)
        separator = self.separator
        if isinstance(separator, bool) or not isinstance(separator, (int, str)) or separator == "":
            raise InputError(f"separator must be a token id or a text that is not empty, got {separator!r}")
        if self.reduce not in REDUCTIONS:
            raise InputError(f"reduce must be 'min', 'mean' or 'last', got {self.reduce!r}")
        LabelChoice(self.label, self.weights, self.probability)


@dataclass(frozen=True, eq=False)
class FunctionReward:
    """A reward without a gradient: a Python function of prompt and response.

    It judges proposals, and :attr:`Result.reward` is its number; nothing is descended along it: the
    gradient is that of the likelihood and of whatever other rewards there are beside it. A decoder
    warns of that once. The function must return the same number for the same arguments. It may call the
    decoder's models, but not start a decode with them, as they are taken while it runs.

    Args:
        function: called with (prompt, response), returns a number.
        reads: "text": the prompt as the LM reads it, special tokens included, and the response as
            :attr:`Result.text` has it; "tokens": both as lists of the LM's token ids, an EOS included.
    Raises:
        InputError: an argument is wrong.

    Example:
        >>> reward = FunctionReward(lambda prompt, response: -len(response))
        >>> reward.function("2 + 2 = ", "4")
        -1
    """

    function: Callable[[Any, Any], float]
    reads: Literal["text", "tokens"] = "text"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"function must be callable, got {type(self.function).__name__}")
        if self.reads not in ("text", "tokens"):
            raise InputError(f"reads must be 'text' or 'tokens', got {self.reads!r}")

    @property
    def name(self) -> str:
        """As messages call it."""
        kind = type(self.function).__name__
        return f"FunctionReward({getattr(self.function, '__name__', kind)})"


@dataclass(frozen=True, eq=False)
class RewardEnsemble:
    """A weighted sum of rewards, each with a vocabulary, a tokenizer and an alignment of its own.

    The gradient is that of the sum: each member reads its own mixes of its own table, and
    G[v] = Σ_m w_m ⟨T_m[v], ∂r_m/∂mix_m⟩ over the members' tables T_m.

    Args:
        members: whatever a decoder takes as ``reward_model``, ensembles too; at least one. Those without
            a tokenizer or an alignment of their own have the decoder's.
        weights: a number a member, none of them 0; by default 1 each.
    Raises:
        InputError: an argument is wrong.

    Example:
        >>> reward = RewardEnsemble([rm, FunctionReward(check)], weights=[1.0, 0.5])  # doctest: +SKIP
    """

    members: Sequence[Any]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.members, (list, tuple)) or not self.members:
            raise InputError("members must be a list of at least one reward")
        weights = self.weights.tolist() if hasattr(self.weights, "tolist") else self.weights
        if weights is None:
            weights = [1.0] * len(self.members)
        if not isinstance(weights, (list, tuple)) or len(weights) != len(self.members):
            raise InputError(
                f"weights must be a list of {len(self.members)} numbers, one a member, got {weights!r}"
            )
        wrong = [weight for weight in weights if not is_number(weight) or weight == 0]
        if wrong:
            raise InputError(f"weights must be finite numbers other than 0, got {wrong[0]!r}")
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "weights", tuple(map(float, weights)))


GivenReward = (
    nn.Module | ClassifierReward | ProcessReward | FunctionReward | RewardEnsemble | DifferentiableReward
)


def expect_model(name: str, model: object) -> None:
    """Raise InputError unless something looks like a transformers model."""
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise InputError(f"{name} must be a transformers model, got {type(model).__name__}")
