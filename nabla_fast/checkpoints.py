"""Models and tokenizers from checkpoint folders."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from nabla_fast.config import DTYPES
from nabla_fast.errors import InputError, ModelError, one_line

# Files of the folder alone, and none of the code that may be among them: where transformers is not told,
# it asks on standard input.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def bundled(name: str) -> Path:
    """The folder of what ships with the package: "lm", "rm" or "tokenizer"."""
    return Path(str(resources.files("nabla_fast"))) / "assets" / name


def load_language_model(folder: str | Path, device: str = "cpu", dtype: str = "auto") -> nn.Module:
    """The ``AutoModelForCausalLM`` in a folder.

    Args:
        folder: with a config.json and weights.
        device: a torch device.
        dtype: "auto" is float32 on the CPU and the checkpoint's own elsewhere; or a name of DTYPES.
    Raises:
        ModelError: the folder is not such a checkpoint.
    """
    return _load(AutoModelForCausalLM, "language model", folder, device, dtype)


def load_reward_model(folder: str | Path, device: str = "cpu", dtype: str = "auto") -> nn.Module:
    """The ``AutoModelForSequenceClassification`` in a folder; arguments as of load_language_model.

    Raises:
        ModelError: the folder is not such a checkpoint, or it has not exactly one label.
    """
    model = _load(AutoModelForSequenceClassification, "reward model", folder, device, dtype)
    if model.config.num_labels != 1:
        raise ModelError(f"{folder}: a reward model has one label, this one has {model.config.num_labels}")
    return model


def load_tokenizer(folder: str | Path, *, beside: str | Path | None = None) -> Any:
    """The tokenizer in a folder.

    Args:
        folder: where it is; or, if there is none,
        beside: a checkpoint folder: the tokenizer is in it or in a folder "tokenizer" next to it.
    Raises:
        ModelError: no tokenizer is there, or it does not load.
    """
    candidates = [Path(folder)]
    if beside is not None:
        candidates = [Path(beside), Path(beside).parent / "tokenizer"]
    for candidate in candidates:
        if (candidate / "tokenizer_config.json").is_file() or (candidate / "tokenizer.json").is_file():
            try:
                return AutoTokenizer.from_pretrained(candidate, **_LOCAL)
            except Exception as error:
                raise ModelError(f"{candidate}: the tokenizer does not load: {_line(error)}") from error
    raise ModelError(f"no tokenizer in {' or '.join(map(str, candidates))}")


def _load(loader: Any, kind: str, folder: str | Path, device: str, dtype: str) -> nn.Module:
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: not a folder; the {kind} is given by its checkpoint folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: not a checkpoint folder (no config.json)")
    if dtype == "auto":
        torch_dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    elif dtype in DTYPES:
        torch_dtype = getattr(torch, dtype)
    else:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are reported below, in one line
    try:
        model, info = loader.from_pretrained(folder, dtype=torch_dtype, output_loading_info=True, **_LOCAL)
    except Exception as error:
        raise ModelError(f"{folder}: the {kind} does not load: {_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    if kind == "language model" and (heads := sorted(k for k in info["unexpected_keys"] if "score" in k)):
        # With tied embeddings nothing is missing: the table is the head.
        raise ModelError(
            f"{folder}: not a language model: the checkpoint has {heads[0]}, a classifier's head"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{folder}: not a {kind}: the checkpoint has no {', '.join(missing[:3])}")
    return model.to(device).eval()


def _line(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it needs the code in its folder, which is never run; load it yourself and pass the object"
    return one_line(error)
