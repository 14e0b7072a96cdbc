"""The demo's table, and one problem with its revisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nabla_fast.demo import countdown
from nabla_fast.demo.methods import SAMPLES, MethodReport
from nabla_fast.results import Result

TITLES = {
    "greedy": "greedy",
    "self_consistency": f"self-consistency({SAMPLES})",
    "best_of_n": f"Best-of-{SAMPLES}",
    "nabla": f"∇({SAMPLES})",
    "nabla_sequential": f"∇({SAMPLES}), sequential",
}


def table(reports: dict[str, MethodReport]) -> Table:
    """Accuracy and cost of each method that has done at least one problem."""
    result = Table(
        title="Countdown, held-out problems",
        caption="LM, RM: token passes; 95%: interval of the accuracy",
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("method", no_wrap=True)
    for name in ("accuracy", "95%", "rollouts", "LM", "RM", "seconds"):
        result.add_column(name, justify="right", no_wrap=True)
    for name, report in reports.items():
        entry = report.to_dict()
        if not entry["problems"]:
            continue
        low, high = entry["ci95"]
        result.add_row(
            TITLES[name],
            f"{entry['accuracy']:.1%}",
            f"{100 * low:.0f}–{100 * high:.0f}",
            f"{entry['rollouts']:,}",
            f"{entry['token_passes']['lm']:,}",
            f"{entry['token_passes']['rm']:,}",
            f"{entry['seconds']:.1f}",
        )
    return result


def beside_best_of_n(methods: Mapping[str, Mapping[str, Any]]) -> str | None:
    """∇'s cost as multiples of Best-of-N's, as measured; None where one of them has not done all.

    Args:
        methods: entries of the demo's JSON by name; seconds that are None were not measured.
    """
    nabla, best = (methods.get(name) for name in ("nabla", "best_of_n"))
    if not nabla or not best or not nabla["rollouts"] or nabla["problems"] != best["problems"]:
        return None
    passes = [sum(entry["token_passes"].values()) for entry in (nabla, best)]
    cost = [f"{passes[0] / passes[1]:.2f} times the token passes of {TITLES['best_of_n']}"]
    if nabla["seconds"] and best["seconds"]:
        cost.append(f"{nabla['seconds'] / best['seconds']:.2f} times its seconds")
    return f"{TITLES['nabla']} took {' and '.join(cost)}"


def most_telling(problems: Sequence[countdown.Problem], results: dict[int, Result]) -> int | None:
    """Index of a problem worth showing: solved by an accepted revision if there is one."""

    def rank(n: int) -> tuple[bool, int, int]:
        accepted = sum(revision.accepted for revision in results[n].revisions)
        return countdown.check(problems[n], results[n].text), accepted, -n

    candidates = [n for n in results if results[n].revisions]
    return max(candidates, key=rank, default=None)


def revised_answer(problem: countdown.Problem, result: Result, tokenizer: Any) -> Group:
    """The answer with its revised tokens coloured, and every proposal with its rewards."""
    revised = {revision.position for revision in result.revisions if revision.accepted}
    answer = Text()
    for position, token in enumerate(result.token_ids):
        style = "bold black on green" if position in revised else ""
        answer.append(tokenizer.decode([token]), style=style)
    correct = countdown.check(problem, result.text)
    verdict = Text(" solved" if correct else " not solved", style="green" if correct else "red")
    heading = Text.assemble(("\n" + countdown.render(problem), "bold"), "   ", answer, verdict)
    proposals = Table(box=None, padding=(0, 2))
    for name in ("position", "token", "proposed", "reward", "with proposal", ""):
        proposals.add_column(name, justify="right")
    for revision in result.revisions:
        proposals.add_row(
            str(revision.position),
            Text(repr(tokenizer.decode([revision.old_token]))),
            Text(
                repr(tokenizer.decode([revision.new_token])), style="green" if revision.accepted else "dim"
            ),
            _reward(revision.reward_before),
            _reward(revision.reward_after),
            Text(revision.reason.partition(":")[0], style="green" if revision.accepted else "dim"),
        )
    return Group(heading, proposals)


def _reward(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def agreement(fast: dict[int, Result], sequential: dict[int, Result]) -> str:
    """How many of the problems that both loops have done came out with the same tokens."""
    both = fast.keys() & sequential.keys()
    same = sum(fast[n].token_ids == sequential[n].token_ids for n in both)
    return f"\nboth ∇ loops returned the same tokens on {same} of {len(both)} problems"
