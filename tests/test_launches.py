"""Calls from addresses tell the driver what Triton's own launcher tells it, with a driver that writes it down."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.mark.skipif(COMPILER is None, reason="no C compiler, which Triton's launcher needs too")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver that is there is the one that counts")
def test_the_driver_is_told_the_same(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "cuda_driver.c")]
    subprocess.run(command, check=True)
    # the linker looks for it without its version
    (tmp_path / "libcuda.so").symlink_to(library)
    others = os.environ.get("LD_LIBRARY_PATH", "")
    found = {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": f"{tmp_path}:{others}"}
    run = [sys.executable, str(HERE / "compare_launches.py"), str(library)]
    done = subprocess.run(run, env={**os.environ, **found}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bytes") == 4
