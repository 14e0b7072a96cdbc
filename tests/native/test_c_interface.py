"""The C interface for other programs: an example built as they would, the header, the library."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nabla_fast
from nabla_fast import _native

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "c"
C99 = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]


@pytest.fixture(scope="module")
def library() -> str:
    try:
        return nabla_fast.get_library()
    except RuntimeError as error:
        if os.environ.get("NABLA_FAST_REQUIRE_NATIVE") == "1" and sys.platform == "linux":
            pytest.fail(f"NABLA_FAST_REQUIRE_NATIVE=1, but {error}", pytrace=False)
        pytest.skip(str(error))


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"needs {name}")


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def check_output(output: str) -> None:
    assert output.startswith("3 rows of 1003 logits, 2 tokens moved, largest error "), output


def test_example_with_compiler_flags(library, tmp_path):
    program = tmp_path / "linked"
    sources = [EXAMPLE / "linked.c", EXAMPLE / "descend.c"]
    include = f"-I{nabla_fast.get_include()}"
    path = f"-Wl,-rpath,{Path(library).parent}"
    run(tool("cc"), *C99, include, *sources, library, path, "-lm", "-o", program)
    check_output(run(program))


def test_example_with_pkg_config(library, tmp_path):
    package = ("nabla_fast", f"--with-path={nabla_fast.get_pkgconfig_dir()}")
    pkg_config = tool("pkg-config")
    cflags, libs = (run(pkg_config, *package, option).split() for option in ("--cflags", "--libs"))
    assert run(pkg_config, *package, "--modversion").strip() == nabla_fast.__version__
    program = tmp_path / "linked"
    sources = [EXAMPLE / "linked.c", EXAMPLE / "descend.c"]
    run(tool("cc"), *C99, *cflags, *sources, *libs, "-lm", "-o", program)
    check_output(run(program))


def test_pkg_config_of_the_cuda_library():
    package = ("nabla_fast_cuda", f"--with-path={nabla_fast.get_pkgconfig_dir()}")
    assert run(tool("pkg-config"), *package, "--modversion").strip() == nabla_fast.__version__
    assert "-lnabla_fast_cuda" in run(tool("pkg-config"), *package, "--libs").split()


def test_example_with_cmake(library, tmp_path):
    cmake = tool("cmake")
    run(cmake, "-S", EXAMPLE, "-B", tmp_path, f"-Dnabla_fast_DIR={nabla_fast.get_cmake_dir()}")
    run(cmake, "--build", tmp_path)
    check_output(run(tmp_path / "linked"))


def test_cmake_refuses_another_version(library, tmp_path):
    cmake = tool("cmake")
    script = tmp_path / "find.cmake"
    script.write_text(
        f"include({nabla_fast.get_cmake_dir()}/nabla_fast-config-version.cmake)\n"
        'message(STATUS "${PACKAGE_VERSION} ${PACKAGE_VERSION_COMPATIBLE}")\n'
    )
    found = {}
    for version in ("0.1", nabla_fast.__version__, "0.0.9", "0.1.99", "0.2", "1.0"):
        output = run(cmake, f"-DPACKAGE_FIND_VERSION={version}", "-P", script)
        assert f"-- {nabla_fast.__version__} " in output
        found[version] = output.split()[-1] == "TRUE"
    assert found == {
        "0.1": True,
        nabla_fast.__version__: True,
        "0.0.9": False,
        "0.1.99": False,
        "0.2": False,
        "1.0": False,
    }


def test_example_that_loads_the_library(library, tmp_path):
    program = tmp_path / "loaded"
    sources = [EXAMPLE / "loaded.c", EXAMPLE / "descend.c"]
    include = f"-I{nabla_fast.get_include()}"
    run(tool("cc"), *C99, include, *sources, "-ldl", "-lm", "-o", program)
    check_output(run(program, library))


@pytest.mark.parametrize(
    ("compiler", "suffix", "standard"),
    [("cc", "c", "c99"), ("cc", "c", "c11"), ("c++", "cpp", "c++11"), ("c++", "cpp", "c++17")],
)
def test_the_header_compiles_without_a_warning(compiler, suffix, standard, tmp_path):
    source = tmp_path / f"header.{suffix}"
    source.write_text('#include "nabla_fast.h"\nnabla_fast_dtype dtype = NABLA_FAST_BFLOAT16;\n')
    flags = [f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    run(tool(compiler), *flags, f"-I{nabla_fast.get_include()}", "-c", source, "-o", tmp_path / "header.o")


def test_the_library_shows_the_functions_of_the_header_and_nothing_else(library):
    symbols = run(tool("nm"), "-D", "--defined-only", library)
    shown = {line.split()[-1] for line in symbols.splitlines()}
    header = Path(nabla_fast.get_include(), "nabla_fast.h").read_text()
    assert shown == set(header_functions(header))
    undefined = run(tool("nm"), "-D", "--undefined-only", library)
    assert " Py" not in undefined
    assert " _Py" not in undefined


def header_functions(header: str) -> list[str]:
    found = re.findall(r"NABLA_FAST_API\s+[\w\s*]+?(nabla_fast_\w+)\(", header)
    assert "nabla_fast_abi_version" in found
    assert "nabla_fast_dto_descent" in found
    return found


def test_the_library_beside_torch_shares_its_threads(library):
    code = f"""
import ctypes, torch
library = ctypes.CDLL({library!r})
assert library.nabla_fast_abi_version() == {_native.ABI_VERSION}
torch.ones(1 << 20).add_(1)
maps = open("/proc/self/maps").read().split()
runtimes = {{word for word in maps if "libgomp" in word}}
assert len(runtimes) == 1, runtimes
"""
    run(sys.executable, "-c", code)


def test_header_library_and_package_have_one_abi_version(library):
    header = Path(nabla_fast.get_include(), "nabla_fast.h").read_text()
    version = int(re.search(r"#define NABLA_FAST_ABI_VERSION (\d+)", header)[1])
    assert ctypes.CDLL(library).nabla_fast_abi_version() == version
    assert _native.extension().abi_version() == version
    assert version == _native.ABI_VERSION


def test_a_missing_library_says_why(monkeypatch, tmp_path):
    from nabla_fast._native import library

    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libnabla_fast.so")
    with pytest.raises(RuntimeError, match=r"^libnabla_fast.so is not built: [^\n]+$"):
        nabla_fast.get_library()


def test_env_names_the_files(library, capsys):
    from nabla_fast.cli import main

    assert main(["env", "--json"]) == 0
    native = json.loads(capsys.readouterr().out)["native"]
    assert native == {
        "library": library,
        "why": None,
        "cuda_library": native["cuda_library"],
        "why_no_cuda": native["why_no_cuda"],
        "include": nabla_fast.get_include(),
        "cmake": nabla_fast.get_cmake_dir(),
        "pkgconfig": nabla_fast.get_pkgconfig_dir(),
    }
    assert (native["cuda_library"] is None) == bool(native["why_no_cuda"])
    assert Path(native["cmake"], "nabla_fast-config.cmake").is_file()
    assert Path(native["pkgconfig"], "nabla_fast.pc").is_file()
