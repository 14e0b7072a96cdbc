"""Train the bundled Countdown models: ``python -m benchmarks.training``.

Writes a tokenizer, a language model, a reward model, ``training.json`` with every measured figure,
and the model card made from it. The stages, each with a fixed number of steps and its own seed:

1. the policy: a language model trained on the LM split, stopped early;
2. the policy's samples on problems of the RM split;
3. the reward model: the policy's body with a scalar head, ranking samples and corruptions;
4. the figures, on the held-out split, of the models as saved in 16 bits.

The thread count and the machine may change the last digits; nothing else is random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from benchmarks.training import lm as lm_training
from benchmarks.training import rm as rm_training
from benchmarks.training.data import (
    END_ID,
    PAD_ID,
    VOCAB_SIZE,
    Pool,
    problem_count,
    solution_book,
    with_held_out,
)
from benchmarks.training.evaluate import evaluate_corruptions, evaluate_lm, evaluate_rm
from benchmarks.training.model_card import model_card
from benchmarks.training.sample import decode
from benchmarks.training.tokenizer import build_tokenizer
from nabla_fast.demo.countdown import FOUR_NUMBER_SHARE, LARGEST_NUMBER, MAX_VALUE, held_out, sample

ASSETS = Path(__file__).resolve().parents[2] / "nabla_fast" / "assets"
QUICK_OUT = Path("build") / "quick-models"  # useless models must not replace the bundled ones
SAVED_DTYPE = torch.float16  # three bits more of mantissa than bfloat16, and range to spare

Report = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of each stage; learning rates are peaks of a warmed-up cosine."""

    lm_steps: int = 3500
    lm_lr: float = 3e-3
    rm_problems: int = 12_000
    rm_samples: int = 8
    rm_steps: int = 2000
    rm_lr: float = 5e-4
    evaluation_problems: int = 2000

    @classmethod
    def quick(cls) -> Plan:
        """A smoke test of the whole pipeline; the models are useless."""
        return cls(
            lm_steps=20,
            rm_problems=32,
            rm_steps=10,
            evaluation_problems=32,
        )


class Log:
    """Progress bars on standard error; in a file, a line every hundred steps."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, steps: int | None = None) -> Iterator[Report]:
        started = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal
        with Progress(*columns, console=self.console, disable=not live, transient=True) as bars:
            bar = bars.add_task(name, total=steps, loss="")
            smoothed = None

            def report(step: int, loss: float) -> None:
                nonlocal smoothed
                smoothed = loss if smoothed is None else 0.98 * smoothed + 0.02 * loss
                bars.update(bar, completed=step + 1, loss=f"loss {smoothed:.3f}")
                if not live and (step + 1) % 100 == 0:
                    elapsed = time.perf_counter() - started
                    self.console.print(f"{name} {step + 1} loss {smoothed:.4f} {elapsed:.0f} s")

            yield report
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.console.print(f"{name}: {self.seconds[name]} s")


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save in 16 bits, as any loader expects it: default attention, generation defaults."""
    model.to(SAVED_DTYPE)
    model.config._attn_implementation = "sdpa"
    if isinstance(model, Qwen2ForCausalLM):
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=END_ID, pad_token_id=PAD_ID
        )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def load(cls: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A saved model in float32, in which it is measured."""
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def run(out: Path, plan: Plan, seed: int, log: Log) -> dict:
    """All stages. Writes models and tokenizer under ``out``; returns what training.json holds."""
    build_tokenizer().save_pretrained(out / "tokenizer")
    with log.stage("problems"):
        book = solution_book()
        lm_pool, rm_pool = Pool.of(book, "lm"), Pool.of(book, "rm")

    torch.manual_seed(seed)
    policy = Qwen2ForCausalLM(lm_training.config())
    with log.stage("policy", plan.lm_steps) as report:
        lm_training.train(
            policy, lm_pool, steps=plan.lm_steps, peak_lr=plan.lm_lr, seed=seed, report=report
        )
    save(policy, out / "lm")
    policy = load(Qwen2ForCausalLM, out / "lm")

    with log.stage("samples"):
        problems = sample("rm", plan.rm_problems, seed=seed)
        samples = decode(policy, problems, plan.rm_samples, seed=seed + 1)
        groups = rm_training.build_groups(problems, samples, book, seed=seed)

    torch.manual_seed(seed)
    reward_model = rm_training.from_language_model(policy)
    with log.stage("reward model", plan.rm_steps) as report:
        rm_training.train(
            reward_model,
            groups,
            steps=plan.rm_steps,
            peak_lr=plan.rm_lr,
            seed=seed + 2,
            report=report,
        )
    save(reward_model, out / "rm")
    reward_model = load(Qwen2ForSequenceClassification, out / "rm")

    with log.stage("evaluation"):
        problems = held_out(plan.evaluation_problems)
        measured = evaluate_lm(policy, problems, seed=seed + 3)
        reward_figures = evaluate_rm(reward_model, problems, measured["samples"], measured["verdicts"])
        spoiled = problems[:500]
        spoiled_groups = rm_training.build_groups(
            spoiled, [[]] * len(spoiled), with_held_out(book, spoiled), seed=seed
        )
        reward_figures["ranks_over_corruption"] = evaluate_corruptions(
            reward_model, spoiled_groups, seed=seed + 4
        )

    return {
        "seed": seed,
        "plan": dataclasses.asdict(plan),
        "parameters": {"lm": policy.num_parameters(), "rm": reward_model.num_parameters()},
        "problems": {
            "lm_split": len(lm_pool),
            "rm_split": len(rm_pool),
            "held_out_split": problem_count() - len(lm_pool) - len(rm_pool),
            "evaluated_held_out": len(problems),
        },
        "task": {
            "largest": LARGEST_NUMBER,
            "max_value": MAX_VALUE,
            "four_percent": 100 * FOUR_NUMBER_SHARE,
            "vocabulary": VOCAB_SIZE,
        },
        "recipe": {
            "lm_batch": lm_training.BATCH,
            "smoothing": lm_training.LABEL_SMOOTHING,
            "rm_groups": rm_training.GROUPS,
            "positives": rm_training.POSITIVES,
            "negatives": rm_training.NEGATIVES,
            "sampled_negatives": rm_training.SAMPLED_NEGATIVES,
        },
        "policy": measured["figures"],
        "reward_model": reward_figures,
        "seconds": {**log.seconds, "total": round(sum(log.seconds.values()), 1)},
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help=f"default: {ASSETS}, with --quick {QUICK_OUT}")
    parser.add_argument("--quick", action="store_true", help="tiny step counts, for a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    plan = Plan.quick() if arguments.quick else Plan()
    out = arguments.out or (QUICK_OUT if arguments.quick else ASSETS)
    figures = run(out, plan, arguments.seed, Log())
    text = json.dumps(figures, indent=2) + "\n"
    (out / "training.json").write_text(text)
    (out / "README.md").write_text(model_card(figures))
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
