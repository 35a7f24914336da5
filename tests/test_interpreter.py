"""Starts the kernel tests under Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# The interpreter works in one thread; two processes share the tests.
PARTS = 2


def test_kernels_under_the_interpreter() -> None:
    folder = Path(__file__).parent / "interpreter"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(folder)]
    processes = []
    for part in range(PARTS):
        chosen = {"TRITON_INTERPRET": "1", "LORA_MOE_TEST_PART": f"{part}/{PARTS}", "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, env={**os.environ, **chosen}, text=True, **pipes))
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
        assert " passed" in output
