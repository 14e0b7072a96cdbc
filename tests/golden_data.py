"""Reading the golden data: numbers of the official release on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

GOLDEN = Path(__file__).parent / "golden"


def golden_json(name: str) -> list[dict]:
    """The cases of one golden file."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A golden model by its folder's name, freshly loaded, in evaluation mode."""
    auto = AutoModelForSequenceClassification if name == "rm" else AutoModelForCausalLM
    return auto.from_pretrained(GOLDEN / name, dtype=dtype).eval()
