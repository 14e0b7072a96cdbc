"""``import nabla_fast`` needs no accelerator, no Triton and no compiled extension."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton" or name == "nabla_fast._C":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Missing())
"""


# Said once where the extension is missing.
NO_KERNELS = "ops on the CPU run in plain PyTorch"


def run(code: str) -> None:
    """Run code in a new interpreter that sees no CUDA device and turns warnings into errors."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("NABLA_FAST_BACKEND", None)
    source = textwrap.dedent(PREAMBLE) + textwrap.dedent(code)
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            "-W",
            f"ignore:{NO_KERNELS}:UserWarning",
            "-c",
            source,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_ops_alone_need_neither_transformers_nor_rich():
    run("""
        import nabla_fast.ops

        assert not {"transformers", "rich", "safetensors"} & set(sys.modules)
    """)


def test_the_version_needs_no_torch():
    run("""
        from nabla_fast.cli import main

        try:
            main(["--version"])
        except SystemExit as end:
            assert end.code == 0
        assert not {"torch", "transformers", "numpy"} & set(sys.modules)
    """)


def test_all_public_names_are_there_when_they_are_asked_for():
    run("""
        import nabla_fast

        assert set(nabla_fast.__all__) <= set(dir(nabla_fast))
        assert all(getattr(nabla_fast, name) is not None for name in nabla_fast.__all__)
        assert nabla_fast.ops.token_stats.name == "token_stats"
        assert not hasattr(nabla_fast, "no_such_name")
    """)


@pytest.mark.smoke
def test_import_and_ops_without_triton_extension_and_cuda():
    run("""
        import nabla_fast
        import nabla_fast.ops as ops
        import torch

        assert "triton" not in sys.modules
        status = ops.backend_status()
        assert status["torch"] is None
        assert status["cpu"] and "\\n" not in status["cpu"]
        assert not torch.cuda.is_available()
        for name in nabla_fast.__all__:
            assert hasattr(nabla_fast, name), name
        stats = ops.token_stats(torch.tensor([[0.0, 1.0, 2.0]]))
        assert int(stats.argmax) == 2
        try:
            nabla_fast.use_backend("cpu")
        except nabla_fast.BackendUnavailable as error:
            assert "cpu" in str(error) and "\\n" not in str(error)
        else:
            raise AssertionError("the missing extension was not noticed")
    """)


def test_import_loads_no_model_code():
    run("""
        import nabla_fast

        loaded = [name for name in sys.modules if name.startswith("transformers.models.")]
        assert not [name for name in loaded if ".modeling_" in name], loaded
    """)
