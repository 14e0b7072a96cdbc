"""The launch benchmark: launches for a GPU that is not there, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import nabla_fast.ops as ops
from nabla_fast.bench import absent_gpu, launch
from nabla_fast.bench.launch_calls import FLOAT32, TINY, calls
from nabla_fast.cli import main
from nabla_fast.errors import BackendUnavailable, InputError

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_rows_of_a_gpu_that_is_not_there():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    why = subprocess.run(
        [sys.executable, "-c", "from nabla_fast.bench.absent_gpu import why_not; print(why_not())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if why != "None":
        pytest.skip(why)
    command = [sys.executable, "-m", "nabla_fast", "bench", "launch", "--json", "--seconds", "0.001"]
    process = subprocess.run(
        [*command, "--op", "token_stats of logits"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document.keys() == {"rows", "driver", "environment"}
    assert document["driver"] == "stubbed"
    rows = {(row["op"], row["backend"]): row for row in document["rows"]}
    assert rows.keys() == {
        ("torch.softmax", "torch"),
        ("torch.mm", "torch"),
        ("token_stats of logits", "cpu"),
        ("token_stats of logits", "triton"),
    }
    assert all(0 < row["p20"] <= row["microseconds"] <= row["p80"] for row in document["rows"])
    ours = rows["token_stats of logits", "triton"]
    assert ours["launches"] > 0
    assert ours["products"] == 0


def test_kernels_are_those_of_a_gpu():
    """Not an interpreter's, whose products in float64 not all targets have."""
    products = pytest.importorskip("nabla_fast.triton_kernels.common.products", reason="triton is missing")
    tensor = torch.empty(1)
    assert products.upcast(tensor)
    with absent_gpu._torch_on_a_gpu(absent_gpu.Launches(None)):
        assert not products.upcast(tensor)


def test_every_op_can_be_called():
    with ops.use_backend("torch"):
        for call in calls(TINY, CPU, FLOAT32):
            call.prepare()()


@pytest.mark.skipif(not absent_gpu.interpreted(), reason="launches can be timed here")
def test_it_says_why_not():
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"), absent_gpu.absent_gpu():
        pass


def test_torch_is_itself_again():
    launches = absent_gpu.Launches(None)
    with absent_gpu._torch_on_a_gpu(launches):
        assert torch.zeros(1).is_cuda
        assert torch.mm(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
        assert torch.addmm(torch.ones(4), torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert launches.products == 2
    assert not torch.zeros(1).is_cuda
    assert torch.zeros(1).is_cpu
    assert torch.equal(torch.ones(1, 2) @ torch.ones(2, 1), torch.full((1, 1), 2.0))


def test_an_op_that_there_is_not(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(InputError, match="--op 'stat_tokens' is in no name"):
        launch.run(CPU, ["stat_tokens"], seconds=0.001, on_row=lambda row: None)
    assert main(["bench", "launch", "--op", "stat_tokens"]) == 2
    assert "is in no name" in capsys.readouterr().err
