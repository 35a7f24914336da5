"""How the products of few tokens, pair by pair, are cut: weights that stream past vectors.

Measured on an H200 in shapes from 256 to 14,336 columns; ``benchmarks/results`` has the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch_lora_moe.config import MULTIPROCESSORS, power_of_two

# Registers of a multiprocessor, of 32 bits.
REGISTERS = 65536
# Programs that a multiprocessor holds in any case at most.
MOST_PROGRAMS = 32
# The part of gate_up's columns that the first of its launches with LoRA takes at most.
MOST_FIRST = 5 / 8
# Rows of gate_up's result, over all pairs, up to which those of at most 1024 columns are a program each.
FEW_ROWS = 2560
# Programs of a row each, all of it at once or in turns, that a multiprocessor has; and how many times as many leave a
# second round of so few that the GPU is mostly idle in it.
ROW_PROGRAMS, TURN_PROGRAMS, SHORT_ROUND = 28, 15, 1.4
# Registers of a thread, down to which all programs of a down product are held on the GPU at once; what weights fetched
# early make of them at most; and those that a compiler keeps to without being told.
LEAST_REGISTERS, HELD_REGISTERS, FREE_REGISTERS = 96, 216, 200
# Programs of two rows of down's result that a multiprocessor has at once, and of four rows without a loss.
SMALL_PROGRAMS, LARGE_PROGRAMS = 10, 8
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
    if itemsize > 2:
        return VectorConfig(1, min(512, deep), _steps(inner), 1) if rank else VectorConfig(1, min(1024, deep), 1, 1)
    if inner <= 1024:
        return _short_rows_config(rows, inner, rank, deep)
    return _config_beside_lora(rows, inner) if rank else _plain_config(rows, inner)


def _steps(inner: int) -> int:
    """Steps of 512 columns at once: those of a whole row, or two of a long one."""
    steps = -(-inner // 512)
    return steps if steps <= 4 else 2


def _short_rows_config(rows: int, inner: int, rank: int, deep: int) -> VectorConfig:
    """Of rows of at most 1024 elements."""
    if rows <= FEW_ROWS and inner > 512:
        return VectorConfig(1, 1024, 1, 1)
    # two rows are as many bytes
    if rows <= FEW_ROWS or rank == 0:
        return VectorConfig(2, deep, 1, 1)
    return VectorConfig(2, min(512, deep), _steps(inner), 1)


def _config_beside_lora(rows: int, inner: int) -> VectorConfig:
    """Of longer rows, one for each program where a round of them is not nearly empty."""
    # rows to a multiprocessor; the bounds on them are where measured times cross
    each = rows / MULTIPROCESSORS
    if inner <= 2048:
        return VectorConfig(1, 2048, 1, 1)
    if inner <= 4096:
        return VectorConfig(1, 1024, 4, 1)
    if each <= TURN_PROGRAMS or (each > 20 and _fills_turns(inner, 2048)):
        return VectorConfig(1, 1024, 2, 1)
    return VectorConfig(2, 1024, 1, 1) if each <= 20 else VectorConfig(2, 512, 2, 1)


def _plain_config(rows: int, inner: int) -> VectorConfig:
    """Of longer rows without LoRA: few are a program each; of many two share one, in turns that they nearly fill."""
    # rows to a multiprocessor, as for LoRA
    each = rows / MULTIPROCESSORS
    two, many = VectorConfig(2, 1024, 1, 1), each > ROW_PROGRAMS
    if inner <= 2048:
        share = many and (_fills_turns(inner, 1024) or _end_in_a_short_round(each))
        return two if share else VectorConfig(1, 2048, 1, 1)
    if inner <= 4096:
        if _fills_turns(inner, 2048):
            return VectorConfig(1, 2048, 1, 1) if each <= 8 else VectorConfig(2, 2048, 1, 4)
        return two if many and _fills_turns(inner, 1024) else VectorConfig(1, 1024, 4, 1)
    if each <= 8:
        return VectorConfig(1, 4096, 1, 2)
    return VectorConfig(1, 2048, 1, 1) if each <= 16 or (each > 22 and _fills_turns(inner, 2048)) else two


def _end_in_a_short_round(each: float) -> bool:
    """Whether of so many programs of a row for each multiprocessor only few are left for a second round."""
    return 1 < each / ROW_PROGRAMS <= SHORT_ROUND


def _fills_turns(inner: int, columns: int) -> bool:
    """Whether turns of so many columns are nearly full."""
    return columns * -(-inner // columns) <= 1.15 * inner


def down_vector_config(
    rows: int, inner: int, rank: int, rows_contiguous: bool, top_k: int, num_pairs: int
) -> VectorConfig:
    """As `gate_up_vector_config`, of down's product of rows of ``inner`` elements, of which those of a token's
    ``top_k`` experts are added up; ``rows``: of its result, over all tokens, which have ``num_pairs`` pairs.
    """
    deep = max(16, power_of_two(inner))
    if not rows_contiguous:
        return _columns_config(deep)
    if inner > 2048:
        # beside LoRA of many experts larger programs
        return VectorConfig(8, 256, 4, 4) if rank and top_k > 4 else VectorConfig(4, 512, 2, 2)
    if inner > 768 and top_k > 2:
        # all of an expert's rows at once
        each = 2 if rank <= 32 else 4
        return VectorConfig(each, 512, 4, each)
    block_k = min(256, deep)
    steps = -(-inner // block_k)
    # in turns of at most four, five as three and two
    large = VectorConfig(4, block_k, 3 if steps == 5 else min(4, steps), 2)
    if rank < 64 or steps <= 2:
        return large
    # beside much of B smaller programs that are on the GPU at once have more of their weights on their way; as they do
    # in turns, where larger ones would be there at once with hardly a register for weights
    there = rows // 2 + MOST_SHRINKERS <= SMALL_PROGRAMS * MULTIPROCESSORS
    programs = rows // 4 + num_pairs * -(-rank // _shrink_rows(large, rows // 4, num_pairs, rank, top_k))
    tight = top_k > 4 and LARGE_PROGRAMS * MULTIPROCESSORS < programs <= SMALL_PROGRAMS * MULTIPROCESSORS
    return replace(large, block_n=2) if there or tight else large


@dataclass(frozen=True)
class GateUpPrograms:
    """How gate_up's product goes, in two launches with LoRA, in the second of them alone without.

    ``shrink``: what a program of the first takes of A, of gate's rows and of up's. ``first``: columns of the activation
    whose sums the first launch makes, ``sums``: how; ``rest``: how the second makes the others. ``finish_rows``: of the
    first columns, those that a program of the second completes.
    """

    shrink: VectorConfig
    first: int
    sums: VectorConfig
    rest: VectorConfig
    finish_rows: int


def gate_up_programs(
    num_pairs: int, columns: int, inner: int, rank: int, slices: int, rows_contiguous: bool, itemsize: int
) -> GateUpPrograms:
    """For the activations of ``num_pairs`` pairs, ``columns`` each, from vectors of ``inner`` elements; ``rank`` 0: no
    LoRA.

    The first launch gets as many programs as the GPU holds at once, if that leaves enough for the second: those take
    their places as they end, and have weights on their way when the last of the first has ended.
    """
    rest = gate_up_vector_config(num_pairs * columns, inner, rank, rows_contiguous, itemsize)
    sums = rest
    if rows_contiguous and itemsize == 2 and inner > 1024:
        # rows in turns, where these are full and rank vectors leave room for them
        turns = inner > 2048 or (rank <= 32 and _fills_turns(inner, 1024))
        sums = VectorConfig(2, 1024, 1, 1) if turns else rest
    shrink = _gate_up_shrink(inner, itemsize, sums.num_warps)
    room = MULTIPROCESSORS * _at_once(sums, slices, itemsize) - num_pairs * -(-rank // shrink.block_n)
    first = min(max(0, room) // num_pairs * sums.block_n, int(MOST_FIRST * columns))
    multiple = max(8, sums.block_n)
    first = first // multiple * multiple if rank else 0
    # more at once would take shared memory, with which the second launch was slower
    return GateUpPrograms(shrink, first, sums, rest, 8 if rank <= 64 else 4)


def _gate_up_shrink(inner: int, itemsize: int, num_warps: int) -> VectorConfig:
    """A row for each warp, at once if it is not too long."""
    block_k = min(max(16, power_of_two(inner)), (4096 if inner <= 2048 else 2048) // itemsize)
    steps = -(-inner // block_k)
    return VectorConfig(num_warps, block_k, steps if steps <= 4 else 2, num_warps)


def _at_once(config: VectorConfig, slices: int, itemsize: int) -> int:
    """Programs of the bare sums that a multiprocessor holds."""
    # beside weights: addresses and sums, for several rows the next turn's too
    registers = slices * config.unroll * _step_registers(config, itemsize) + (8 if config.block_n == 1 else 64)
    return min(MOST_PROGRAMS, max(1, REGISTERS // (32 * config.num_warps * registers)))


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
    rows = _shrink_rows(config, num_programs, num_pairs, rank, top_k)
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


def _shrink_rows(config: VectorConfig, num_programs: int, num_pairs: int, rank: int, top_k: int) -> int:
    """Rows of A that a program takes which makes rank vectors: the fewest with which every multiprocessor has as many
    programs as the next, if they do not take it long beside ``config``'s products of ``top_k`` pairs.
    """
    room, most = -num_programs % MULTIPROCESSORS, min(16, power_of_two(top_k + 1))

    def fewest(programs: int) -> int:
        rows = 1
        while rows < most and num_pairs * -(-rank // rows) > programs:
            rows *= 2
        return rows

    even = fewest(room)
    spread = num_pairs * -(-rank // even) <= room and even <= 4 * config.block_n
    return even if spread else fewest(MOST_SHRINKERS)


def _columns(rows: int, inner: int) -> int:
    """Columns of A that a program takes at once with ``rows`` of it."""
    return min(2048, 4096 // rows, max(16, power_of_two(inner)))


def _registers(config: VectorConfig, inner: int, rank: int, itemsize: int, top_k: int) -> tuple[int, int]:
    """Registers of a thread for addresses, sums, a step's own and B of the token's pairs, and for each pair fetched."""
    # sums and addresses of fewer rows take fewer
    own = 44 if config.block_n * config.block_k > 512 else 28
    others = (
        own + 4 * config.unroll + power_of_two(top_k) * config.block_n * rank * itemsize // (128 * config.num_warps)
    )
    return others, min(config.unroll, -(-inner // config.block_k)) * _step_registers(config, itemsize)


def _step_registers(config: VectorConfig, itemsize: int) -> int:
    """Registers of a thread for the weights of a step."""
    return max(1, config.block_n * config.block_k * itemsize // (128 * config.num_warps))


def _preloaded(config: VectorConfig, inner: int, rank: int, itemsize: int, top_k: int, num_programs: int) -> int:
    """Pairs fetched early where programs take turns anyway, or without LoRA."""
    others, each = _registers(config, inner, rank, itemsize, top_k)
    threads = 32 * config.num_warps
    room = 32 if rank > 64 else 96 if rank or config.block_k > 256 else 192
    if rank and config.block_n == 2 and config.block_k <= 256:
        # many small programs side by side need less of it each
        room = 48
    most = min(top_k, max(1, room // (config.unroll * _step_registers(config, itemsize))))
    for pairs in range(most, 0, -1):
        registers = -(-(others + pairs * each) // 8) * 8
        if num_programs <= MULTIPROCESSORS * min(32, REGISTERS // (threads * registers)):
            return pairs
    return most
