"""Whether and where gate_up and down go in two launches each, the first tiles before the others.

A kernel can start beside the end of the one before, but what that one makes is complete only when it has ended, and
until then memory idles. Of a product in two launches the first tiles are complete while the others are computed: what
follows starts on them, and fills the GPU while the product's last programs end one by one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch_lora_moe.config import MULTIPROCESSORS, Product, TileConfig, expected_tiles

# Shared memory of a multiprocessor that starts kernels early, and what each program takes beside its own.
SHARED_MEMORY = 228 * 1024
RESERVED_MEMORY = 1024
# Warps of a multiprocessor with the registers that a product needs.
MOST_WARPS = 16
# Rounds of programs from which on two launches are quicker than one: of gate_up, and of down where it is split too,
# which has a stop of its own then, so it must not be much longer than gate_up either.
LEAST_ROUNDS = 3.0
LEAST_DOWN_ROUNDS = 1.8
MOST_DOWN_ROUNDS = 2.5
# Rounds of programs that the second launch has, if that is less than half of the product.
LAST_ROUNDS = 2.0


class Launch(NamedTuple):
    """Tiles of one launch: ``tiles`` of the schedule from ``first`` on.

    Programs of its tiles from ``waits_from`` on wait before all else for what the launch before makes, those before
    them, which start beside its last programs, behind their base product. -1: each waits where it must.
    """

    tiles: int
    first: int
    waits_from: int


def used_tiles(num_pairs: int, num_experts: int, rows: int, tiles: int) -> float:
    """Those of ``tiles`` that a random batch fills: of an expert one, if it has pairs, and one more for each ``rows``
    that they exceed, their number taken as normally distributed.
    """
    mean = num_pairs / num_experts
    used, tile = expected_tiles(num_pairs, num_experts, num_pairs), 1
    while (above := (tile * rows + 0.5 - mean) / math.sqrt(2 * mean)) < 4:
        used += num_experts * math.erfc(above) / 2
        tile += 1
    return min(tiles, used)


def rounds(product: Product, config: TileConfig, num_slices: int, tiles: float) -> float:
    """How many times the programs of so many tiles fill the GPU."""
    programs = tiles * product.rows / config.block_m * -(-product.columns // config.block_n)
    stage = (config.block_m + num_slices * config.block_n) * config.block_k * product.itemsize
    # the compiler holds one stage less of products that no warp group does
    held = config.num_stages - (0 if config.block_m >= 64 else 1)
    at_once = max(1, min(SHARED_MEMORY // (held * stage + RESERVED_MEMORY), MOST_WARPS // config.num_warps))
    return programs / (MULTIPROCESSORS * at_once)


def first_tiles(
    overlaps: bool, config: TileConfig, tiles: float, gate_up_rounds: float, down_rounds: float | None
) -> int:
    """Tiles of the first of two launches of gate_up, 0 where one is better.

    Args:
        overlaps: whether a kernel can start before the one before has ended.
        config: gate_up's.
        tiles: those that are used.
        gate_up_rounds: `rounds` of all of them.
        down_rounds: the same of down, where it goes in two launches too.
    """
    # tiles side by side, of weights that L2 does not hold, lost by it
    if not overlaps or gate_up_rounds < LEAST_ROUNDS or config.group_tiles > 1:
        return 0
    if down_rounds is not None and not LEAST_DOWN_ROUNDS <= down_rounds <= MOST_DOWN_ROUNDS * gate_up_rounds:
        return 0
    return int(tiles * max(0.5, 1 - LAST_ROUNDS / gate_up_rounds))


def launches(tiles: int, first: int, used: float, waits: bool) -> list[Launch]:
    """The launches of a product of ``tiles`` tiles, ``used`` of which are likely to have rows.

    ``first``: those of the first launch (0: one launch). ``waits``: whether the first one already starts beside the
    launch before, so that its second half waits; else that of the second one does.
    """
    if not first:
        return [Launch(tiles, 0, -1)]
    half, rest = first // 2, max(0, int((used - first) / 2))
    return [Launch(first, 0, half if waits else -1), Launch(tiles - first, first, -1 if waits else rest)]
