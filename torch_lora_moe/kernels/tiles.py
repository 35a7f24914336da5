"""What both expert products do on a tile of the sorted order: its rows, its weight, and LoRA in its accumulator.

The rows of a tile stand slot by slot. LoRA streams run by run, one run of rows with its matrix in a step (all other
rows zero), or goes in wider steps: a few slots at a time as one product of ``[rows, slots * rank]`` (each row zero
outside its own slot) with their matrices side by side.
"""

import triton
import triton.language as tl

from .common import INTERPRETED


@triton.jit
def load_weight(
    w,
    expert,
    row,
    start,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows ``row`` on and columns ``start`` on of an expert's weight, zero beyond its columns.

    Rows beyond the last one may be those of the next expert: their products are never stored.
    """
    if TMA:
        return w.load([expert * OUT + row, start])
    else:
        n, k = row + tl.arange(0, BLOCK_N), start + tl.arange(0, BLOCK_K)
        pointers = w + expert.to(tl.int64) * STRIDE_E + n.to(tl.int64)[:, None] * STRIDE_N
        pointers += k.to(tl.int64)[None, :] * STRIDE_I
        if OUT % BLOCK_N == 0 and IN % BLOCK_K == 0:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(n < OUT)[:, None] & (k < IN)[None, :], other=0.0)


@triton.jit
def place(COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_TILES: tl.constexpr):
    """The block of columns and the tile of a program.

    Grid (blocks, tiles); or of one dimension, where ``GROUP_TILES`` tiles go side by side through the columns.
    """
    if GROUP_TILES == 1:
        return tl.program_id(0), tl.program_id(1)
    else:
        blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
        program = tl.program_id(0)
        first = program // (GROUP_TILES * blocks) * GROUP_TILES
        size = tl.minimum(tl.num_programs(0) // blocks - first, GROUP_TILES)
        inside = program - first * blocks
        return inside // size, first + inside % size


@triton.jit
def load_tile(schedule, num_pairs, tile):
    """Expert, first sorted row and number of rows of a tile; all -1 for an unused one."""
    entry, stride = schedule + 2 * (num_pairs + 1) + tile, num_pairs + 1
    return tl.load(entry), tl.load(entry + stride), tl.load(entry + 2 * stride)


@triton.jit
def part_of_tile(start, count, tile, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """First row and number of rows of one of ``PARTS`` parts of ``BLOCK_M`` rows that a tile is cut into."""
    if PARTS == 1:
        return start, count
    else:
        skipped = tile % PARTS * BLOCK_M
        return start + skipped, tl.minimum(count - skipped, BLOCK_M)


@triton.jit
def slots_of_tile(schedule, start, count, num_pairs, HAS_RUNS: tl.constexpr):
    """First and last (exclusive) number of the slots of a tile: of its runs, or without runs of its rows."""
    # rows without LoRA come first: if the last one is such, all are
    adapted = tl.load(schedule + num_pairs + start + count) >= 0
    if HAS_RUNS:
        run_ids = schedule + 8 * (num_pairs + 1) + start
        first, last = tl.load(run_ids), tl.load(run_ids + count - 1)
        return first, tl.where(adapted, last + 1, first)
    else:
        return 0, tl.where(adapted, count, 0)


@triton.jit
def runs_of_rows(schedule, start, count, num_pairs, HAS_RUNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The run of each row of a tile, -1 for one without LoRA; without runs each row is one, by its number."""
    local, stride = tl.arange(0, BLOCK_M), num_pairs + 1
    there = local < count
    adapted = tl.load(schedule + stride + start + local, mask=there, other=-1) >= 0
    runs = tl.load(schedule + 8 * stride + start + local, mask=there, other=-1) if HAS_RUNS else local
    return tl.where(adapted, runs, -1)


@triton.jit
def matrix_of_run(schedule, start, run, end, num_pairs, num_experts, HAS_RUNS: tl.constexpr, SHARED: tl.constexpr):
    """The index of the matrix of a run, or of a row, from `runs_of_rows`; any from ``end`` on."""
    stride = num_pairs + 1
    entry = schedule + (5 * stride if HAS_RUNS else stride + start) + run
    virtual = tl.load(entry, mask=run < end, other=0)
    return tl.where(virtual >= 0, virtual // num_experts, -1) if SHARED else virtual


@triton.jit
def not_all_finite(values, there):
    """Whether a value of the rows that are ``there`` is NaN or infinite: all others times zero are zero."""
    return tl.sum(tl.where(there, tl.sum(values * 0.0, 1), 0.0), 0) != 0.0


@triton.jit
def take_slots(
    slot,
    end,
    schedule,
    start,
    num_pairs,
    num_experts,
    HAS_RUNS: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The ``GROUPS`` slots from number ``slot`` on: which rows are theirs, and their matrices' indices, -1 for none.

    One slot comes as a scalar and a vector of rows, so that what it addresses can be copied without passing through
    registers; more come as ``[GROUPS]`` and ``[rows, GROUPS]``.
    """
    stride = num_pairs + 1
    if GROUPS == 1:
        index, local = slot, tl.arange(0, BLOCK_M)
    else:
        index, local = (slot + tl.arange(0, GROUPS))[None, :], tl.arange(0, BLOCK_M)[:, None]
    if HAS_RUNS:
        entry = schedule + 5 * stride + index
        ids = tl.load(entry, mask=index < end, other=-1)
        first = tl.load(entry + stride, mask=index < end, other=0) - start
        rows = tl.load(entry + 2 * stride, mask=index < end, other=0)
        mine = (local >= first) & (local < first + rows)
    else:
        # every row counts as a slot of its own: where there are no runs, few rows of a tile share one
        ids = tl.load(schedule + stride + start + index, mask=index < end, other=-1)
        mine = (local == index) & (ids >= 0)
    return mine, tl.where(ids >= 0, ids // num_experts, -1) if SHARED else ids


@triton.jit
def _finite(values):
    """NaN and infinities as the largest numbers: rows of other slots meet a matrix with zeros, and 0 * NaN is NaN."""
    if INTERPRETED or values.dtype == tl.float32:
        limits: tl.constexpr = (65504.0, 3.3895313892515355e38, 3.4028234663852886e38)
        most: tl.constexpr = limits[0 if values.dtype == tl.float16 else 1 if values.dtype == tl.bfloat16 else 2]
        return tl.where(tl.abs(values) <= most, values, most)
    elif values.dtype == tl.bfloat16:
        # two at a time, as they stand in a register; of a number and NaN these take the number
        return tl.inline_asm_elementwise(
            "{.reg .b32 m; mov.b32 m, 0x7F7F7F7F; min.bf16x2 $0, $1, m; mov.b32 m, 0xFF7FFF7F; max.bf16x2 $0, $0, m;}",
            "=r,r",
            [values],
            dtype=values.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b32 m; mov.b32 m, 0x7BFF7BFF; min.f16x2 $0, $1, m; mov.b32 m, 0xFBFFFBFF; max.f16x2 $0, $0, m;}",
            "=r,r",
            [values],
            dtype=values.dtype,
            is_pure=True,
            pack=2,
        )


@triton.jit
def load_b(
    b,
    matrix,
    n,
    start,
    PART: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The slots' parts of B, for `join_b`: up to there nothing waits for them."""
    r = start + tl.arange(0, BLOCK_R)
    rows = b + (matrix.to(tl.int64) * NUM_SLICES + PART) * (SLICE * RANK)
    if GROUPS == 1:
        mask = (n < SLICE)[:, None] & (r < RANK)[None, :] & (matrix >= 0)
        return tl.load(rows + n[:, None] * RANK + r[None, :], mask=mask, other=0.0)
    else:
        mask = (n < SLICE)[:, None, None] & (matrix >= 0)[:, :, None] & (r < RANK)[None, None, :]
        return tl.load(rows[:, :, None] + n[:, None, None] * RANK + r[None, None, :], mask=mask, other=0.0)


@triton.jit
def join_b(values, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The slots' parts of B side by side, finite: ``[columns, slots * ranks]``."""
    return _finite(tl.reshape(values, [values.shape[0], GROUPS * BLOCK_R]))


@triton.jit
def load_shrunk(
    shrunk,
    b,
    pairs,
    mine,
    start,
    num_pairs,
    PART: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    RANK: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rank vectors ``[rows, slots * ranks]`` in B's dtype, each row zero outside its own slot; planes add in order."""
    r = start + tl.arange(0, BLOCK_R)
    rows = shrunk + (pairs.to(tl.int64) * NUM_SLICES + PART) * RANK
    if GROUPS == 1:
        source, mask = rows[:, None] + r[None, :], mine[:, None] & (r < RANK)[None, :]
    else:
        source, mask = rows[:, None, None] + r[None, None, :], mine[:, :, None] & (r < RANK)[None, None, :]
    if NUM_PLANES == 1:
        s = tl.load(source, mask=mask, other=0.0)
    else:
        s = tl.zeros(mask.shape, tl.float32)
        # a loop, from the first one on: planes side by side would take the registers of the base product
        for plane in tl.range(0, NUM_PLANES, num_stages=1, loop_unroll_factor=1):
            s += tl.load(source + plane * tl.cast(num_pairs, tl.int64) * (NUM_SLICES * RANK), mask=mask, other=0.0)
    return tl.reshape(s.to(b.dtype.element_ty), [pairs.shape[0], GROUPS * BLOCK_R])
