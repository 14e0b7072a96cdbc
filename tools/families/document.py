"""docs/models.md, from what the trials found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.families.building import TYPES

# Of a gradient, relative to its norm: what is left where a softmax, a norm or a scan is float32's.
GRADIENT_BOUND = 1e-4

_INTRODUCTION = """\
# Models

What `NablaDecoder` does with every type of causal language model and of sequence classifier that
transformers {transformers} has, written by `make families` (torch {torch}). Each type is a random model of
two layers (more where it has more kinds of them), whose weights are large enough to matter, decoded in
float64 beside a Qwen2 model in the other role; in float32 where the model itself has no float64.

- **decode**: tokens and revisions are those of the sequential loop that reads everything again for each
  token, without any cache, in the loops that are named; "wrong" would say that they differ.
- **accepted**: revisions of that decode that were accepted.
- **read**: how the batched loop reads the model, as `decoder.describe()` says for one's own.
- **gradient**: error of the batched loop's gradient, relative to full recomputation; 0 where every bit is
  the same.

A head is read as c·tanh(s·(W h + b)/c): a bias b, a scale s and a soft cap c are found by comparing with
the model's own logits. Models that cap attention scores are loaded with `attn_implementation="eager"`, as
transformers' other implementations leave that cap out.

Three ways of reading are tried, from the fastest on, and the first is used that gives, on a few tokens,
the states of one pass over everything: a prefix in a pool of key and value blocks, which any number of
sequences share; a cache of the model's own kind, whose keys and values are shared and whose recurrent and
convolution states are copied where sequences part; everything anew with each pass. A model is read by its
own way whatever the other model's is; a reward model that none of them is right for is scored by its own
forward, one sequence at a time.
"""
_TITLES = {"lm": "Language models", "reward_model": "Reward models"}


def wrong(trial: dict[str, Any]) -> bool:
    """Whether a type was decoded, and was not right in a loop."""
    decoded = [trial[loop] for loop in ("sequential", "batched") if loop in trial]
    return not all(decoded) or not trial.get("gradient_error", 0.0) <= GRADIENT_BOUND


def document(found: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        found: what :func:`tools.families.trial.trial` returns of each type, and the versions of
            "transformers" and "torch".
    """
    versions = {name: found[0][name] for name in ("transformers", "torch")}
    lines = [_INTRODUCTION.format(**versions)]
    for task, title in _TITLES.items():
        trials = sorted((t for t in found if t["task"] == task), key=lambda trial: trial["kind"])
        if trials:
            lines += _section(title, trials)
    return "\n".join(lines) + "\n"


def _section(title: str, found: Sequence[dict[str, Any]]) -> list[str]:
    decoded = [trial for trial in found if "sequential" in trial]
    refused = [trial for trial in found if "sequential" not in trial]
    right = {loop: sum(bool(trial.get(loop)) for trial in decoded) for loop in ("sequential", "batched")}
    return [
        f"## {title}\n",
        f"Of {len(found)} types {right['sequential']} are right in the sequential loop and "
        f"{right['batched']} in the batched one; {len(refused)} are refused before anything is decoded, "
        f"and {sum(map(wrong, found))} are wrong.\n",
        "| type | class | decode | accepted | read | gradient |",
        "|---|---|---|---|---|---|",
        *map(_row, decoded),
        "",
        "Refused, with the error's line, or with what keeps transformers from making such a model small:\n",
        "| type | why |",
        "|---|---|",
        *(f"| `{trial['kind']}` | {_cell(trial['why'])} |" for trial in refused),
        "",
    ]


def _row(trial: dict[str, Any]) -> str:
    loops = {name: trial[name] for name in ("sequential", "batched") if name in trial}
    decode = [" and ".join(name for name, same in loops.items() if same)]
    decode += [f"{name} wrong" for name, same in loops.items() if not same]
    read = trial.get("reads") or f"not batched: {trial.get('why')}"
    error = trial.get("gradient_error")
    gradient = "" if error is None else f"{error:.0e}" if error else "0"
    dtype = "" if trial["dtype"] == "float64" else f" ({trial['dtype']})"
    cells = (
        f"`{trial['kind']}`",
        TYPES[trial["task"]].get(trial["kind"], ""),
        ", ".join(filter(None, decode)) + dtype,
        str(trial["accepted"]),
        _cell(read),
        gradient,
    )
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
