"""The optional C++ library of ``csrc_stubs/``: the ops' schemas and CPU kernels for processes without Python.

Where it was built into the package, importing the package loads it, and its kernels take the place of the torch ones
on the CPU (behind the same checks). ``LORA_MOE_STUBS=0`` in the environment leaves it alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAMES = ("route", "lora_shrink", "lora_expand_add_", "lora_add_", "fused_experts")
LIBRARY = "liblora_moe_stubs.so"
# Tells the library, which is not to define schemas twice, that the Python package of this process has.
DEFINED_BY = "TORCH_LORA_MOE_SCHEMAS_OF"

# op name: kernel that the CPU ops call in place of the torch one
KERNELS: dict[str, Callable[..., Any]] = {}


def built_library() -> Path | None:
    """The library that was built into the installed package, if there is one."""
    path = Path(__file__).parent / LIBRARY
    return path if path.is_file() else None


def load(path: str | Path | None = None) -> None:
    """Loads the library and lets its kernels take the place of the torch ones on the CPU.

    Args:
        path: the library; by default the one in the installed package.

    Raises:
        FileNotFoundError: there is no such file, or the package was installed without it.
        OSError: it cannot be loaded into this process.
    """
    path = built_library() if path is None else Path(path)
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"{path or LIBRARY} not found; build it with LORA_MOE_BUILD_STUBS=1 pip install --no-build-isolation"
        )
    torch.ops.load_library(str(path))
    KERNELS.update({name: getattr(torch.ops.lora_moe_cpu, name).default for name in NAMES})


def load_built() -> None:
    """Loads the library that was built into the package, if there is one and the environment allows it."""
    if built_library() is not None and os.environ.get("LORA_MOE_STUBS", "1") != "0":
        load()
