"""``nabla-fast generate``: decode prompts with models from checkpoint folders."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from nabla_fast.cli.interrupts import postponed
from nabla_fast.cli.options import (
    add_config_options,
    add_device_options,
    add_json_option,
    check_device,
    config_from,
)
from nabla_fast.cli.output import give_up_stdout, say, warnings_as_lines
from nabla_fast.cli.prompt_file import read_prompts
from nabla_fast.config import DTOConfig
from nabla_fast.errors import DecodingFailed, DecodingInterrupted, InputError
from nabla_fast.results import Result


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="decode prompts with models from checkpoint folders",
        description="Decode prompts. Without --model, the bundled Countdown models are used.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a user message; may be given several times (default: none; this or --prompts is required)",
    )
    source.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help="a prompt a line: a string, a chat, a list of token ids, or an object with one as 'prompt'; "
        "'-': standard input (default: none; this or --prompt is required)",
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint folder of the language model (default: the bundled models)",
    )
    parser.add_argument(
        "--reward-model",
        metavar="DIR",
        help="checkpoint folder of the reward model (default: none; the bundled one without --model)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="the language model's tokenizer (default: in the model's folder or beside it)",
    )
    parser.add_argument(
        "--reward-tokenizer",
        metavar="DIR",
        help="the reward model's tokenizer, where it has its own (default: the language model's)",
    )
    parser.add_argument(
        "--min-coverage",
        type=float,
        default=0.95,
        metavar="X",
        help="least share of the language model's vocabulary that --reward-tokenizer must have",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends a response; may be given several times",
    )
    parser.add_argument(
        "--trim-stop", action="store_true", help="leave the text of --stop out of a response that it ends"
    )
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of each prompt's draws")
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="most tokens of a response"
    )
    parser.add_argument(
        "--best-of",
        type=int,
        metavar="N",
        help="draw N answers and keep the one that the reward model likes best, in place of decoding with "
        "gradients; of the settings below only those of rollouts count (default: decode with gradients)",
    )
    parser.add_argument(
        "--loop",
        choices=("auto", "batched", "sequential"),
        default="auto",
        help="sequential: runs any model; batched: the same tokens from far fewer token passes; "
        "auto: batched where the models allow it",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="prompts that the batched loop decodes at once",
    )
    parser.add_argument(
        "--max-kv-tokens",
        type=int,
        metavar="N",
        help="most tokens whose keys and values the batched loop holds at once (default: no limit)",
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "keep"),
        default="raise",
        help="raise: end at the first prompt that fails; keep: say why it failed and go on with the others",
    )
    parser.add_argument(
        "--output", metavar="FILE.jsonl", help="write each result as it finishes; replaces the file"
    )
    add_json_option(parser)
    add_device_options(parser)
    add_config_options(parser, DTOConfig(), tokens="max_new_tokens")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    config = config_from(arguments)
    prompts = _prompts(arguments)
    output = _Lines(arguments.output)
    stream = _decoder(arguments, config).stream(
        prompts,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        system_prompt=arguments.system,
        stop=arguments.stop,
        trim_stop=arguments.trim_stop,
        on_error=arguments.on_error,
    )
    texts = _Texts(stream.results, shown=not arguments.json)
    stopped: BaseException | None = None
    # On a terminal texts go above the bar; standard output to a file or a pipe is left alone.
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, redirect_stdout=sys.stdout.isatty())
    # Elsewhere it is not entered: rich before 15 ends a bar with a line break, even one that is disabled.
    shown = progress if console.is_interactive else nullcontext()
    with closing(output), stream, shown:
        task = progress.add_task("decoding", total=len(prompts))
        try:
            for n, result in stream:
                with postponed():
                    output.write(n, result)
                    texts.print(gaps=False)
                progress.advance(task)
                if texts.error is not None and not output.taken:
                    break  # nobody would see the others
        except KeyboardInterrupt:
            stopped = DecodingInterrupted(stream.results)
            with postponed():  # it may have come between a result and its line
                for n, result in enumerate(stream.results):
                    output.write(n, result)
        except DecodingFailed as error:
            stopped = error
    # Finished texts are printed even where the rest failed.
    with postponed():
        texts.print(gaps=True)
    stopped = stopped or output.error
    if arguments.json:
        _print_json(stream.results, stopped)
    if stopped or texts.error:
        raise stopped or texts.error
    return int(any(result is not None and result.error is not None for result in stream.results))


def _print_json(results: list[Result | None], stopped: BaseException | None) -> None:
    from nabla_fast.env import report

    finished = [{"index": n, **result.to_dict()} for n, result in enumerate(results) if result is not None]
    state = {"prompts": len(results), "error": None if stopped is None else str(stopped)}
    print(json.dumps({"results": finished, **state, "environment": report()}))


class _Texts:
    """Prints texts in the order of the prompts, each once.

    Attributes:
        error: what ended the printing: a full disk, or nobody who reads; None: nothing.
    """

    def __init__(self, results: list[Result | None], *, shown: bool):
        self._results, self._next = results, 0 if shown else len(results)
        self.error: OSError | None = None

    def print(self, *, gaps: bool) -> None:
        """Print those that are there, up to the first prompt that has not finished or beyond."""
        while self._next < len(self._results) and self.error is None:
            n, result = self._next, self._results[self._next]
            if result is None and not gaps:
                return
            try:
                if result is not None:
                    if len(self._results) > 1:
                        print(f"--- prompt {n}", file=sys.stderr, flush=True)
                    if result.error is not None:
                        say(result.error)
                    else:
                        print(result.text, flush=True)
            except OSError as error:  # of printing, not of decoding: results still go to the file
                self.error = error
                give_up_stdout()
            self._next += 1


class _Lines:
    """A file of JSON lines, opened for writing at the first: former results outlive a run that yields none.

    Attributes:
        error: what ended the writing, a full disk for one; None: nothing.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: str | None):
        self._path, self._file, self._written = path, None, set()
        self.error: OSError | None = None
        if path is not None:
            _check_writable(Path(path))

    @property
    def taken(self) -> bool:
        """Whether there is a file that takes results."""
        return self._path is not None and self.error is None

    def write(self, n: int, result: Result | None) -> None:
        """Write a result, if it is there and has not been written."""
        if not self.taken or result is None or n in self._written:
            return
        try:
            if self._file is None:
                self._file = Path(self._path).open("w", encoding="utf-8")  # noqa: SIM115 closed by close()
            print(json.dumps({"index": n, **result.to_dict()}), file=self._file, flush=True)
        except OSError as error:  # results are still printed
            self._give_up(error)
        self._written.add(n)

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:  # of a line that was not written, once more, or of a network's disk
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or OSError(f"--output {self._path}: {error.strerror or error}")


