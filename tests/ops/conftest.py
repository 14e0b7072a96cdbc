"""Fixtures of the op tests."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_build import build

from nabla_fast._native import cuda_library

from .inputs import Draw
from .interpreted import mended

# Inputs are new in every run; a failure prints the number that brings its own back.
_VARIABLE = "NABLA_FAST_TEST_SEED"
_SEED = int(os.environ.get(_VARIABLE) or secrets.randbelow(2**31))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a machine with a GPU all tests of its kernels are run there, whatever class they come from."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.name in ("test_triton.py", "test_cuda.py"):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's own seed."""
    print(f"{_VARIABLE}={_SEED} repeats this")
    return _SEED ^ zlib.crc32(request.node.nodeid.encode())


@pytest.fixture
def draw(seed: int) -> Draw:
    """The test's source of random inputs."""
    return Draw(seed)


@pytest.fixture(scope="session")
def cuda_kernels() -> Iterator[None]:
    """The backend "cuda" is there: on a GPU, if its library is built, else on the host of device code."""
    if torch.cuda.is_available():
        if why := cuda_library.why_missing():
            pytest.skip(why)
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cuda_library.HOST_VARIABLE, str(build("kernels.so")))
        cuda_library._load.cache_clear()
        assert cuda_library.why_missing() is None
        yield
    cuda_library._load.cache_clear()


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """These inputs are too small to share: threads that wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def threads(one_thread: None) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; one again after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="package", autouse=True)
def interpreter() -> Iterator[None]:
    """Interpreted kernels reduce fast and round as a GPU does."""
    with mended():
        yield
