"""Drawing tokens: temperature, top-k, top-p in transformers' order, one CPU generator a sequence."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nabla_fast._native import loading as native_loading
from nabla_fast.config import SamplingConfig

# torch.Generator.get_state(): the seed, then the words that exponential_race.h describes.
_WORDS_OFFSET = 8
# From this top-k on, torch filters: a heap of so many is no longer cheap.
_MOST_NATIVE = 512


class Generator:
    """A CPU generator in the state that follows from ``seed`` alone.

    It gives the tokens that ``torch.multinomial`` gives with a ``torch.Generator`` of that seed. This
    draws an exponential for every token of the vocabulary; where the C++ extension is there, only
    those of the tokens that can be drawn are computed.
    """

    def __init__(self, seed: int):
        self._torch = torch.Generator().manual_seed(seed)
        self._words = self._torch.get_state() if _races() else None

    def draw(self, tokens: Tensor, probabilities: Tensor, vocabulary: int) -> int:
        """One token.

        Args:
            tokens: [n] int64, ascending.
            probabilities: of these tokens, [n] float32 or float64, contiguous.
            vocabulary: V.
        """
        if self._words is None:
            dense = probabilities.new_zeros(vocabulary).scatter_(0, tokens, probabilities)
            return int(torch.multinomial(dense, num_samples=1, generator=self._torch))
        return _race(self._words, tokens, probabilities, vocabulary)


def _race(state: Tensor, tokens: Tensor, probabilities: Tensor, vocabulary: int) -> int:
    return native_loading.extension().exponential_race(
        state.data_ptr() + _WORDS_OFFSET,
        vocabulary,
        tokens.data_ptr(),
        probabilities.data_ptr(),
        probabilities.dtype == torch.float64,
        len(tokens),
    )


@functools.cache
def _races() -> bool:
    """Whether the C++ draws are those of this release of torch, whose generator they look into."""
    if not native_loading.available():
        return False
    theirs = torch.Generator().manual_seed(0)
    ours = theirs.get_state()
    if len(ours) < _WORDS_OFFSET + 16 + 8 * 624:
        return False
    for dtype in (torch.float32, torch.float64):
        probabilities = torch.full((400,), 1 / 400, dtype=dtype, device="cpu")
        for _ in range(4):
            expected = int(torch.multinomial(probabilities, num_samples=1, generator=theirs))
            if _race(ours, torch.arange(400, device="cpu"), probabilities, 400) != expected:
                return False
    return True


class TokenRows:
    """Distributions of next tokens: rows of softmax(top_p(top_k(z / T))), or their argmax.

    Top-k keeps every token that ties with the k-th; top-p works on what top-k left and drops the
    least likely tokens whose cumulative mass is ≤ 1 − p, never the last one left; of equally likely
    ones, those of lower index first. A row's draws do not depend on the other rows.
    """

    def __init__(self, logits: Tensor, sampling: SamplingConfig, *, greedy: bool = False):
        """Filter rows.

        Args:
            logits: [N, V] float32 or float64, on the CPU.
            sampling: T ≤ 0 counts as 1.
            greedy: draw the argmax, and nothing from generators.
        """
        self.vocabulary = logits.shape[1]
        self._greedy = logits.argmax(dim=-1).tolist() if greedy else None
        if not greedy:
            self._kept = _filtered(logits, sampling)

    def draw(self, row: int, generator: Generator) -> int:
        """A token of one row."""
        if self._greedy is not None:
            return self._greedy[row]
        tokens, probabilities = self._kept[row]
        return generator.draw(tokens, probabilities, self.vocabulary)

    def probabilities(self, row: int) -> Tensor:
        """[V], exactly 0 for dropped tokens; of rows that are drawn from."""
        tokens, probabilities = self._kept[row]
        return probabilities.new_zeros(self.vocabulary).scatter_(0, tokens, probabilities)


def _filtered(logits: Tensor, sampling: SamplingConfig) -> list[tuple[Tensor, Tensor]]:
    """Tokens kept, ascending, and their probabilities, of each row."""
    if 0 < sampling.top_k < min(logits.shape[1], _MOST_NATIVE) and native_loading.available():
        return [_filtered_row(row, sampling) for row in logits]
    return _filtered_rows(logits, sampling)


def _filtered_row(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """One row by the C++ extension, but for one with many ties."""
    logits = logits.contiguous()
    capacity = sampling.top_k + 16
    tokens = torch.empty(2 * capacity, dtype=torch.int64, device="cpu")
    probabilities = torch.empty(capacity, dtype=logits.dtype, device="cpu")
    count = native_loading.extension().filter_tokens(
        logits.data_ptr(),
        logits.dtype == torch.float64,
        len(logits),
        sampling.temperature if sampling.temperature > 0 else 1.0,
        sampling.top_k,
        sampling.top_p,
        tokens.data_ptr(),
        probabilities.data_ptr(),
        capacity,
    )
    if count < 0:
        return _filtered_rows(logits[None], sampling)[0]
    return tokens[:count], probabilities[:count]


def _filtered_rows(logits: Tensor, sampling: SamplingConfig) -> list[tuple[Tensor, Tensor]]:
    scores = logits / sampling.temperature if sampling.temperature > 0 else logits
    k = sampling.top_k
    if not 0 < k < scores.shape[1]:
        tokens = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        return _without_tail(tokens, scores, sampling.top_p)
    top = scores.topk(k + 1)
    ties = top.values[:, k - 1] == top.values[:, k]
    # From here on the filters work on the few kept tokens instead of on the vocabulary.
    tokens = top.indices[:, :k].sort(dim=1).values
    kept = _without_tail(tokens, scores.gather(1, tokens), sampling.top_p)
    if bool(ties.any()):
        for row in ties.nonzero().flatten().tolist():
            tied = (scores[row] >= top.values[row, k]).nonzero().flatten()[None]
            (kept[row],) = _without_tail(tied, scores[row][tied], sampling.top_p)
    return kept


def _without_tail(tokens: Tensor, values: Tensor, top_p: float) -> list[tuple[Tensor, Tensor]]:
    """Top-p among tokens [N, n] of scores [N, n]."""
    if top_p < 1:
        ascending, order = values.sort(dim=1, stable=True)
        dropped = _softmax(ascending).cumsum(dim=1) <= 1 - top_p
        dropped[:, -1] = False
        values = values.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return list(zip(tokens, _softmax(values), strict=True))


def _softmax(values: Tensor) -> Tensor:
    """Softmax of rows of few tokens, for which torch's own would wake all threads."""
    shares = (values - values.amax(dim=1, keepdim=True)).exp_()
    return shares.div_(shares.sum(dim=1, keepdim=True))


def filtered_probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """softmax(top_p(top_k(z / T))) of one row of logits [V]: [V], exactly 0 for dropped tokens."""
    return TokenRows(logits[None], sampling).probabilities(0)


def seeded(seed: int) -> Generator:
    """A generator in the state that follows from ``seed`` alone."""
    return Generator(seed)
