"""Runs only where Triton interprets its kernels: ``tests/test_interpreter.py`` starts processes that do."""

from __future__ import annotations

import os
from typing import Any

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _comparisons_stay_bool() -> None:
    """Triton's interpreter makes integers of a comparison of scalars that meets a block; 3.9's takes no such mask."""
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_splat

    def create_splat(self: Any, block: Any, scalar: Any) -> Any:
        handle = original(self, block, scalar)
        if scalar.data.dtype == bool:
            handle.data = handle.data.astype(bool)
        return handle

    InterpreterBuilder.create_splat = create_splat


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps every second test, say, where the environment asks for it: ``LORA_MOE_TEST_PART=0/2`` and ``1/2``."""
    part, parts = map(int, os.environ.get("LORA_MOE_TEST_PART", "0/1").split("/"))
    items[:] = items[part::parts]
