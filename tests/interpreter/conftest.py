"""Runs only where Triton interprets its kernels: ``tests/test_interpreter.py`` starts processes that do."""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps every second test, say, where the environment asks for it: ``LORA_MOE_TEST_PART=0/2`` and ``1/2``."""
    part, parts = map(int, os.environ.get("LORA_MOE_TEST_PART", "0/1").split("/"))
    items[:] = items[part::parts]
