"""A reward of the caller's own, as the decode loop sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nabla_fast.errors import InputError, ModelError, one_line
from nabla_fast.models.alignment import VocabularyAlignment
from nabla_fast.models.given_rewards import DifferentiableReward
from nabla_fast.models.probes import probe_gradient
from nabla_fast.models.reward import wide_on_cpu
from nabla_fast.models.reward_sequence import RewardSequence, ScoreMemory

_PROBE = (2, 5, 1)  # tokens before, of and after the response


class CustomReward:
    """A :class:`~nabla_fast.DifferentiableReward`: a table, and a score of embeddings.

    Attributes as of :class:`~nabla_fast.models.RewardModel`.
    """

    differentiable = counts_tokens = True
    scores_last = False
    context = None
    way = "anew with each pass, by its own score(), one sequence at a time"

    def __init__(self, given: DifferentiableReward, alignment: VocabularyAlignment):
        """Probe the reward on a few tokens.

        Raises:
            InputError: its table is none, or not one of all tokens.
            ModelError: its score fails, or is not one finite number.
        """
        self.given, self.name = given, type(given).__name__
        self.model = given if isinstance(given, nn.Module) else None
        self.own_table = checked_table(given)
        self._token_map = alignment.token_map
        self.table = alignment.through(self.own_table)
        with self._probing(), torch.no_grad():
            if not self._probe(self.embed(self._probe_sequence.ids)).isfinite().all():
                raise ModelError(f"{self.name}.score gives a reward that is not finite")

    @property
    def device(self) -> torch.device:
        """Where embeddings are."""
        return self.own_table.device

    @property
    def vocabulary(self) -> int:
        """V_r, rows of its table."""
        return self.own_table.shape[0]

    def read(self, lm_ids: Sequence[int]) -> list[int]:
        """The reward's own ids of a sequence of the LM's tokens."""
        return list(lm_ids) if self._token_map is None else self._token_map[list(lm_ids)].tolist()

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings [S, H_r] of the reward's own token ids."""
        return self.own_table[torch.tensor(list(ids), dtype=torch.int64, device=self.device)]

    def reward(
        self,
        sequence: RewardSequence,
        embeddings: Tensor | None = None,
        memory: ScoreMemory | None = None,
    ) -> Tensor:
        """The reward [1] of one sequence: of its tokens, or of embeddings [S, H_r], differentiable."""
        if embeddings is not None:
            return self._score(embeddings, sequence.span)
        with torch.no_grad():
            return wide_on_cpu(self._score(self.embed(sequence.ids), sequence.span))

    def probe_gradient(self) -> None:
        """See to it that gradients reach the embeddings.

        Raises:
            ModelError: none does, or another one than small differences tell.
        """
        with self._probing():
            embeddings = self.embed(self._probe_sequence.ids)[None]
            try:
                probe_gradient(self.given, embeddings, lambda rows: torch.cat(list(map(self._probe, rows))))
            except ModelError as error:
                raise ModelError(f"{error}; a score without a gradient goes into FunctionReward") from error

    def _score(self, embeddings: Tensor, span: slice) -> Tensor:
        """[1], checked."""
        score = self.given.score(embeddings, span)
        if not isinstance(score, Tensor) or score.numel() != 1 or not score.is_floating_point():
            got = (
                f"{score.dtype} {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            )
            raise ModelError(
                f"{self.name}.score must return a tensor of one floating-point number, got {got}"
            )
        return score.reshape(1)

    def _probe(self, embeddings: Tensor) -> Tensor:
        return self._score(embeddings, self._probe_sequence.span)

    @property
    def _probe_sequence(self) -> RewardSequence:
        generator = torch.Generator().manual_seed(0)
        parts = [
            torch.randint(self.vocabulary, (n,), generator=generator, device="cpu").tolist() for n in _PROBE
        ]
        return RewardSequence(*parts)

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Whatever the score raises becomes a ModelError."""
        try:
            yield
        except (InputError, ModelError):
            raise
        except Exception as error:
            raise ModelError(
                f"{self.name}.score fails ({type(error).__name__}: {one_line(error)}): it gets embeddings "
                "[S, H] and the slice of the response, and returns one number"
            ) from error


def checked_table(given: DifferentiableReward) -> Tensor:
    """The table [V_r, H_r] of a reward, detached.

    Raises:
        InputError: it is none.
    """
    table = given.table
    if (
        not isinstance(table, Tensor)
        or table.dim() != 2
        or not table.is_floating_point()
        or not table.numel()
    ):
        got = f"{table.dtype} {list(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise InputError(
            f"{type(given).__name__}.table must be a floating-point tensor [V, H], a row a token, got {got}"
        )
    return table.detach()
