"""Machine code of the kernels in csrc/cuda: compiled by nvcc, counted as Triton's are."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.compile_check.costs import Pass
from tools.compile_check.figures import read
from tools.compile_check.resources import cuobjdump
from tools.compile_check.targets import TARGETS

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"
_INCLUDES = [f"-I{ROOT / 'csrc' / folder}" for folder in ("cuda", "cpu", "include")]
_USAGE = re.compile(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine code.

    Attributes:
        registers: a thread.
        shared: bytes of static shared memory a block.
        code: its longest path, loops apart.
    """

    registers: int
    shared: int
    code: Pass


def kernels(source: str, target: str = "sm_90") -> dict[str, Kernel]:
    """The kernels of a file in csrc/cuda by their names, ``weights_kernel<float, bfloat16, false>``.

    Raises:
        FileNotFoundError: there is no nvcc.
        subprocess.CalledProcessError: it does not compile.
    """
    if shutil.which("nvcc") is None:
        raise FileNotFoundError("nvcc is not in PATH")
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernels.cubin"
        arch = f"-arch={target}a" if target in ("sm_90", "sm_100") else f"-arch={target}"
        command = ["nvcc", "-std=c++17", "-O3", arch, *_INCLUDES, "-cubin", SOURCES / source, "-o", cubin]
        subprocess.run(command, check=True, capture_output=True, text=True)
        usage = cuobjdump("--dump-resource-usage", cubin)
        code = dict(_functions(cuobjdump("--dump-sass", cubin)))
    found = {name: (int(registers), int(shared)) for name, registers, _, shared in _USAGE.findall(usage)}
    names = _demangled(list(found))
    return {
        names[mangled]: Kernel(*of_kernel, read(code[mangled], TARGETS[target]))
        for mangled, of_kernel in found.items()
    }


def _functions(printed: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\s*Function : ", printed, flags=re.MULTILINE)[1:]:
        name, code = part.split("\n", 1)
        yield name.strip(), code


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """Without namespaces, the type of the result and parameters."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return {
        name: re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", line).split("(")[0].strip()
        for name, line in zip(names, text.splitlines(), strict=True)
    }
