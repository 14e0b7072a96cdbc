"""Results of a decode: tokens, proposals and costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Revision:
    """One proposal to change a token.

    Attributes:
        position: index in the response's tokens.
        old_token: the token the current trajectory has there.
        new_token: the token proposed.
        reward_before, reward_after: rewards of the current and of the proposed trajectory; None where
            there is no rejection step.
        accepted: whether the proposed trajectory replaced the current one.
    """

    position: int
    old_token: int
    new_token: int
    reward_before: float | None
    reward_after: float | None
    accepted: bool

    @classmethod
    def judged(
        cls,
        position: int,
        old_token: int,
        new_token: int,
        reward_before: float | None,
        reward_after: float | None,
    ) -> Revision:
        """A proposal with its verdict: accepted if its reward is higher, or without rewards."""
        accepted = reward_before is None or reward_after is None or reward_after > reward_before
        return cls(position, old_token, new_token, reward_before, reward_after, accepted)

    @property
    def reason(self) -> str:
        """One line that says why the proposal was accepted or rejected."""
        if self.reward_before is None or self.reward_after is None:
            return "accepted: there is no rejection step"
        before, after = f"{self.reward_before:.6g}", f"{self.reward_after:.6g}"
        if before == after and self.reward_before != self.reward_after:
            before, after = repr(self.reward_before), repr(self.reward_after)
        if self.accepted:
            return f"accepted: its reward {after} is above {before}"
        return f"rejected: its reward {after} is not above {before}"


@dataclass
class Stats:
    """Cost of a decode.

    Attributes:
        generations: rollouts, as the sequential loop counts them.
        rejections: proposals that were scored and turned down.
        unchanged: optimized positions whose redraw gave the token already there, so that there was
            nothing to propose; as the sequential loop counts them.
        speculated: rollouts made ahead of need and dropped.
        rounds: rollouts that had to wait for one another.
        generated_tokens: tokens drawn in rollouts, those of dropped ones included.
        wasted_tokens: tokens drawn in dropped rollouts.
        drafted: tokens that rollouts read ahead from the trajectory they were to replace.
        draft_hits: those of them that were then drawn.
        llm_calls: the official release's count, of what the sequential loop does, in either loop: one a
            generated token, four a descent's forward+backward of both models (a selector's is not
            counted), two a comparison of rewards. What the batched loop does ahead of need is left out.
        gradient_passes: forward+backward passes, the selectors' included.
        token_passes: tokens of this prompt that forwards read plus tokens that backwards go through, of
            the LM ("lm") and of all rewards ("rm"). Tokens served from a cache are not counted, nor is
            padding.
        padding_passes: positions of padding that forwards and backwards go through beside them, where
            this prompt's sequences share a pass with longer ones, a model.
        passes_for: the batched loop's token passes of both models by what they served: "rollout",
            "score", "gradient" (of a trajectory), "flip" (of a moved token) and "discarded" (rollouts
            and scores of dropped proposals).
        seconds: wall-clock a stage ("rollout", "selection", "gradient", "descent", "reward") and "total",
            which has what belongs to no stage too. What prompts decoded together wait for together is
            shared evenly among them: the totals of all prompts sum to the wall-clock of the decode, the
            time between two results of a stream left out.
        peak_bytes: most memory in use above what was in use at the start: the CUDA allocator's, or on
            the CPU the process's resident memory; of all prompts decoded together. None where the
            platform does not tell.
    """

    generations: int = 0
    rejections: int = 0
    unchanged: int = 0
    speculated: int = 0
    rounds: int = 0
    generated_tokens: int = 0
    wasted_tokens: int = 0
    drafted: int = 0
    draft_hits: int = 0
    llm_calls: int = 0
    gradient_passes: int = 0
    token_passes: dict[str, int] = field(default_factory=lambda: {"lm": 0, "rm": 0})
    padding_passes: dict[str, int] = field(default_factory=lambda: {"lm": 0, "rm": 0})
    passes_for: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """One prompt's answer.

    Attributes:
        text: the decoded answer, special tokens left out; None without a tokenizer.
        token_ids: its tokens, without an EOS.
        reward: the reward model's score of the answer, the weighted sum of an ensemble's, or None
            without one.
        finish_reason: "eos", "stop" (a stop string), "length" or "error".
        revisions: every proposal, in order.
        stats: its cost.
        error: a :class:`DecodingFailed` that says why the prompt has no answer, with ``on_error="keep"``:
            its ``prompt`` is the prompt's index, its ``__cause__`` what struck. None with an answer.
        eos_token_id: the EOS that ended the answer; None where something else did.
    """

    text: str | None
    token_ids: list[int]
    reward: float | None
    finish_reason: Literal["eos", "stop", "length", "error"]
    revisions: list[Revision]
    stats: Stats
    error: Exception | None = None
    eos_token_id: int | None = None

    @classmethod
    def failed(cls, error: Exception, stats: Stats) -> Result:
        """The result of a prompt without an answer."""
        return cls(None, [], None, "error", [], stats, error)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON.

        A revision has its ``reason`` too; ``error`` is a line.
        """
        plain = dataclasses.asdict(dataclasses.replace(self, error=None))
        plain["revisions"] = [dataclasses.asdict(r) | {"reason": r.reason} for r in self.revisions]
        plain["error"] = None if self.error is None else str(self.error)
        return plain


@dataclass(frozen=True)
class Candidate:
    """One of several responses to a prompt.

    Attributes:
        text, token_ids, reward: as of :class:`Result`.
        finish_reason: "eos", "stop" (a stop string) or "length".
        eos_token_id: as of :class:`Result`.
    """

    text: str | None
    token_ids: list[int]
    reward: float | None
    finish_reason: Literal["eos", "stop", "length"]
    eos_token_id: int | None = None


@dataclass(frozen=True)
class SampleResult(Result):
    """The responses drawn to one prompt, and as the answer the best of them.

    The answer is the candidate of the highest reward, of equals the first; without a reward model the first
    of all. Nothing is revised: ``revisions`` is empty.

    Attributes:
        candidates: all responses in the order of drawing; none where the prompt failed.
    """

    candidates: list[Candidate] = field(default_factory=list)

    @classmethod
    def of(cls, candidates: list[Candidate], stats: Stats) -> SampleResult:
        """The result of at least one candidate: all with a reward, or none."""
        best = candidates[0]
        for other in candidates[1:]:
            if best.reward is not None and other.reward > best.reward:
                best = other
        answer = best.text, best.token_ids, best.reward, best.finish_reason
        return cls(*answer, [], stats, eos_token_id=best.eos_token_id, candidates=candidates)

    @property
    def rewards(self) -> list[float | None]:
        """The rewards of all candidates, in order; None without a reward model."""
        return [candidate.reward for candidate in self.candidates]
