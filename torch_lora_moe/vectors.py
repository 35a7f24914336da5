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
# Programs of a row each, all of it at once or in turns, that a multiprocessor has; and how far beyond those of all of
# them is a second round of so few that the GPU is mostly idle in it.
ROW_PROGRAMS, TURN_PROGRAMS, SHORT_ROUND = 28, 15, 1.4
# Registers of a thread, down to which all programs of a down product are held on the GPU at once; what weights fetched
# early make of them at most; and those that a compiler keeps to without being told.
LEAST_REGISTERS, HELD_REGISTERS, FREE_REGISTERS = 96, 216, 200
# Programs for rank vectors where they cannot be spread evenly: two on each multiprocessor.
MOST_SHRINKERS = 2 * MULTIPROCESSORS


@dataclass(frozen=True)
class VectorConfig:
    """How weights stream past a vector: ``block_n`` rows by ``block_k`` columns, ``unroll`` such steps at once."""

    block_n: int
    block_k: int
    unroll: int
    num_warps: int


def gate_up_vector_config(rows: int, inner: int, rank: int, rows_contiguous: bool, itemsize: int) -> VectorConfig:
    """The configuration of gate_up's product of weights and vectors of ``inner`` elements, with LoRA of ``rank`` (0:
    none); ``rows``: of its result, over all pairs.
    """
    deep = max(16, power_of_two(inner))
    if not rows_contiguous:
        return _columns_config(deep)
    if rank and itemsize == 2 and _goes_row_by_row(rows, inner):
        return VectorConfig(1, 2048, 1, 1)
    # few programs are larger ones; else many small ones, with two steps of a long row in each turn beside LoRA
    steps = -(-inner // 512)
    if rows <= FEW_ROWS:
        return VectorConfig(16 // itemsize, min(512, deep), min(2, steps), 4)
    if rank == 0:
        return VectorConfig(4 // itemsize, min(1024, deep), 1, 1)
    return VectorConfig(4 // itemsize, min(512, deep), steps if steps <= 4 else 2, 1)


def _goes_row_by_row(rows: int, inner: int) -> bool:
    """Whether LoRA's gate_up is quicker with a row for each program: at once, or in turns that are nearly full."""
    turns = -(-inner // 2048)
    if turns == 1:
        rounds = rows / (MULTIPROCESSORS * ROW_PROGRAMS)
        return inner > 1024 and not 1 < rounds <= SHORT_ROUND
    return 2048 * turns <= 1.15 * inner and rows > SHORT_ROUND * MULTIPROCESSORS * TURN_PROGRAMS


def down_vector_config(inner: int, rank: int, rows_contiguous: bool, top_k: int) -> VectorConfig:
    """As `gate_up_vector_config`, of down's product of rows of ``inner`` elements, of which those of a token's
    ``top_k`` experts are added up.
    """
    deep = max(16, power_of_two(inner))
    if not rows_contiguous:
        return _columns_config(deep)
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


def _columns_config(deep: int) -> VectorConfig:
    """Neighbours in memory are rows: many of them at once."""
    return VectorConfig(64, min(32, deep), 2, 4)


@dataclass(frozen=True)
class DownPrograms:
    """How the programs of a down product share their work.

    ``shrink_rows`` and ``shrink_columns``: what a program takes of A at once that makes rank vectors for the others.
    ``preloaded``: pairs of a token whose weights each of the others fetches before their input is there.
    ``registers``: the most that a thread may have for all programs to be on the GPU at once; None: as many as it takes.
    """

    shrink_rows: int
    shrink_columns: int
    preloaded: int
    registers: int | None


def down_programs(
    config: VectorConfig, num_programs: int, num_pairs: int, inner: int, rank: int, itemsize: int, top_k: int
) -> DownPrograms:
    """For ``num_programs`` programs that multiply.

    What is fetched early stays in registers, beside LoRA's own. Where all programs can be on the GPU at once, only so
    much that they are: else the last ones run alone.
    """
    rows = _shrink_rows(num_programs, num_pairs, rank, top_k)
    total = num_programs + num_pairs * -(-rank // rows)
    registers = min(255, REGISTERS // (32 * config.num_warps * -(-total // MULTIPROCESSORS)) // 8 * 8)
    if rank == 0 or registers < LEAST_REGISTERS:
        return _programs_in_turns(config, num_programs, num_pairs, inner, rank, itemsize, top_k)
    others, each = _registers(config, inner, rank, itemsize, top_k)
    pairs = max(1, min(top_k, (min(registers, HELD_REGISTERS) - others) // each))
    # only where the compiler might take more
    bound = registers < FREE_REGISTERS and others + (pairs + 1) * each > registers
    return DownPrograms(rows, _columns(rows, inner), pairs, registers if bound else None)


def _programs_in_turns(
    config: VectorConfig, num_programs: int, num_pairs: int, inner: int, rank: int, itemsize: int, top_k: int
) -> DownPrograms:
    """As `down_programs`, of so many that they are not on the GPU at once, or without LoRA."""

    def pairs(rows: int) -> int:
        programs = num_programs + num_pairs * -(-rank // rows)
        return _preloaded(config, inner, rank, itemsize, top_k, programs)

    rows = 1
    while rows < min(4, rank) and (pairs(rows) < pairs(4) or (inner <= 4096 and num_pairs * rank >= 64 * rows)):
        rows *= 2
    return DownPrograms(rows, _columns(rows, inner), pairs(rows), None)


def _shrink_rows(num_programs: int, num_pairs: int, rank: int, top_k: int) -> int:
    """Rows of A that a program takes which makes rank vectors: the fewest with which every multiprocessor has as many
    programs as the next, if they do not take it long beside the products of ``top_k`` pairs.
    """
    room, most = -num_programs % MULTIPROCESSORS, min(16, power_of_two(top_k + 1))

    def fewest(programs: int) -> int:
        rows = 1
        while rows < most and num_pairs * -(-rank // rows) > programs:
            rows *= 2
        return rows

    even = fewest(room)
    return even if num_pairs * -(-rank // even) <= room else fewest(MOST_SHRINKERS)


def _columns(rows: int, inner: int) -> int:
    """Columns of A that a program takes at once with ``rows`` of it."""
    return min(2048, 4096 // rows, max(16, power_of_two(inner)))


def _registers(config: VectorConfig, inner: int, rank: int, itemsize: int, top_k: int) -> tuple[int, int]:
    """Registers of a thread for addresses, sums, a step's own and B of the token's pairs, and for each pair fetched."""
    others = 44 + 4 * config.unroll + power_of_two(top_k) * config.block_n * rank * itemsize // (128 * config.num_warps)
    return others, min(config.unroll, -(-inner // config.block_k)) * _step_registers(config, itemsize)


def _step_registers(config: VectorConfig, itemsize: int) -> int:
    """Registers of a thread for the weights of a step."""
    return max(1, config.block_n * config.block_k * itemsize // (128 * config.num_warps))


def _preloaded(config: VectorConfig, inner: int, rank: int, itemsize: int, top_k: int, num_programs: int) -> int:
    """Pairs fetched early where programs take turns anyway, or without LoRA."""
    others, each = _registers(config, inner, rank, itemsize, top_k)
    threads = 32 * config.num_warps
    room = 32 if rank > 64 else 96 if rank or config.block_k > 256 else 192
    most = min(top_k, max(1, room // (config.unroll * _step_registers(config, itemsize))))
    for pairs in range(most, 0, -1):
        registers = -(-(others + pairs * each) // 8) * 8
        if num_programs <= MULTIPROCESSORS * min(32, REGISTERS // (threads * registers)):
            return pairs
    return most
