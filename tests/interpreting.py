"""The kernel tests under Triton's interpreter, in processes beside the other tests: it works in one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# so many processes share the tests
PARTS = 2
_processes: list[subprocess.Popen[str]] = []


def start() -> None:
    """Starts the processes, which leave the machine to others where those need it; once."""
    folder = Path(__file__).parent / "interpreter"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(folder)]
    for part in range(len(_processes), PARTS):
        chosen = {"TRITON_INTERPRET": "1", "LORA_MOE_TEST_PART": f"{part}/{PARTS}", "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        polite = {"preexec_fn": lambda: os.nice(5)} if os.name == "posix" else {}
        environment = {**os.environ, **chosen}
        _processes.append(subprocess.Popen(command, env=environment, text=True, **pipes, **polite))


def results() -> list[tuple[int, str]]:
    """What each process returned and printed, once they have ended."""
    outputs = [process.communicate()[0] for process in _processes]
    return [(process.returncode, output) for process, output in zip(_processes, outputs, strict=True)]


def stop() -> None:
    """Ends those that still run."""
    for process in _processes:
        process.kill()
