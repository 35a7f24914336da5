"""From a shape to a launch configuration: shipped tables for known GPUs, heuristics for the rest.

A table is a JSON file of ``configs/`` named after the GPU; `bench.tune` writes it. Of its entries for a kernel the one
nearest in shape is taken (distances in powers of two), if it is near enough to tell anything. So the choice depends on
shapes alone: it is the same in eager mode, under capture and from run to run.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

# Powers of two, over all dimensions, beyond which a tuned shape says less than a rule of thumb.
FARTHEST = 3.0


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and warps of one launch.

    ``block_m`` pairs, ``block_n`` output columns or rows of A, ``block_k`` columns of the summed dimension; a kernel
    that has no such dimension ignores its size. More stages keep more loads in flight, more warps share a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def launch_config(kernel: str, num_pairs: int, outer: int, inner: int, device: torch.device) -> LaunchConfig:
    """The configuration of ``kernel`` for ``num_pairs`` pairs.

    Args:
        kernel: ``shrink_pairs``, ``shrink_runs``, ``expand_pairs`` or ``expand_runs``.
        num_pairs: pairs of the batch.
        outer: rows of A (all slices) for a shrink, output columns of one slice for an expand.
        inner: input features for a shrink, rank for an expand.
        device: where it runs.
    """
    tuned = _nearest(kernel, num_pairs, outer, inner, _device_name(device))
    return tuned or HEURISTICS[kernel](num_pairs, outer, inner)


@functools.lru_cache(maxsize=4096)
def _nearest(kernel: str, num_pairs: int, outer: int, inner: int, device_name: str) -> LaunchConfig | None:
    def distance(entry: dict[str, Any]) -> float:
        wanted = zip((num_pairs, outer, inner), entry["shape"], strict=True)
        return sum(abs(math.log2(max(here, 1) / there)) for here, there in wanted)

    entry = min(_table(device_name).get(kernel, ()), key=distance, default=None)
    if entry is None or distance(entry) > FARTHEST:
        return None
    config = LaunchConfig(**entry["config"])
    # a tile tuned for a larger shape only wastes lanes on a smaller one
    block_n = min(config.block_n, max(16, power_of_two(outer)))
    block_k = min(config.block_k, max(16, power_of_two(inner)))
    return replace(config, block_n=block_n, block_k=block_k)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "_") if device.type == "cuda" else "cpu"


@functools.cache
def _table(device_name: str) -> dict[str, list[dict[str, Any]]]:
    file = resources.files("torch_lora_moe") / "configs" / f"{device_name}.json"
    if not file.is_file():
        return {}
    table: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())["kernels"]
    return table


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether the GPU can start a kernel before the one it depends on has ended (compute capability 9.0 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def _shrink_pairs(num_pairs: int, outer: int, inner: int) -> LaunchConfig:
    block_k = min(256, max(16, power_of_two(inner)))
    return LaunchConfig(1, min(32, power_of_two(outer)), block_k, 4, 3)


def _shrink_runs(num_pairs: int, outer: int, inner: int) -> LaunchConfig:
    block_n, most_k = min(64, max(16, power_of_two(outer))), max(16, power_of_two(inner))
    if num_pairs <= 8192:
        return LaunchConfig(16, block_n, min(128, most_k), 2, 4)
    # few warps leave room on the GPU for the expand that starts early
    return LaunchConfig(64, block_n, min(64, most_k), 2 if block_n <= 32 else 4, 3)


def _expand_pairs(num_pairs: int, outer: int, inner: int) -> LaunchConfig:
    return LaunchConfig(1, min(256 if inner <= 32 else 64, max(16, power_of_two(outer))), 0, 4, 1)


def _expand_runs(num_pairs: int, outer: int, inner: int) -> LaunchConfig:
    block_n, block_k = min(128, max(16, power_of_two(outer))), min(64, max(16, power_of_two(inner)))
    return LaunchConfig(16, block_n, block_k, 2, 1)


HEURISTICS = {
    "shrink_pairs": _shrink_pairs,
    "shrink_runs": _shrink_runs,
    "expand_pairs": _expand_pairs,
    "expand_runs": _expand_runs,
}


def shrink_planes(num_pairs: int, in_features: int, sorts: bool) -> int:
    """Planes of a split-K shrink: few pairs need them to fill the GPU, sorted ones only where the sum is long."""
    if sorts:
        return 2 if in_features >= 2048 else 1
    return max(1, min(8, in_features // 256))
