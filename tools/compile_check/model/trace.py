"""What an op launches, recorded on tensors that hold nothing, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nabla_fast.triton_kernels.common import library_products, presets
from tools.compile_check.costs import Pass
from tools.compile_check.figures import read
from tools.compile_check.launches import described
from tools.compile_check.model import hardware
from tools.compile_check.model.l2_cache import L2Cache
from tools.compile_check.model.launch import counted
from tools.compile_check.model.timing import Counts
from tools.compile_check.recording import Launch, recorded
from tools.compile_check.resources import Resources, resources
from tools.compile_check.targets import TARGETS
from tools.compile_check.work import Memory, size

TARGET = TARGETS["sm_90"]
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
_OVERWRITES = ("copy_", "fill_", "zero_")
_NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "set_")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Torch(TorchDispatchMode):
    """Operators of torch: each that is no view and no allocation is a launch."""

    def __init__(self, heed: Callable[[str, list[Tensor], list[Tensor], float], None]):
        super().__init__()
        self._heed = heed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        flops, result = 0.0, None
        if (places := _PRODUCTS.get(name.rstrip("_"))) is not None:
            a, b = (args[place] for place in places)
            flops = 2.0 * a.numel() * b.shape[-1]
            result = _product(a, b, name, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if name not in _NO_LAUNCH and not func.is_view:
            inputs = args[1:] if name in _OVERWRITES else args
            options = {key: value for key, value in kwargs.items() if key != "out"}
            self._heed(name, _tensors((inputs, options)), _tensors(result), flops)
        return result


def _product(a: Tensor, b: Tensor, name: str, args: Any, kwargs: Any) -> Tensor | None:
    """The result of a product whose dtype is not that of its operands: torch has these for CUDA alone."""
    out = args[0] if name.endswith("_") else kwargs.get("out")
    if out is not None:
        return out if out.dtype != a.dtype else None
    dtypes = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype))
    dtype = next(dtypes, None)
    return None if dtype is None else a.new_empty(*a.shape[:-1], b.shape[-1], dtype=dtype)


class _Known:
    """Kernels by their hash: read once."""

    def __init__(self) -> None:
        self._kernels: dict[str, tuple[Resources, Pass]] = {}

    def __call__(self, kernel: Any) -> tuple[Resources, Pass]:
        if kernel.hash not in self._kernels:
            used, code = resources(kernel.asm, kernel.metadata.shared, TARGET)
            self._kernels[kernel.hash] = used, read(code, TARGET)
        return self._kernels[kernel.hash]


_known = _Known()


def trace(call: Callable[[], object]) -> list[Counts]:
    """Launches of a call on meta tensors, those that are alike counted together, in order.

    Raises:
        LookupError: nothing says what a kernel handles.
    """
    cache = L2Cache(hardware.L2_BYTES)
    found: list[Counts] = []

    def missed(memories: Iterable[Memory]) -> float:
        return float(sum(map(cache.missed, memories)))

    def of_torch(name: str, reads: list[Tensor], writes: list[Tensor], flops: float) -> None:
        moved = float(size(*reads, *writes))
        memory = missed(reads) + missed(writes)
        found.append(Counts(f"torch.{name}", 1, memory, moved, products=flops))

    def of_triton(launch: Launch) -> None:
        found.append(_counts(launch, missed))

    with presets.assumed(TARGET.name), recorded(TARGET, of_triton), _Torch(of_torch):
        _try_products()
        found.clear()
        call()
    return together(found)


def _try_products() -> None:
    """What a process tries once is no launch of the op that comes first."""
    for dtype in (torch.bfloat16, torch.float16):
        one = torch.empty(1, 1, dtype=dtype, device="meta")
        library_products.multiplies(one, one)


def _counts(launch: Launch, missed: Callable[[Sequence[Memory]], float]) -> Counts:
    work = described(launch)
    if work is None:
        raise LookupError(f"nothing in tools/compile_check/launches says what {launch.function} handles")
    used, kernel = _known(launch.kernel)
    return counted(launch, work, kernel, used, missed(work.reads) + missed(work.writes))


def together(counts: list[Counts]) -> list[Counts]:
    """Launches that differ in nothing as one, where the first of them stands."""
    found: dict[Counts, int] = {}
    for count in counts:
        found[count] = found.get(count, 0) + 1
    return [replace(count, launches=number) for count, number in found.items()]
