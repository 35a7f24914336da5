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

from torch_lora_moe.routing import RUN_ROWS

# Below this many programs of an expert product the last of them leave much of the GPU idle.
FEW_PROGRAMS = 1024
# Shared memory that a tile needs beside its stages, to turn its result around.
EPILOGUE_MEMORY = 32 * 1024
# Multiprocessors of a large GPU, and what of the shared memory of each its programs can use.
MULTIPROCESSORS = 132
PROGRAM_MEMORY = 220 * 1024
# An expert's weight up to this size stays in L2 (40 to 60 MB on large GPUs) from one of its tiles to the next.
KEPT_IN_L2 = 40 * 2**20
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


def layer_shrink_config(
    num_pairs: int, num_virtual_experts: int, outer: int, inner: int, has_runs: bool
) -> tuple[LaunchConfig, int, int]:
    """The configuration and planes of a shrink inside the whole layer.

    Returns:
        configuration, planes, and programs that share the rows of a run. The products behind it read every plane again,
        so planes come last. ``block_m`` 1 is ``shrink_pairs``; more without runs is ``shrink_streams``.
    """
    deep, wide = max(16, power_of_two(inner)), max(16, power_of_two(outer))
    if has_runs:
        return _layer_shrink_runs(num_pairs, num_virtual_experts, outer, inner)
    if num_pairs >= 64 and num_pairs * outer * inner > 2**20:
        return LaunchConfig(16, min(32, wide), min(256, deep), 2, 4), 1, 1
    # much of a row at once, so that few programs do not wait again and again beside the next kernel's many loads; no
    # more programs than are soon gone
    rows, columns = 2, min(2048, deep)
    while rows < min(16, wide) and (rows * columns < 4096 or num_pairs * outer > 6 * MULTIPROCESSORS * rows):
        rows *= 2
        columns = min(columns, 4096 // rows)
    return LaunchConfig(1, rows, columns, max(1, rows * columns // 512), 1), 1, 1


def _layer_shrink_runs(
    num_pairs: int, num_virtual_experts: int, outer: int, inner: int
) -> tuple[LaunchConfig, int, int]:
    """As `layer_shrink_config`, of sorted pairs."""
    deep, wide = max(16, power_of_two(inner)), max(16, power_of_two(outer))
    per_run, runs = num_pairs / num_virtual_experts, min(num_pairs, num_virtual_experts)
    # lower tiles leave room for more programs side by side, taller ones read A and rows of x less often
    if per_run <= 18 and (per_run < 16 or wide < 128):
        block_m, block_n = 16, min(128 if per_run >= 4 else 64, wide)
    elif per_run < 28 and wide < 128 and runs > 64:
        block_m, block_n = 32, wide
    else:
        block_m, block_n = 64, min(128, wide)
    pieces = run_pieces(num_pairs, num_virtual_experts, block_m)
    # pieces with rows, of which the last one of a run is half full, and runs that a multiple of RUN_ROWS cuts in two
    programs = num_pairs / block_m + runs / 2 + num_pairs / RUN_ROWS
    if block_m == 64:
        # as much on its way as leaves room for all programs at once
        step = (block_m + block_n) * min(64, deep) * 2
        for block_k, stages in ((128, 4), (64, 4)):
            if programs <= MULTIPROCESSORS * (PROGRAM_MEMORY // (step * stages * block_k // 64)):
                warps = 8 if block_n * block_k == 128 * 128 else 4
                return LaunchConfig(block_m, block_n, min(block_k, deep), warps, stages), 1, pieces
        return LaunchConfig(block_m, block_n, min(64, deep), 4, 3), 1, pieces
    # many programs leave each of them little shared memory
    many = pieces > 1 and programs >= (1024 if block_m == 16 else 1536)
    block_k = 64 if many and inner >= 2048 and block_n <= 64 else 128
    warps = 2 if block_n <= 32 and inner <= 2048 else 4
    planes = max(1, min(8, inner // 256, 128 // runs)) if block_m == 16 else 1
    return LaunchConfig(block_m, block_n, min(block_k, deep), warps, 3), planes, pieces


def run_pieces(num_pairs: int, num_virtual_experts: int, block_m: int) -> int:
    """Programs that share the rows of a run, ``block_m`` of them at a time: for nearly all runs of a random batch one
    time each. Those of a run of fewer rows have nothing to do.
    """
    rows = min(num_pairs / max(num_virtual_experts, 1), RUN_ROWS)
    return max(1, min(RUN_ROWS // block_m, math.ceil((rows + 3 * math.sqrt(rows)) / block_m)))


@dataclass(frozen=True)
class Product:
    """What the tile of an expert product is chosen by.

    ``pairs`` in all, ``rows`` of them to a tile and ``tiles`` (expected), ``columns`` of the output (of the activation
    for gate_up), ``inner`` summed elements of ``itemsize`` bytes, the ``rank`` of LoRA (0: none), whether the schedule
    has runs, of how many adapter ``slots``, the average rows of a run, and whether the copy engine can bring B.
    """

    pairs: int
    rows: int
    tiles: float
    columns: int
    inner: int
    itemsize: int
    rank: int
    has_runs: bool
    slots: int
    run_rows: float
    streams: bool = False


@dataclass(frozen=True)
class TileConfig:
    """How an expert product is cut: ``block_m`` pairs by ``block_n`` output columns (of each slice), ``block_k`` deep.

    A tile of the schedule that has more rows is cut into parts of ``block_m``.
    ``lora_columns`` columns of LoRA (slots times ranks) are taken in one step, ``lora_stages`` steps are on their way
    at once; with ``lora_preload`` B of the first one is loaded before the base product. With ``lora_streams`` LoRA goes
    run by run instead, as the base product does through its stages, where the copy engine can bring B.
    ``group_tiles`` go side by side through the columns.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    lora_columns: int = 64
    lora_stages: int = 1
    lora_preload: bool = False
    lora_streams: bool = False
    group_tiles: int = 1


def _columns(size: int, most: int) -> int:
    """The widest block up to ``most`` columns that leaves little of the last one unused, from 16 on."""
    block = most
    while block > 32 and -(-size // block) * block > 1.125 * size:
        block //= 2
    return max(16, min(block, power_of_two(size)))


def expected_tiles(num_pairs: int, num_experts: int, rows: int) -> float:
    """Expert tiles of a batch whose pairs fall on experts at random, without the second ones of some experts."""
    return max(num_experts * (1 - math.exp(-num_pairs / num_experts)), num_pairs / rows)


def gate_up_config(product: Product, is_gated: bool) -> TileConfig:
    """The tile of the gate_up product."""
    product = _cut(product, 0.45, 64)
    rows, columns, lora = product.rows, product.columns, _lora_steps(product, 32)
    wide, deep = 1 if is_gated else 2, max(16, power_of_two(product.inner))
    if product.itemsize == 4:
        return TileConfig(rows, _columns(columns, 32 * wide), min(32, deep), 4, 2, lora_columns=16)
    if rows == 16:
        return _narrow_gate_up_config(product, wide, deep, lora)
    if rows == 32:
        # deep steps: half as many turns, and so barriers, for the same bytes; much LoRA needs other programs beside
        stages = 2 if _share_of_lora(product) > 0.6 and not product.streams else 3
        return TileConfig(rows, _columns(columns, 64 * wide), min(128, deep), 4, stages, *lora)
    if rows == 64:
        return TileConfig(rows, _columns(columns, 64 * wide), min(64, deep), 4, 3, *lora)
    group = _group_tiles(2 // wide * product.columns * product.inner * product.itemsize)
    return TileConfig(rows, _columns(columns, 128 * wide), min(64, deep), 8, 4, *lora, group_tiles=group)


def _narrow_gate_up_config(product: Product, wide: int, deep: int, lora: tuple[int, int, bool, bool]) -> TileConfig:
    """The tile of the gate_up product where an expert has so few rows that it is 16 high."""
    columns = product.columns

    def programs(block_n: int) -> float:
        return product.tiles * -(-columns // block_n)

    block_n = _columns(columns, 64 * wide)
    # few programs are cut narrower, so that the last of them do not run alone
    if programs(block_n) < 2 * FEW_PROGRAMS:
        block_n = _columns(columns, 32 * wide)
    if lora[2] and programs(block_n) < FEW_PROGRAMS:
        # all programs are on the GPU at once and have registers left for the slots of nearly all tiles
        slots = 4 * power_of_two(math.ceil(product.pairs / product.tiles))
        lora = (_capped(max(32, min(128, slots * max(8, power_of_two(product.rank)))), product), *lora[1:])
    # longer pieces of each row reach memory faster; with LoRA few programs do better side by side, and those with many
    # steps of it, and many programs keep memory busy anyway
    few = product.rank > 0 and programs(block_n) < 3 * MULTIPROCESSORS
    shallow = product.has_runs or few or programs(block_n) >= 2.75 * FEW_PROGRAMS
    block_k = 128 if shallow or block_n > 32 * wide else 256
    return TileConfig(product.rows, block_n, min(block_k, deep), 4, 3, *lora)


def _cut(product: Product, most: float, lowest: int) -> Product:
    """``product`` with tiles of half the rows, down to ``lowest``, while LoRA is more than ``most`` of the product.

    Each slot of a tile is a product over all of its rows, so half as many rows are half the work; but they read the
    base weight once more, so each time twice as much must be to gain. Where LoRA streams, B is what takes the time.
    """
    streams = product.streams and product.has_runs
    while not streams and product.rows > lowest and _share_of_lora(product) > most * 128 / product.rows:
        rows = product.rows // 2
        product = replace(product, rows=rows, tiles=max(product.tiles, product.pairs / rows))
    return product


def _share_of_lora(product: Product) -> float:
    """Columns of LoRA, those of all slots of an average tile together, for each column of the base product."""
    slots = min(product.slots, min(product.rows, product.pairs / product.tiles) / product.run_rows + 1)
    return slots * power_of_two(product.rank) / product.inner if product.rank else 0.0


def down_config(product: Product) -> TileConfig:
    """The tile of the down product."""
    product = _cut(product, 1.0, 32)
    rows, columns, lora = product.rows, product.columns, _lora_steps(product, 64)
    deep = max(16, power_of_two(product.inner))
    if product.itemsize == 4:
        return TileConfig(rows, _columns(columns, 64 if rows < 128 else 32), min(32, deep), 4, 2, lora_columns=16)
    if rows == 16:
        block_n = _columns(columns, 128)
        if product.tiles * -(-columns // block_n) < FEW_PROGRAMS:
            block_n = _columns(columns, 64)
        if block_n > 64 or product.rank > 32:
            # so much of B in registers would leave room for fewer programs side by side
            lora = (min(64, lora[0]), lora[1], False, product.streams and product.rank > 32)
        # longer pieces of long rows, which LoRA needs shared memory and registers beside
        block_k = 256 if block_n <= 64 and product.inner >= (3072 if product.rank else 1792) else 128
        return TileConfig(rows, block_n, min(block_k, deep), 4, 3, *lora)
    if rows == 32:
        block_k = min(128 if product.inner >= 2048 else 64, deep)
        return TileConfig(rows, _columns(columns, 128), block_k, 4, 3, *lora)
    if rows == 64:
        block_n = _columns(columns, 64 if 16 < product.rank <= 32 and not product.streams else 128)
        return TileConfig(rows, block_n, min(64, deep), 4, 3 if product.rank else 4, *lora)
    group = _group_tiles(product.columns * product.inner * product.itemsize)
    if product.inner < 512 or (product.rank and (product.inner < 4096 or product.tiles * columns < 40000)):
        # two programs of a multiprocessor take turns at their ends and at their steps of LoRA; where the sum is long,
        # those are rare, and one program with more on its way is quicker if there are enough of them
        stages = 3 if product.inner < 4096 else 4
        return TileConfig(rows, _columns(columns, 128), min(64, deep), 4, stages, *lora, group_tiles=group)
    return TileConfig(rows, _columns(columns, 256), min(64, deep), 8, 4, *lora, group_tiles=group)


def fitted(config: TileConfig, block_n: int, rank: int, itemsize: int, shared_memory: int) -> TileConfig:
    """``config`` with as many stages as ``shared_memory`` bytes hold; ``block_n``: weight rows of one step."""
    block_k, stages = _held(config.block_m + block_n, config.block_k, config.num_stages, itemsize, shared_memory)
    lora_stage = block_n * max(config.lora_columns, power_of_two(rank)) * itemsize
    lora_stages = max(1, min(config.lora_stages, (shared_memory - EPILOGUE_MEMORY) // lora_stage))
    return replace(config, block_k=block_k, num_stages=stages, lora_stages=lora_stages)


def fitted_shrink(config: LaunchConfig, itemsize: int, shared_memory: int) -> LaunchConfig:
    """``config`` of a shrink of elements of ``itemsize`` bytes, with as many stages as ``shared_memory`` bytes hold."""
    if config.block_m == 1:
        # no shared memory
        return config
    # no tensor cores for fp32: a step of theirs would be as many instructions as it has products
    block_k = min(32, config.block_k) if itemsize == 4 else config.block_k
    rows = config.block_m + config.block_n
    block_k, stages = _held(rows, block_k, config.num_stages, itemsize, shared_memory)
    return replace(config, block_k=block_k, num_stages=stages)


def _held(rows: int, block_k: int, num_stages: int, itemsize: int, shared_memory: int) -> tuple[int, int]:
    """Depth and number of stages of ``rows`` rows each: shallower before there is but one, which hides nothing."""
    room = (shared_memory - EPILOGUE_MEMORY) // (rows * itemsize)
    while num_stages > 1 and block_k > 32 and 2 * block_k > room:
        block_k //= 2
    return block_k, max(1, min(num_stages, room // block_k))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 1 << 20
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _group_tiles(expert_bytes: int) -> int:
    """Tiles of an expert follow each other, and find its weight in L2; where it is larger, they share each block."""
    return 1 if expert_bytes <= KEPT_IN_L2 else 8


def _lora_steps(product: Product, wide_rows: int) -> tuple[int, int, bool, bool]:
    """Columns, stages, preload, streams of LoRA: one slot in a step comes like the base weight, and pays at high ranks.

    Tiles of ``wide_rows`` rows have registers left for wide steps.
    """
    columns, stages, preload = _most_lora_steps(product, wide_rows)
    # the lowest tiles have few slots, which come sooner all at once, as do rows that each are a slot
    streams = product.streams and product.has_runs and product.rows > 16
    return _capped(columns, product), stages, preload, streams


def _capped(columns: int, product: Product) -> int:
    """``columns`` or those of all slots if they are fewer: a tile with runs has at most one run for each slot."""
    slots = power_of_two(product.slots) * max(8, power_of_two(product.rank))
    return min(columns, max(16, slots)) if product.has_runs else columns


def _most_lora_steps(product: Product, wide_rows: int) -> tuple[int, int, bool]:
    # where few pairs share an expert, a tile has few slots
    few = product.rows == 16 and product.pairs < 1.5 * product.tiles
    if product.rank > 64 or (product.rank > 32 and not few):
        return 64, 2, False
    if product.rows > 16:
        return (128 if product.rows == wide_rows else 64), 1, False
    return (32 if few and product.rank <= 16 else 128), 1, True


def streamed_ranks(rank: int) -> int:
    """Ranks of a run that are one step of a product, where runs stream."""
    return min(64, max(16, power_of_two(rank)))


def streamed_runs(config: TileConfig, num_slices: int, rank: int) -> int:
    """Runs whose rank vectors and B are on their way at once: those that fit where the base product has its stages.

    0 where there would be but one, which hides nothing.
    """
    run = num_slices * (config.block_m + config.block_n) * streamed_ranks(rank)
    stage = (config.block_m + num_slices * config.block_n) * config.block_k
    # the compiler holds one stage less of products that no warp group does
    held = 0 if config.block_m >= 64 else 1
    runs = min(5, (config.num_stages - held) * stage // run + held)
    return runs if runs > 1 else 0
