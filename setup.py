"""What pyproject.toml cannot say: packages that live outside nabla_fast/, and what is built from C++.

That is the extension ``nabla_fast._C`` and, for other programs, ``libnabla_fast.so`` with the same
kernels and no Python. Nothing here looks at the hardware or at torch. Both are optional: where no C++
compiler works, the package installs without them, and ``nabla_fast._native.why_missing()`` and
``nabla_fast.get_library()`` say so.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "nabla_fast.libnabla_fast"

# Directories outside nabla_fast/ that are installed inside it.
MAPPED = {
    "nabla_fast.cmake": "csrc/cmake",
    "nabla_fast.include": "csrc/include",
    "nabla_fast.pkgconfig": "csrc/pkgconfig",
    "nabla_fast.triton_kernels": "triton_kernels",
    "nabla_fast.triton_kernels.common": "triton_kernels/common",
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

# The library holds the object files that the C interface needs; every symbol is there or in a library.
LINK_LIBRARY = ["-Wl,--version-script=csrc/exports.map", "-Wl,-soname,libnabla_fast.so"]
LINK_LIBRARY += ["-Wl,--gc-sections", "-Wl,--no-undefined"]


class BuildOnce(build_ext):
    """Compiles files side by side, and a file that two extensions share once."""

    def build_extensions(self) -> None:
        compile_files, objects = self.compiler.compile, {}

        def compile_each(sources: list[str], *args, **options) -> list[str]:
            for source in sources:
                if source not in objects:
                    objects[source] = pool.submit(compile_files, [source], *args, **options)
            return [name for source in sources for name in objects[source].result()]

        self.compiler.compile = compile_each
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            super().build_extensions()

    def get_ext_filename(self, name: str) -> str:
        """A library has a plain name; a module's tells what Python it is for."""
        if name.split(".")[-1] == LIBRARY.split(".")[-1]:
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)


class TaggedWheel(bdist_wheel):
    """A wheel whose name tells what it holds: any machine may use one without machine code."""

    def get_tag(self) -> tuple[str, str, str]:
        build = self.get_finalized_command("build_ext")
        built = any(os.path.exists(build.get_ext_fullpath(e.name)) for e in self.distribution.ext_modules)
        self.root_is_pure = not built  # also what the wheel says of itself
        return super().get_tag()


def extension(name: str, sources: list[str], link: list[str]) -> Extension:
    """Files that two extensions share are compiled once, so all are compiled alike."""
    return Extension(
        name,
        sources=sources,
        depends=[*files("**/*.h"), "csrc/exports.map"],
        include_dirs=["csrc/cpu", "csrc/include", pybind11.get_include()],
        language="c++",
        extra_compile_args=COMPILE,
        extra_link_args=OPENMP + link,
        optional=True,
    )


# Kernels in internal/ are called by the Python package alone.
KERNELS = files("cpu/**/*.cpp")
EXPORTED = [source for source in KERNELS if not source.startswith("csrc/cpu/internal/")]

EXTENSIONS = [extension("nabla_fast._C", files("python/*.cpp") + KERNELS, [])]
# What is linked as a module elsewhere than on Linux, programs cannot link with.
if sys.platform == "linux":
    EXTENSIONS += [extension(LIBRARY, EXPORTED, LINK_LIBRARY)]

setup(
    packages=find_packages(include=["nabla_fast", "nabla_fast.*"]) + sorted(MAPPED),
    package_dir=MAPPED,
    ext_modules=EXTENSIONS,
    cmdclass={"bdist_wheel": TaggedWheel, "build_ext": BuildOnce},
)
