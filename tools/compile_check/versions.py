"""The check with other releases of Triton, each in a folder of its own beside this environment's torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PIN = "pin"


def installed(release: str) -> Path:
    """The folder of one release from the package index; ``newest`` is fetched anew each time."""
    folder = ROOT / "build" / f"triton-{release}"
    if release == "newest" or not (folder / "triton").exists():
        wanted = "triton" if release == "newest" else f"triton=={release}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(folder), wanted]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def check_with(release: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the check in a process that imports this release; its progress goes to standard error.

    Raises:
        RuntimeError: the process ended without rows.
    """
    environment = dict(os.environ)
    path = [str(installed(release)), str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-m", "tools.compile_check", "--json", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        return json.loads(process.stdout)["kernels"]
    except json.JSONDecodeError as error:
        raise RuntimeError(f"the check with Triton {release} ended with {process.returncode}") from error
