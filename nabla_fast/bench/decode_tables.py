"""The decode benchmark's JSON as tables of text, for the terminal and for the documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Headers of token passes by what they served, and of accelerations switched off.
_PURPOSES = {
    "rollout": "rollouts",
    "gradient": "first gradients",
    "flip": "gradients after a move",
    "score": "rewards",
    "discarded": "dropped",
}
_ACCELERATIONS = {
    "gradient_store": "one gradient a trajectory",
    "small_gradients": "small gradients",
    "whole_descents": "whole descents",
    "frozen_prefix": "frozen prefix",
    "speculation": "proposals ahead",
    "batching": "prompts together",
    "drafting": "drafting",
}
_LOOPS = (
    "sequential ÷ Best-of-N",
    "batched ÷ Best-of-N",
    "one at a time ÷ Best-of-N",
)
Cases = dict[int, dict[str, Any]]
_HALF = ("bfloat16", "float16")
_STAGES = ("rollout", "selection", "gradient", "descent", "reward")


@dataclass(frozen=True)
class TextTable:
    """A titled table; the first column names its rows.

    Attributes:
        note: text below the table.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str

    def markdown(self) -> str:
        """As GitHub renders it."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{text}\n\n{self.note}"


def tables(results: dict[str, Any]) -> Iterator[TextTable]:
    """All tables that the results have figures for."""
    cases = dict(enumerate(results.get("cases", []), start=1))
    if cases:
        yield _cases(cases)
        yield _times(cases)
        yield _counts(cases)
        yield _passes(cases)
    if any(entry["ablation"] for entry in cases.values()):
        yield _ablation({n: entry for n, entry in cases.items() if entry["ablation"]})
    if any("stage_seconds" in entry for entry in cases.values()):
        yield _stages({n: entry for n, entry in cases.items() if "stage_seconds" in entry})
    if results.get("lengths"):
        yield _lengths(results["lengths"])
    if results.get("generate"):
        yield _generate(results["generate"])
    if results.get("steps"):
        yield _steps(results["steps"])
    if results.get("prefix"):
        yield _prefix(results["prefix"])
    if results.get("shapes"):
        yield _shapes(results["shapes"])
        yield _shape_stages(results["shapes"])


def _cases(cases: Cases) -> TextTable:
    rows = [
        [
            str(n),
            f"{entry['name']} ({entry['note']})" if entry["note"] else entry["name"],
            entry["config"],
            _tokens(entry),
        ]
        for n, entry in cases.items()
    ]
    note = "Tokens of the batched loop are compared with the sequential one's before anything is timed."
    if any(entry["dtype"] in _HALF for entry in cases.values()):
        note += (
            " Of half-precision models they are compared with the sequential loop's on a float32 copy of "
            "the weights; the sequential loop that is timed runs the models' modules, which round between "
            "layers."
        )
    header = ["#", "case", "settings", "tokens of the two loops"]
    return TextTable("Decoding: the cases", header, rows, note)


def _times(cases: Cases) -> TextTable:
    header = [
        "#",
        "sequential loop, s",
        "batched loop, s",
        "sequential ÷ batched",
        "Best-of-N, s",
        "batched ÷ Best-of-N",
        "release's form, s",
        "release's form ÷ batched",
    ]
    rows = []
    for n, entry in cases.items():
        seconds = entry.get("seconds", {})
        rows.append(
            [
                str(n),
                _number(seconds.get("sequential")),
                _number(seconds.get("fast")),
                _times_text(entry.get("speedup")),
                _number(seconds.get("best_of_n")),
                _times_text(entry.get("seconds_to_best_of_n")),
                _number(seconds.get("release_form")),
                _times_text(entry.get("speedup_over_release_form")),
            ]
        )
    note = (
        "Seconds for all prompts of a case, medians. Best-of-N has as many samples a prompt as the decode "
        "used rollouts, on the mean and rounded, and runs on the batched loop's own passes. The release's "
        "form is a reconstruction of the published release's inner loop, which passes over all rows of "
        "logits at every step; it is not its code."
    )
    return TextTable("Decoding: seconds", header, rows, note)


def _counts(cases: Cases) -> TextTable:
    header = [
        "#",
        "rollouts a prompt",
        "gradient passes (sequential)",
        "trajectories",
        "dropped a prompt",
        "draft tokens read (kept)",
        "not selected",
        "same token",
    ]
    rows = []
    for n, entry in cases.items():
        passes, positions = entry["gradient_passes"], entry["positions"]
        rows.append(
            [
                str(n),
                f"{entry['generations']:.1f}",
                f"{passes['fast']} ({passes['sequential']})",
                str(entry["trajectories"]),
                f"{entry['speculated']:.1f}",
                f"{entry['drafted']} ({entry['draft_hits']})",
                f"{positions['left_out']:.0%}",
                f"{positions['drawn_again']:.0%}",
            ]
        )
    note = (
        "Counts of the batched loop, in brackets of the sequential one. A gradient pass is one forward and "
        "one backward of both models. A trajectory is a rollout from the first to its replacement. Dropped "
        "are rollouts made ahead of need. Draft tokens are read ahead from the trajectory to be replaced; "
        "those kept were then drawn. The last columns are the share of positions that a threshold left "
        "out, and of the optimized ones that drew the token that was there already."
    )
    return TextTable("Decoding: counts", header, rows, note)


def _passes(cases: Cases) -> TextTable:
    rows = [[str(n), *_ratios(entry), *_shares(entry)] for n, entry in cases.items()]
    note = (
        "A token pass is a token that a model's forward reads or its backward goes through. The first "
        "three columns are multiples of Best-of-N's token passes: of the sequential loop, of the batched "
        "loop, and of the batched loop with one proposal at a time. The others are the shares of the "
        "latter two that went into rollouts, a trajectory's first gradient, gradients after a hard token "
        "moved, rewards, and rollouts made ahead of need and dropped."
    )
    header = ["#", *_LOOPS, *_PURPOSES.values()]
    return TextTable("Decoding: token passes of both models", header, rows, note)


def _ablation(cases: Cases) -> TextTable:
    rows = []
    for n, entry in cases.items():
        passes = entry["token_passes"]["fast"]
        rows.append([str(n), *(_ablated(row, passes) for row in entry["ablation"])])
    note = (
        "Without this acceleration and with all others: seconds, and in brackets token passes, as "
        "multiples of those with all of them. Prompts that are not together are decoded one at a time."
    )
    off = [row["off"] for row in next(iter(cases.values()))["ablation"]]
    header = ["#", *(_ACCELERATIONS[name] for name in off)]
    return TextTable("Decoding: what each acceleration is worth", header, rows, note)


def _ablated(row: dict[str, Any], passes: int) -> str:
    if not row["same_tokens"]:
        return "differs"
    slowdown = f"{row['slowdown']:.2f}" if "slowdown" in row else "-"
    return f"{slowdown} ({row['token_passes'] / passes:.2f})"


def _stages(cases: Cases) -> TextTable:
    rows = []
    for n, entry in cases.items():
        fast, sequential = (entry["stage_seconds"][loop] for loop in ("fast", "sequential"))
        pairs = [f"{_short(fast.get(s))} / {_short(sequential.get(s))}" for s in _STAGES]
        rows.append([str(n), *pairs])
    note = (
        "Seconds of the batched / of the sequential loop. The batched loop counts selection among the "
        "others, and rows of the one-hot gradient with the descent, where the sequential loop counts them "
        "with the gradient."
    )
    header = ["#", *(f"{stage}, s" for stage in _STAGES)]
    return TextTable("Decoding: seconds by stage", header, rows, note)


def _lengths(lengths: list[dict[str, Any]]) -> TextTable:
    header = ["tokens of an answer", "rollouts a prompt", *_LOOPS, *_PURPOSES.values()]
    rows = [[_length(row), f"{row['generations']:.1f}", *_ratios(row), *_shares(row)] for row in lengths]
    note = (
        "Random models of two layers and a vocabulary of 512 without EOS, two prompts of 32 tokens "
        "together, default settings; columns as in the table of token passes."
    )
    return TextTable("Decoding: token passes by length of the answer", header, rows, note)


def _length(row: dict[str, Any]) -> str:
    tokens = _tokens(row)
    return str(row["tokens"]) if tokens == "same" else f"{row['tokens']} (tokens {tokens})"


def _generate(entry: dict[str, Any]) -> TextTable:
    rows = [["transformers' generate, one prompt", _number(entry.get("generate_ms")), ""]]
    for count, ms in entry.get("rollout_ms", {}).items():
        name = f"rollouts of the batched loop, {count} prompt{'s' if count != '1' else ''}"
        rows.append([name, _number(ms), f"{entry['share'][count]:.0%}"])
    note = (
        f"The bundled LM, {entry['prompts']} prompts answered with {entry['tokens']} tokens each; the "
        f"tokens drawn are {'the same' if entry['same_tokens'] else 'NOT the same'}."
    )
    return TextTable("Rollouts: milliseconds a token", ["", "ms a token", "of generate's time"], rows, note)


_STEP_SIDES = {
    "generate": "transformers' generate, static cache",
    "one_by_one": "rollouts, the host looks at every token",
    "ahead": "rollouts, the host looks at every {turns}th token",
}


def _steps(entry: dict[str, Any]) -> TextTable:
    rows = [
        [
            title.format(**entry),
            _number(entry.get("step_ms", {}).get(name)),
            f"{entry['share'][name]:.0%}" if "share" in entry else "",
        ]
        for name, title in _STEP_SIDES.items()
    ]
    ties = sum(count or 0 for count in entry["ties"].values())
    aside = f", {ties} sequences from a tie in {entry['dtype']} on set aside" if ties else ""
    note = (
        f"{entry['sequences']} sequences of a random model of two layers, greedy, {entry['dtype']}; "
        f"the tokens are {'the same' if entry['same_tokens'] else 'NOT the same'}{aside}."
    )
    return TextTable("Rollouts: milliseconds a step", ["", "ms a step", "of generate's time"], rows, note)


_PREFIX_SIDES = {
    "paged": "prefix read from the pool",
    "recomputed": "prefix and suffix read by the model",
    "concatenated": "transformers' passes after a cache of the prefix",
}


def _prefix(entry: dict[str, Any]) -> TextTable:
    rows = [
        [
            title,
            _number(entry.get("ms", {}).get(name)),
            f"{entry['faster'][name]:.1f}×" if name in entry.get("faster", {}) else "",
        ]
        for name, title in _PREFIX_SIDES.items()
    ]
    same = "agree" if entry["same_gradients"] else "do NOT agree"
    note = (
        f"Forward and backward over {entry['suffix']} tokens after {entry['prefix']}, layers of width 512, "
        f"{entry['dtype']}; the gradients {same} to {max(entry['errors'].values()):.1e} of the largest."
    )
    header = ["", "ms", "times ours"]
    return TextTable("Gradient passes after a frozen prefix: milliseconds", header, rows, note)


_SHAPE_SIDES = {
    "sequential": "sequential loop",
    "batched": "batched loop",
    "best_of_n": "Best-of-N, as many rollouts",
    "generate": "transformers' generate of as many, unscored",
    "generate_one": "transformers' generate of one",
}


def _shapes(shapes: list[dict[str, Any]]) -> TextTable:
    header = ["", *(entry["dtype"] for entry in shapes)]
    rows = [
        [f"{title}, s", *(_number(entry["seconds"][name]) for entry in shapes)]
        for name, title in _SHAPE_SIDES.items()
    ]
    rows += [
        ["sequential ÷ batched", *(_times_text(entry["speedup"]) for entry in shapes)],
        ["batched ÷ Best-of-N", *(_times_text(entry["seconds_to_best_of_n"]) for entry in shapes)],
        ["rollouts of the decode", *(str(entry["generations"]["batched"]) for entry in shapes)],
        [
            "prompts with the same tokens in both loops",
            *(f"{e['same_tokens']} of {e['prompts']}" for e in shapes),
        ],
    ]
    entry = shapes[0]
    note = (
        f"An LM of {entry['parameters'] / 1e6:.0f} million parameters, random, and a reward model of its "
        f"shape; {entry['prompts']} prompts of 32 tokens answered with {entry['tokens']}, at most "
        f"{entry['rollouts'] // entry['prompts']} rollouts each; the fastest run of each, of the "
        "sequential loop the only one."
    )
    return TextTable("A released checkpoint's shape: seconds", header, rows, note)


def _shape_stages(shapes: list[dict[str, Any]]) -> TextTable:
    sides = {name: _SHAPE_SIDES[name] for name in shapes[0]["stage_seconds"]}
    rows = [
        [f"{title}, {entry['dtype']}", *(_short(entry["stage_seconds"][name].get(s)) for s in _STAGES)]
        for name, title in sides.items()
        for entry in shapes
    ]
    header = ["", *(f"{stage}, s" for stage in _STAGES)]
    return TextTable("A released checkpoint's shape: seconds by stage", header, rows, "Of the same runs.")


def _tokens(entry: dict[str, Any]) -> str:
    text = "same" if entry["same_tokens"] else "differ"
    dtype, alike = entry["dtype"], entry.get("same_prompts_by_modules")
    if dtype in _HALF:
        return f"{text}; {alike} of {entry['prompts']} prompts alike by {dtype} modules"
    return text if dtype == "float32" else f"{text} in {dtype}"


def _ratios(entry: dict[str, Any]) -> list[str]:
    ratios = entry["passes_to_best_of_n"]
    return [_times_text(ratios[name]) for name in ("sequential", "fast", "one_proposal")]


def _shares(entry: dict[str, Any]) -> list[str]:
    fast, one = (entry["passes_for"][name] for name in ("fast", "one_proposal"))
    return [f"{100 * fast.get(purpose, 0):.0f}/{one.get(purpose, 0):.0%}" for purpose in _PURPOSES]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _times_text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"
