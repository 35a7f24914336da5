"""The schedule that ``lora_moe::route`` makes: its layout, its tile height, and the cache a layer call keeps it in.

One order of the pairs, by (expert, slot), serves the base layer and LoRA alike: the rows of an expert are neighbours,
and within them the rows of an adapter slot. Nothing is padded. Two tables cut the order: into tiles of one expert each
for the base layer, and into runs of one virtual expert each for LoRA.

Worked example, ``E = 2``, ``K = 1``, ``topk_ids = [[1], [0], [1], [1]]``, slots ``[0, -1, -1, 0]`` (the last column
holds each row's number of used entries)::

    SORTED_TOKEN_IDS     1  2  0  3 | 4     pairs by (expert, slot): token 1 on expert 0, then expert 1, slot -1 first
    SORTED_VIRTUAL_IDS  -1 -1  1  1 | 4     their virtual experts slot * E + expert, -1 where LoRA skips the pair
    EXPERT_TILE_IDS      0  1 -1 -1 | 2     the tiles' experts
    EXPERT_TILE_STARTS   0  1 -1 -1 | 2     where their rows start
    EXPERT_TILE_ROWS     1  3 -1 -1 | 2     and how many there are; more than a tile holds would make a second tile
    LORA_RUN_IDS         1 -1 -1 -1 | 1     the runs' virtual experts
    LORA_RUN_STARTS      2 -1 -1 -1 | 1     where their rows start
    LORA_RUN_ROWS        2 -1 -1 -1 | 1     and how many there are; the order's multiples of 256 end runs too
    SORTED_RUN_IDS       0  0  0  0 | 4     the run of each sorted pair; the next one for a pair without LoRA

The runs are left out (their counts are 0) where no product reads them: small batches take LoRA pair by pair, see
`cuts_runs`, which the example pretends not to know.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

SORTED_TOKEN_IDS, SORTED_VIRTUAL_IDS = 0, 1
EXPERT_TILE_IDS, EXPERT_TILE_STARTS, EXPERT_TILE_ROWS = 2, 3, 4
LORA_RUN_IDS, LORA_RUN_STARTS, LORA_RUN_ROWS = 5, 6, 7
SORTED_RUN_IDS = 8
NUM_SCHEDULE_ROWS = 9

# Runs of a virtual expert are cut at multiples of this, so that one of them cannot hold up the rest.
RUN_ROWS = 256

# By the height of a tile, twice the rows that an average expert may have; the tallest tile has no bound.
MOST_ROWS = {16: 23, 32: 56, 64: 120}
MOST_TILE_ROWS = 128

# Up to this many pairs a GPU may give each pair a program of its own, and LoRA needs no schedule.
UNSORTED_PAIRS = 1024

# Up to this many pairs a whole layer may go pair by pair too, unless that costs as much as this many bytes more. With
# more, tiles were quicker for all but the smallest experts.
FEW_PAIRS = 63
SPARED_BYTES = 145e6

RoutingCache = MutableMapping[str, Any]


def expert_tile_rows(num_pairs: int, num_experts: int) -> int:
    """Most rows in an expert tile: a power of two from 16 (the smallest tensor-core tile) to 128.

    A little more than an average expert has: a second tile finds the expert's weights in L2, where it costs less than
    empty rows in all tiles; low tiles have rows to spare. A pure function of the shapes, so that all ops of a layer
    agree on it without being told.
    """
    rows = 16
    while rows < MOST_TILE_ROWS and 2 * num_pairs > MOST_ROWS[rows] * num_experts:
        rows *= 2
    return rows


def schedule_shape(num_pairs: int) -> tuple[int, int]:
    """Shape of a schedule of ``num_pairs`` pairs: tiles and runs hold at least one pair, so no row needs more."""
    return NUM_SCHEDULE_ROWS, num_pairs + 1


def lora_sorts(num_pairs: int, num_virtual_experts: int) -> bool:
    """Whether a GPU sorts the pairs of a LoRA product: many, or so many of each virtual expert that sharing pays."""
    return num_pairs > UNSORTED_PAIRS or num_pairs > max(64, 2 * num_virtual_experts)


def lora_needs_schedule(num_pairs: int, num_virtual_experts: int, device_type: str) -> bool:
    """Whether a LoRA product is to be given a schedule; always in a traced graph, which serves any size."""
    return device_type != "cuda" or torch.compiler.is_compiling() or lora_sorts(num_pairs, num_virtual_experts)


def cuts_runs(num_pairs: int, num_virtual_experts: int) -> bool:
    """Whether a schedule has runs: wherever `lora_sorts`, and where a whole layer, which is sorted anyway, has enough
    pairs that two of a virtual expert are likely.
    """
    many = num_pairs > UNSORTED_PAIRS or num_pairs >= max(64, num_virtual_experts)
    return num_virtual_experts > 0 and many


def layer_sorts(num_tokens: int, top_k: int, num_experts: int, expert_bytes: int) -> bool:
    """Whether a whole layer on a GPU sorts its pairs, whose experts have weights of ``expert_bytes`` each.

    Not those of one token, nor a few that spare the sort and its launches: pair by pair, an expert is read again for
    each of its pairs, and weights stream more slowly than in tiles, which fits measurements as 17 percent.
    """
    num_pairs = num_tokens * top_k
    if num_tokens <= 1 or num_experts < 1 or num_pairs > FEW_PAIRS:
        return num_tokens > 1
    # of a random batch
    experts = num_experts * (1 - (1 - min(1.0, top_k / num_experts)) ** num_tokens)
    return expert_bytes * (num_pairs - experts + 0.17 * num_pairs) > SPARED_BYTES


def layer_needs_schedule(num_tokens: int, top_k: int, num_experts: int, expert_bytes: int, device_type: str) -> bool:
    """Whether a whole layer is to be given a schedule; always in a traced graph, which serves any size."""
    if device_type != "cuda" or torch.compiler.is_compiling():
        return True
    return layer_sorts(num_tokens, top_k, num_experts, expert_bytes)


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
