"""PEFT's rules for the rank and the scaling of one module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


def rank_and_scaling(config: Mapping[str, Any], name: str, stored_rank: int) -> tuple[float, float]:
    """The rank that ``adapter_config.json`` gives a module, and ``alpha / r`` (``alpha / sqrt(r)`` with rslora).

    Args:
        config: the configuration.
        name: the module's name in the model that was trained.
        stored_rank: the rank of its matrices, taken where the configuration names none.
    """
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    rank = _pattern(config.get("rank_pattern"), name, config.get("r", stored_rank))
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the whole name or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
