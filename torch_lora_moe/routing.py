"""The schedule that ``lora_moe::route`` makes: its layout, its tile heights, and the cache a layer call keeps it in.

One order of the pairs, by (expert, slot), serves the base layer and LoRA alike: the rows of an expert are neighbours,
and within them the rows of an adapter slot. Nothing is padded between groups; two tables of tiles cut the order into
blocks, one by virtual expert ``slot * E + expert`` and one by expert.

Worked example, ``E = 2``, ``K = 1``, ``topk_ids = [[1], [0], [1], [1]]``, slots ``[0, -1, -1, 0]`` (the last column
holds each row's number of used entries)::

    SORTED_TOKEN_IDS    1  2  0  3 | 4     pairs by (expert, slot): token 1 on expert 0, then expert 1
    SORTED_LORA_IDS    -1 -1  0  0 | 4     their slots, -1 first
    LORA_TILE_IDS       1 -1 -1 -1 | 1     virtual expert 0 * 2 + 1
    LORA_TILE_STARTS    2 -1 -1 -1 | 1     its rows start at 2
    LORA_TILE_ROWS      2 -1 -1 -1 | 1     and are two
    EXPERT_TILE_IDS     0  1 -1 -1 | 2
    EXPERT_TILE_STARTS  0  1 -1 -1 | 2
    EXPERT_TILE_ROWS    1  3 -1 -1 | 2     expert 1 has three rows; more than a tile holds would make a second tile
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

SORTED_TOKEN_IDS = 0
SORTED_LORA_IDS = 1
LORA_TILE_IDS, LORA_TILE_STARTS, LORA_TILE_ROWS = 2, 3, 4
EXPERT_TILE_IDS, EXPERT_TILE_STARTS, EXPERT_TILE_ROWS = 5, 6, 7
NUM_SCHEDULE_ROWS = 8

RoutingCache = MutableMapping[str, Any]


def lora_tile_rows(num_pairs: int, num_experts: int, max_loras: int) -> int:
    """Most rows in a LoRA tile: a pure function of the shapes, so that all ops of a layer agree without being told."""
    return _tile_rows(num_pairs, num_experts * max_loras, 64)


def expert_tile_rows(num_pairs: int, num_experts: int) -> int:
    """Most rows in an expert tile, see `lora_tile_rows`."""
    return _tile_rows(num_pairs, num_experts, 128)


def _tile_rows(num_pairs: int, num_groups: int, most: int) -> int:
    """A power of two from 16 (the smallest tensor-core tile) to ``most`` that an average group about fills."""
    rows = 16
    while rows < most and rows * num_groups < num_pairs:
        rows *= 2
    return rows


def schedule_shape(num_pairs: int) -> tuple[int, int]:
    """Shape of a schedule of ``num_pairs`` pairs: every tile holds at least one pair, so no row needs more."""
    return NUM_SCHEDULE_ROWS, num_pairs + 1


def cached_schedule(
    routing_cache: RoutingCache | None,
    route: Callable[..., Tensor],
    topk_ids: Tensor,
    token_lora_mapping: Tensor | None,
    adapter_enabled: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> Tensor:
    """The schedule of this layer call: from ``routing_cache`` if it is there, else from ``route``, then kept there.

    The cache is a plain dict that the caller owns for one layer call. It holds ``"schedule"`` (the tensor) and the
    numbers it was made for, ``"num_experts"`` and ``"max_loras"``.

    Raises:
        ValueError: the cache holds the schedule of another number of pairs, experts or slots.
    """
    if routing_cache is not None and "schedule" in routing_cache:
        schedule: Tensor = routing_cache["schedule"]
        made_for = (schedule.shape[1] - 1, routing_cache["num_experts"], routing_cache["max_loras"])
        wanted = (topk_ids.shape[0] * topk_ids.shape[1], num_experts, max_loras)
        if made_for != wanted:
            raise ValueError(
                f"routing_cache: holds the schedule of (pairs, experts, slots) = {made_for}, this call has {wanted}; "
                "use a fresh dict for each layer call"
            )
        return schedule
    schedule = route(topk_ids, token_lora_mapping, adapter_enabled, num_experts, max_loras)
    if routing_cache is not None:
        routing_cache["schedule"] = schedule
        routing_cache["num_experts"] = num_experts
        routing_cache["max_loras"] = max_loras
    return schedule


def split_k(num_pairs: int, in_features: int, device_type: str) -> int:
    """Planes of a split-K shrink: enough that few pairs still fill a GPU, one when the pairs fill it alone.

    Works on symbolic sizes without a guard, so a compiled graph does not depend on the batch.
    """
    if device_type == "cpu":
        return 1
    most = max(1, min(8, in_features // 256))
    if isinstance(num_pairs, int):
        return max(1, min(most, 1024 // (num_pairs + 1)))
    return torch.sym_max(1, torch.sym_min(most, 1024 // (num_pairs + 1)))
