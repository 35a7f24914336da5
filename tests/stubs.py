"""Builds the C++ library as an installation builds it, and runs scripts in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch_lora_moe import native

ROOT = Path(__file__).parent.parent


def build(out: Path) -> Path:
    """The library, built by setup.py."""
    folders = ["--build-lib", str(out), "--build-temp", str(out / "temp")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    environment = {**_environment(), "LORA_MOE_BUILD_STUBS": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    return out / "torch_lora_moe" / native.LIBRARY


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != native.DEFINED_BY}


def run(
    script: str, *arguments: object, folder: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, the package imported from ``folder``."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    variables = {**_environment(), "PYTHONPATH": str(folder), **(environment or {})}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-1000:]} {done.stderr[-4000:]}"
    return done