def _check_writable(path: Path) -> None:
    try:
        there = os.path.lexists(path)
        if there and not path.is_file() and not path.is_dir() and path.exists():
            return  # a device or a pipe, which may wait for a reader
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except FileNotFoundError:
        raise InputError(f"--output {path}: no such folder") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"--output {path}: {getattr(error, 'strerror', None) or error}") from error


def _prompts(arguments: argparse.Namespace) -> list[Any]:
    return read_prompts(arguments.prompts) if arguments.prompt is None else arguments.prompt


def _decoder(arguments: argparse.Namespace, config: DTOConfig) -> Any:
    from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer
    from nabla_fast.decoder import NablaDecoder
    from nabla_fast.models import VocabularyAlignment
    from nabla_fast.models.generation import with_own_sampling
    from nabla_fast.sampler import Sampler

    if arguments.best_of is not None:
        _check_best_of(arguments)
    device = check_device(arguments.device)
    lm_folder, rm_folder = arguments.model, arguments.reward_model
    if lm_folder is None:
        if rm_folder is not None:
            raise InputError("--reward-model needs --model")
        lm_folder, rm_folder = bundled("lm"), bundled("rm")
    lm = load_language_model(lm_folder, device, arguments.dtype)
    rm = None if rm_folder is None else load_reward_model(rm_folder, device, arguments.dtype)
    tokenizer = load_tokenizer(
        arguments.tokenizer or lm_folder, beside=None if arguments.tokenizer else lm_folder
    )
    reward_tokenizer = alignment = None
    if arguments.reward_tokenizer:
        reward_tokenizer = load_tokenizer(arguments.reward_tokenizer)
        alignment = VocabularyAlignment.from_tokenizers(
            tokenizer,
            reward_tokenizer,
            vocabulary=lm.get_input_embeddings().weight.shape[0],
            minimum_coverage=arguments.min_coverage,
        )
        print(f"the reward model covers {alignment.coverage:.1%} of the vocabulary", file=sys.stderr)
    with warnings_as_lines():
        if arguments.best_of is not None:
            return Sampler(
                lm,
                rm,
                tokenizer,
                reward_tokenizer,
                count=arguments.best_of,
                sampling=with_own_sampling(config, lm).rollout_sampling,
                batch_size=arguments.batch_size * arguments.best_of,
                max_kv_tokens=arguments.max_kv_tokens,
                alignment=alignment,
            )
        return NablaDecoder(
            lm,
            rm,
            tokenizer,
            reward_tokenizer,
            config,
            loop=arguments.loop,
            batch_size=arguments.batch_size,
            max_kv_tokens=arguments.max_kv_tokens,
            alignment=alignment,
        )


def _check_best_of(arguments: argparse.Namespace) -> None:
    if arguments.best_of < 1:
        raise InputError(f"--best-of must be at least 1, got {arguments.best_of}")
    if arguments.model is not None and arguments.reward_model is None:
        raise InputError("--best-of needs --reward-model")
    if arguments.loop == "sequential":
        raise InputError("--best-of has no sequential loop")
    if arguments.batch_size < 1:
        raise InputError(f"batch_size must be a whole number ≥ 1, got {arguments.batch_size}")
