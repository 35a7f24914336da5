"""How the products of few tokens, pair by pair, are cut: weights that stream past vectors.

Measured on an H200 in shapes from 256 to 14,336 columns; ``benchmarks/results`` has the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_lora_moe.config import MULTIPROCESSORS, power_of_two

# Registers of a multiprocessor, of 32 bits.
REGISTERS = 65536
# Rows of gate_up's result, over all pairs, up to which larger programs are quicker.
FEW_ROWS = 2560


@dataclass(frozen=True)
class VectorConfig:
    """How weights stream past a vector: ``block_n`` rows by ``block_k`` columns, ``unroll`` such steps at once."""

    block_n: int
    block_k: int
    unroll: int
    num_warps: int


def vector_config(rows: int, inner: int, rank: int, rows_contiguous: bool, itemsize: int, down_of: int) -> VectorConfig:
    """The configuration of a product of weights and a vector of ``inner`` elements, with LoRA of ``rank`` (0: none).

    ``rows``: of gate_up's result, over all pairs. ``down_of``: as many experts of a token have their products added up,
    which is unrolled; 0: gate_up.
    """
    deep = max(16, power_of_two(inner))
    if not rows_contiguous:
        # neighbours in memory are rows: many of them at once
        return VectorConfig(64, min(32, deep), 2, 4)
    if down_of:
        return _down_vector_config(inner, deep, rank, down_of)
    # few programs are larger ones; else many small ones, with two steps of a long row in each turn beside LoRA
    steps = -(-inner // 512)
    if rows <= FEW_ROWS:
        return VectorConfig(16 // itemsize, min(512, deep), min(2, steps), 4)
    if rank == 0:
        return VectorConfig(4 // itemsize, min(1024, deep), 1, 1)
    return VectorConfig(4 // itemsize, min(512, deep), steps if steps <= 4 else 2, 1)


def _down_vector_config(inner: int, deep: int, rank: int, top_k: int) -> VectorConfig:
    if inner > 2048:
        return VectorConfig(4, 512, 2, 2)
    if inner > 768 and top_k > 2:
        # all of an expert's rows at once
        rows = 2 if rank <= 32 else 4
        return VectorConfig(rows, 512, 4, rows)
    block_k = min(256, deep)
    steps = -(-inner // block_k)
    # in turns of at most four
    return VectorConfig(4, block_k, -(-steps // -(-steps // 4)), 2)


def preloaded_pairs(config: VectorConfig, inner: int, rank: int, itemsize: int, top_k: int, num_programs: int) -> int:
    """Pairs of a token whose weights each program of a down product fetches before their input is there.

    What is fetched early stays in registers, beside LoRA's own. Where all programs can be on the GPU at once, only so
    many pairs that they are: else the last programs run alone.
    """
    threads = 32 * config.num_warps
    step = max(1, config.block_n * config.block_k * itemsize // (4 * threads))
    room = 32 if rank > 64 else 96 if rank or config.block_k > 256 else 192
    most = min(top_k, max(1, room // (config.unroll * step)))
    steps = min(config.unroll, -(-inner // config.block_k))
    # addresses and sums, a step's own, and B of the token's pairs
    others = 44 + 4 * config.unroll + power_of_two(top_k) * config.block_n * rank * itemsize // (4 * threads)
    for pairs in range(most, 0, -1):
        registers = -(-(others + pairs * steps * step) // 8) * 8
        if num_programs <= MULTIPROCESSORS * min(32, REGISTERS // (threads * registers)):
            return pairs
    return most


def joined_shrink_blocks(
    config: VectorConfig, num_pairs: int, inner: int, rank: int, itemsize: int, top_k: int, num_programs: int
) -> tuple[int, int]:
    """Rows of A and columns that a program takes at once which makes rank vectors for the others of its launch.

    The others, ``num_programs`` of them, wait for it. So where there would be few of its kind, or rows are long, it
    takes fewer rows, unless so many programs more would leave others without weights fetched early.
    """

    def pairs(rows: int) -> int:
        programs = num_programs + num_pairs * -(-rank // rows)
        return preloaded_pairs(config, inner, rank, itemsize, top_k, programs)

    rows = 1
    while rows < min(4, rank) and (pairs(rows) < pairs(4) or (inner <= 4096 and num_pairs * rank >= 64 * rows)):
        rows *= 2
    return rows, min(2048, 4096 // rows, max(16, power_of_two(inner)))
