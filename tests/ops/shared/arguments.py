"""Arguments that ops refuse, in one line that names op and argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nabla_fast.errors import InputError
from nabla_fast.ops import AdamState, GumbelNoise, cosine_schedule
from nabla_fast.ops.registry import Op

from ..contract import Selected, only_if

ROWS, VOCABULARY, HIDDEN, WIDTH = 6, 37, 4, 3
_MATRICES = ("logits", "rows", "z", "hidden", "h", "head", "grad", "direct")


def keys() -> GumbelNoise:
    return GumbelNoise(torch.arange(ROWS), torch.arange(ROWS))


def matrices() -> dict[str, Tensor]:
    """Logits, hidden states and a head."""
    return {
        "logits": torch.randn(ROWS, VOCABULARY),
        "hidden": torch.randn(ROWS, HIDDEN),
        "head": torch.randn(VOCABULARY, HIDDEN),
    }


def tables() -> list[Tensor]:
    return [torch.randn(VOCABULARY, WIDTH) for _ in range(2)]


def of_a_mix() -> dict[str, Any]:
    """Arguments of both mixes beside logits, or hidden states and head."""
    return {"tables": tables(), "tau": 1.0, "noise": keys(), "direct": torch.randn(ROWS, VOCABULARY)}


def of_a_descent(parameter: Tensor) -> dict[str, Any]:
    """Arguments of both descents beside parameter and head."""
    return {
        "state": AdamState.zeros(parameter),
        "grad": torch.randn(ROWS, VOCABULARY),
        "schedule": cosine_schedule(3, 0.01),
        "tau": 1.0,
        "noise": keys(),
        "until": torch.full((ROWS,), 3),
        "group": torch.zeros(ROWS, dtype=torch.int64),
    }


def of_a_onehot_gradient() -> dict[str, Any]:
    given = matrices()
    return {
        "cotangents": [torch.randn(ROWS, WIDTH) for _ in range(2)],
        "tables": tables(),
        "hidden": given["hidden"],
        "head": given["head"],
        "nll_coeff": 0.1,
    }


def wide(vocabulary: int, width: int | None = None) -> Tensor:
    """[1, V], or [V, width], of a single number of memory."""
    return torch.zeros(1, 1).expand(*((1, vocabulary) if width is None else (vocabulary, width)))


def takes(*names: str) -> Callable[[Callable], Callable]:
    """A test of ops that have all of these arguments."""
    return only_if(lambda cls: cls.good().keys() >= set(names))


class ArgumentContract(Selected):
    """``good`` makes arguments of ``op`` that pass, of which each test spoils one."""

    op: ClassVar[Op]
    good: ClassVar[Callable[[], dict[str, Any]]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "name" in metafunc.fixturenames:
            among = getattr(metafunc.function, "among", _MATRICES)
            metafunc.parametrize("name", [name for name in among if name in self.good()])

    def refuses(self, match: str, **spoilt: Any) -> None:
        """The op says one line that matches and begins with its name."""
        with pytest.raises(InputError, match=match) as error:
            self.op(**self.good() | spoilt)
        message = str(error.value)
        assert message.startswith(f"{self.op.name}: ")
        assert "\n" not in message
        assert len(message) < 250

    def test_good_arguments_pass(self):
        self.op(**self.good())

    @takes("tau")
    @pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan, 1e-30, 1e30])
    def test_tau(self, tau: float):
        self.refuses("tau must be from", tau=tau)

    @only_if(lambda cls: set(_MATRICES) & cls.good().keys())
    def test_matrices(self, name: str):
        tensor = self.good()[name]
        self.refuses(f"{name} must be float", **{name: tensor[0]})
        self.refuses(f"{name} must be float", **{name: tensor[None]})
        self.refuses(f"{name} must be float.* got int64", **{name: tensor.long()})
        self.refuses(f"{name} must be a tensor, got list", **{name: tensor.tolist()})
        self.refuses(f"{name} must be a dense tensor, got a sparse_coo one", **{name: tensor.to_sparse()})

    @only_if(lambda cls: {"head", "grad", "direct"} & cls.good().keys())
    def test_matrices_of_another_width(self, name: str):
        narrow = self.good()[name][:, 1:]
        self.refuses(rf"{name} must be floating-point \[.*{ROWS}|{HIDDEN}", **{name: narrow})

    test_matrices_of_another_width.among = ("head", "grad", "direct")

    @only_if(lambda cls: {"grad", "direct"} & cls.good().keys())
    def test_matrices_of_another_height(self, name: str):
        low = self.good()[name][1:]
        self.refuses(rf"{name} must be floating-point \[{ROWS}, {VOCABULARY}\]", **{name: low})

    test_matrices_of_another_height.among = ("grad", "direct")

    @takes("tables")
    def test_tables(self):
        first, second = self.good()["tables"]
        self.refuses("at least one embedding table", tables=[])
        self.refuses(rf"tables\[1\] must (be|have) .*{VOCABULARY}", tables=[first, second[1:]])
        self.refuses(r"tables\[0\] must be floating-point", tables=[first.long(), second])
        self.refuses(r"tables\[1\] must be floating-point", tables=[first, second[0]])
        self.refuses("tables must be a list of tensors, got a tensor", tables=first)

    @takes("cotangents")
    def test_cotangents(self):
        first, second = self.good()["cotangents"]
        shape = rf"must be floating-point \[{ROWS}, {WIDTH}\]"
        self.refuses("one cotangent a table is needed, got 1 for 2", cotangents=[first])
        self.refuses(rf"cotangents\[1\] {shape}", cotangents=[first, second[:, 1:]])
        self.refuses(rf"cotangents\[0\] {shape}", cotangents=[first[1:], second])

    @takes("noise")
    def test_noise_keys(self):
        key = torch.arange(ROWS)
        for seed, position, name in (
            (key.int(), key, "seed"),
            (key, key.float(), "position"),
            (key, key[1:], "position"),
            (key[:, None], key, "seed"),
            (key[0], key[0], "seed"),
        ):
            self.refuses(rf"noise\.{name} must be int64 \[", noise=GumbelNoise(seed, position))

    @only_if(lambda cls: "noise" in cls.good() and "vocabulary" not in cls.good())
    def test_noise_of_another_number_of_rows(self):
        more = torch.arange(ROWS + 1)
        self.refuses(rf"noise\.seed must be int64 \[{ROWS}\]", noise=GumbelNoise(more, more))

    @pytest.mark.parametrize("vocabulary", [0, 2**20 + 1])
    def test_vocabulary(self, vocabulary: int):
        arguments = self._with_vocabulary(vocabulary)
        match = f"(1 to 1048576 tokens, got {vocabulary})|at least one column"
        with pytest.raises(InputError, match=match) as error:
            self.op(**arguments)
        assert "\n" not in str(error.value)

    def _with_vocabulary(self, vocabulary: int) -> dict[str, Any]:
        """Arguments of one row over a vocabulary, without its memory."""
        arguments = {n: v for n, v in self.good().items() if n not in ("direct", "until", "group")}
        one = torch.zeros(1, dtype=torch.int64)
        changed = {
            "logits": wide(vocabulary),
            "z": wide(vocabulary),
            "grad": wide(vocabulary),
            "head": wide(vocabulary, HIDDEN),
            "tables": [wide(vocabulary, WIDTH)] * 2,
            "hidden": torch.zeros(1, HIDDEN),
            "h": torch.zeros(1, HIDDEN),
            "rows": torch.zeros(1, HIDDEN) if "head" in arguments else wide(vocabulary),
            "cotangents": [torch.zeros(1, WIDTH)] * 2,
            "vocabulary": vocabulary,
            "state": AdamState(*[wide(HIDDEN if "h" in arguments else vocabulary)] * 2, one),
            "noise": GumbelNoise(one, one),
        }
        return arguments | {name: value for name, value in changed.items() if name in arguments}

    @takes("state")
    def test_state(self):
        state = self.good()["state"]
        self.refuses("state.step must be int64", state=state._replace(step=state.step.int()))
        self.refuses("state.step must be int64", state=state._replace(step=state.step[1:]))
        self.refuses("state.exp_avg must be", state=state._replace(exp_avg=state.exp_avg[:, 1:]))
        double = state._replace(exp_avg_sq=state.exp_avg_sq.double())
        self.refuses("state.exp_avg_sq must be", state=double)

    @takes("schedule")
    def test_schedule(self):
        schedule = self.good()["schedule"]
        self.refuses("schedule must be float64", schedule=schedule.float())
        self.refuses("schedule must be float64", schedule=schedule[0])
        self.refuses("schedule must be float64", schedule=schedule.expand(ROWS - 1, 3))

    @takes("until", "group")
    def test_until_and_group(self):
        rows = torch.zeros(ROWS, dtype=torch.int64)
        self.refuses("until exceeds the 3 steps", until=rows + 4)
        self.refuses("until must be int64", until=rows.int())
        self.refuses("group must be int64", group=rows[1:])
        self.refuses("group numbers must not be negative", group=rows - 1)

    @only_if(lambda cls: (set(_MATRICES) - {"rows"}) & cls.good().keys())
    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_one_tensor_on_another_device(self, name: str):
        other = self.good()[name].cuda()
        self.refuses("another device than", **{name: other})

    test_one_tensor_on_another_device.among = tuple(name for name in _MATRICES if name != "rows")
