"""Resources of a compiled kernel: registers, stack, shared memory, tensor cores."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.compile_check.targets import Target

# A product of half-precision tiles in Triton's own intermediate language.
_HALF_PRODUCT = re.compile(r"tt\.dot .*: tensor<([0-9x]+)x(?:bf16|f16)> \*")
_WIDE = 64  # rows of a product from which several warps take it together


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel on one target.

    Attributes:
        registers: a thread.
        stack: bytes of local memory a thread; a kernel of ours has some only where registers spill.
        shared: bytes of shared memory a block.
        tensor_cores: whether the machine code has the matrix instructions that its products call for.
        half_products: whether the kernel multiplies half-precision tiles.
    """

    registers: int
    stack: int
    shared: int
    tensor_cores: bool
    half_products: bool

    def problem(self, target: Target) -> str | None:
        """One line that says what is wrong on this target; None if nothing is."""
        if self.stack:
            return f"spills: {self.stack} bytes of stack a thread"
        if self.shared > target.shared:
            return f"{self.shared} bytes of shared memory, {target.shared} are allowed"
        if self.half_products and not self.tensor_cores:
            return f"half-precision products without {target.tensor_core}"
        return None


def resources(asm: Mapping[str, str | bytes], shared: int, target: Target) -> tuple[Resources, str]:
    """Read a compiled kernel: its resources, and its machine code as text.

    Args:
        asm: ``CompiledKernel.asm``.
        shared: ``CompiledKernel.metadata.shared``.
    """
    shapes = [shape.split("x") for shape in _HALF_PRODUCT.findall(asm["ttir"])]
    wide = any(len(shape) == 2 and int(shape[0]) >= _WIDE for shape in shapes)
    if target.backend == "hip":
        code = asm["amdgcn"]
        registers, stack = amd_usage(code)
    else:
        with tempfile.TemporaryDirectory() as directory:
            cubin = Path(directory) / "kernel.cubin"
            cubin.write_bytes(asm["cubin"])
            registers, stack = nvidia_usage(cuobjdump("--dump-resource-usage", cubin))
            code = cuobjdump("--dump-sass", cubin)
    mnemonic = target.tensor_core if wide else target.warp_tensor_core
    tensor_cores = bool(re.search(rf"\b{mnemonic}", code))
    return Resources(registers, stack, shared, tensor_cores, bool(shapes)), code


def nvidia_usage(printed: str) -> tuple[int, int]:
    """Registers and bytes of stack from ``cuobjdump --dump-resource-usage`` of one kernel."""
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+)", printed)
    return int(usage[0]), int(usage[1])


def amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory from the metadata of one kernel's assembly."""
    (registers,) = re.findall(r"^\s*\.vgpr_count:\s*(\d+)", assembly, re.MULTILINE)
    (scratch,) = re.findall(r"^\s*\.private_segment_fixed_size:\s*(\d+)", assembly, re.MULTILINE)
    return int(registers), int(scratch)


def cuobjdump(option: str, cubin: Path) -> str:
    """What the program of that name, of Triton's package, prints of a file."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [program, option, cubin], capture_output=True, text=True, check=True, timeout=120
    ).stdout
