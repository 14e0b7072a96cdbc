"""What all tests share: quiet libraries, a seeded global generator, the golden models."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton, which transformers imports, reads this as it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from golden_data import GOLDEN, golden_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nabla_fast import _native

# A file to test in place of the installed nabla_fast._C: `make emulate` sets it.
_EXTENSION = os.environ.get("NABLA_FAST_TEST_EXTENSION")
if _EXTENSION:
    _spec = importlib.util.spec_from_file_location("nabla_fast._C", _EXTENSION)
    sys.modules["nabla_fast._C"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["nabla_fast._C"])


def pytest_configure() -> None:
    # The last entry, so that an installed package is not shadowed by the checkout.
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny models lose by more; a test of threads sets its own number


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_models() -> dict[str, PreTrainedModel]:
    """The golden models in float32 by name: lm, lm_edge and rm. Shared: not to be changed."""
    return {name: golden_model(name) for name in ("lm", "lm_edge", "rm")}


@pytest.fixture(scope="session")
def golden_models_64() -> dict[str, PreTrainedModel]:
    """The golden models in float64. Shared: not to be changed."""
    return {name: golden_model(name, torch.float64) for name in ("lm", "lm_edge", "rm")}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The golden models' tokenizer: one token a character, a chat template, EOS 0."""
    return PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(params=_native.ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set that this CPU has."""
    if not _native.available():
        pytest.skip(_native.why_missing())
    native = _native.extension()
    best, level = native.cpu_isa(), _native.ISA_NAMES.index(request.param)
    if level > best:
        pytest.skip(f"this CPU has no {request.param}")
    assert native.limit_cpu_isa(level) == 0
    yield request.param
    native.limit_cpu_isa(best)
