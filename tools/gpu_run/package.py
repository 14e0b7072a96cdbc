"""The package as it is installed, from a checkout in which nothing is built.

A folder of links stands for it at once. The C++ extension is compiled beside the parts that run on the
GPU, which do without, and appears in the folder when it is done.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from tools.gpu_run.running import ROOT

SITE = ROOT / "build" / "gpu_site"
EXTENSION = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
_BUILT = ROOT / "build" / "gpu_native"


def link_package() -> Path:
    """Make the folder anew; returns it, for the head of Python's path.

    An extension that was built in the checkout, after the last change of its sources, is in it.
    """
    shutil.rmtree(SITE, ignore_errors=True)
    package = SITE / "nabla_fast"
    package.mkdir(parents=True)
    for path in (ROOT / "nabla_fast").iterdir():
        if path.name != "__pycache__" and path.suffix != ".so" and not path.is_symlink():
            (package / path.name).symlink_to(path)
    changed = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    built = ROOT / "nabla_fast" / EXTENSION
    if built.exists() and built.stat().st_mtime > changed:
        (package / EXTENSION).symlink_to(built)
    (package / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    return SITE


def environment_of(site: Path, wheels: Path | None) -> dict[str, str]:
    """The environment in which the package in ``site`` is imported, with other projects' beside it."""
    environment = dict(os.environ)
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton_cache"))
    # The checkout itself, where nothing is built, must not come before it.
    environment["PYTHONSAFEPATH"] = "1"
    paths = [str(site), str(ROOT), str(wheels or ""), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


class NativeBuild:
    """The compilation of the C++ extension, in the background, unless it is there."""

    def __init__(self, environment: Mapping[str, str], log: Path):
        self._process: subprocess.Popen | None = None
        self._log = log.open("wb")
        if (SITE / "nabla_fast" / EXTENSION).exists():
            return
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(_BUILT)]
        command += ["--build-temp", str(_BUILT / "objects")]
        self._process = subprocess.Popen(
            ["nice", "-n", "15", *command],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> bool:
        """Whether the extension is there, after at most so many seconds."""
        if self._process is None:
            return True
        try:
            done = self._process.wait(max(0.0, seconds)) == 0
        except subprocess.TimeoutExpired:
            return False
        built, link = _BUILT / "nabla_fast" / EXTENSION, SITE / "nabla_fast" / EXTENSION
        if done and built.exists() and not link.exists():
            link.symlink_to(built)
        return link.exists()

    def stop(self) -> None:
        """End it, where it still runs."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        self._log.close()
