"""Runs the kernel tests under Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import interpreting
import pytest

pytest.importorskip("triton")


def test_kernels_under_the_interpreter() -> None:
    """Started with the session and waited for at its end."""
    interpreting.start()
    for code, output in interpreting.results():
        assert code == 0, output[-4000:]
        assert " passed" in output
