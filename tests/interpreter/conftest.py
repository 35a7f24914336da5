"""Runs only where Triton interprets its kernels, which ``tests/test_interpreter.py`` starts in a process of its own."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
