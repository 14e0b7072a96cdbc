"""Code that a checkpoint folder brings along."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from nabla_fast import ModelError
from nabla_fast.checkpoints import bundled, load_language_model, load_reward_model, load_tokenizer

LOADERS = {"lm": load_language_model, "rm": load_reward_model, "tokenizer": load_tokenizer}


@pytest.mark.parametrize("kind", LOADERS)
def test_code_in_a_checkpoint_never_runs_and_nobody_is_asked(kind: str, tmp_path: Path, monkeypatch):
    folder = tmp_path / kind
    shutil.copytree(bundled(kind), folder)
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    fields = {
        "auto_map": {
            "AutoConfig": "mine.Mine",
            "AutoModelForCausalLM": "mine.Mine",
            "AutoModelForSequenceClassification": "mine.Mine",
        },
        "model_type": "mine",
    }
    config = folder / "config.json"
    if kind == "tokenizer":
        fields = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
        config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ModelError, match="it needs the code in its folder, which is never run") as caught:
        LOADERS[kind](folder)
    assert str(folder) in str(caught.value)
    assert sys.stdin.tell() == 0
    assert not ran.exists()
