"""What pyproject.toml cannot say: packages that live outside nabla_fast/, and the C++ extension.

Nothing here looks at the hardware or at torch. The extension is optional: where no C++ compiler
works, the package installs without it and ``nabla_fast._native.why_missing()`` says so.
"""

import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup

# Directories outside nabla_fast/ that are installed inside it.
MAPPED = {
    "nabla_fast.include": "csrc/include",
    "nabla_fast.triton_kernels": "triton_kernels",
}


def files(pattern: str) -> list[str]:
    """Paths under csrc/ that match `pattern`, sorted, relative to this file as setuptools wants them."""
    root = Path(__file__).parent
    return sorted(path.relative_to(root).as_posix() for path in root.glob(f"csrc/{pattern}"))


# Apple's clang has no OpenMP: there the kernels run on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

# Comparisons become selects only under -fno-trapping-math, and loops with a comparison vectorize only
# then. -fstrict-overflow undoes Python's own -fwrapv, under which 32-bit indices cost vectorization
# too. -ffp-contract is said aloud because its default differs between gcc and clang.
COMPILE = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *OPENMP]
COMPILE += ["-fno-math-errno", "-fno-trapping-math", "-fstrict-overflow", "-ffp-contract=fast"]
# Functions that take vectors are inlined: how they would be called does not matter.
COMPILE += ["-Wno-psabi"]

setup(
    packages=find_packages(include=["nabla_fast", "nabla_fast.*"]) + sorted(MAPPED),
    package_dir=MAPPED,
    ext_modules=[
        Extension(
            "nabla_fast._C",
            sources=files("*.cpp") + files("cpu/*.cpp"),
            depends=files("**/*.h"),
            include_dirs=["csrc", "csrc/include", pybind11.get_include()],
            language="c++",
            extra_compile_args=COMPILE,
            extra_link_args=OPENMP,
            optional=True,
        )
    ],
)
