"""The second expert product over the tiles of the sorted order, with LoRA B and the router weight, and the sum."""

import triton
import triton.language as tl

from .common import fma, known_experts, release_consumer, wait_for_producer
from .tiles import (
    join_b,
    load_b,
    load_shrunk,
    load_tile,
    load_weight,
    matrix_of_run,
    not_all_finite,
    part_of_tile,
    place,
    runs_of_rows,
    slots_of_tile,
    take_slots,
)


@triton.jit
def _down_tile(
    h,
    h_matrix,
    w,
    bias,
    out,
    schedule,
    topk_weights,
    shrunk,
    b,
    b_matrix,
    block,
    expert,
    start,
    count,
    num_pairs,
    num_experts,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_I: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    IN_ORDER: tl.constexpr,
    PRELOAD: tl.constexpr,
    STREAM: tl.constexpr,
    LORA_STAGES: tl.constexpr,
    TMA: tl.constexpr,
    H_TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``BLOCK_N`` columns of the weighted output of one tile; returns what `_gate_up_tile` does."""
    local = tl.arange(0, BLOCK_M)
    there = local < count
    # runs and their first matrix are loaded before the base product where registers are left for that
    EARLY_RUNS: tl.constexpr = STREAM > 0 and BLOCK_M < 128
    again = tl.full([], False, tl.int1)
    pairs = tl.load(schedule + start + local, mask=there, other=0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(topk_weights + pairs, mask=there, other=0.0).to(tl.float32)
    if RANK > 0:
        begin, end = slots_of_tile(schedule, start, count, num_pairs, HAS_RUNS)
        if EARLY_RUNS:
            runs = runs_of_rows(schedule, start, count, num_pairs, HAS_RUNS, BLOCK_M)
            matrix = matrix_of_run(schedule, start, begin, end, num_pairs, num_experts, HAS_RUNS, SHARED)
        if PRELOAD:
            own, matrix = take_slots(
                begin, end, schedule, start, num_pairs, num_experts, HAS_RUNS, SHARED, GROUPS, BLOCK_M
            )
            early_b = load_b(b, matrix, n, 0, 0, 1, OUT, RANK, GROUPS, BLOCK_R)
    if RANK == 0 and not SPLIT:
        wait_for_producer(PDL)
    h_rows = h + (start + local if IN_ORDER else pairs).to(tl.int64)[:, None] * IN
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, IN, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = there[:, None] & (k < IN)[None, :] if IN % BLOCK_K != 0 else there[:, None]
        # rows beyond the tile's are those of other experts, whose products are never stored
        left = h_matrix.load([start, first]) if H_TMA else tl.load(h_rows + k[None, :], mask=inside, other=0.0)
        right = load_weight(
            w, expert, block * BLOCK_N, first, OUT, IN, STRIDE_E, STRIDE_N, STRIDE_I, BLOCK_N, BLOCK_K, TMA
        )
        acc = fma(acc, left, right, there)
    if HAS_BIAS:
        acc += tl.load(bias + expert * OUT + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    if RANK > 0 or SPLIT:
        wait_for_producer(PDL)
        if SPLIT:
            release_consumer(PDL)
    if RANK > 0:
        if PRELOAD:
            s = load_shrunk(shrunk, b, pairs, own, 0, num_pairs, 0, 1, RANK, NUM_PLANES, GROUPS, BLOCK_R)
            acc = fma(acc, s, join_b(early_b, GROUPS, BLOCK_R), there)
            begin += GROUPS
        if STREAM:
            parts: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
            if begin < end:
                if not EARLY_RUNS:
                    runs = runs_of_rows(schedule, start, count, num_pairs, HAS_RUNS, BLOCK_M)
                    matrix = matrix_of_run(schedule, start, begin, end, num_pairs, num_experts, HAS_RUNS, SHARED)
                r = tl.arange(0, BLOCK_R)
                rows = shrunk + pairs.to(tl.int64)[:, None] * RANK + r[None, :]
                for step in tl.range(begin * parts, end * parts, num_stages=STREAM):
                    run, part = step // parts, step % parts * BLOCK_R
                    b_row = matrix * OUT + block * BLOCK_N
                    matrix = matrix_of_run(
                        schedule, start, (step + 1) // parts, end, num_pairs, num_experts, HAS_RUNS, SHARED
                    )
                    mine = (runs == run)[:, None]
                    if RANK % BLOCK_R != 0:
                        mine = mine & (part + r < RANK)[None, :]
                    acc = fma(acc, tl.load(rows + part, mask=mine, other=0.0), b_matrix.load([b_row, part]), there)
                again = not_all_finite(acc, there)
        else:
            for slot in tl.range(begin, end, GROUPS, num_stages=LORA_STAGES):
                mine, matrix = take_slots(
                    slot, end, schedule, start, num_pairs, num_experts, HAS_RUNS, SHARED, GROUPS, BLOCK_M
                )
                for r in tl.static_range(0, RANK, BLOCK_R):
                    s = load_shrunk(shrunk, b, pairs, mine, r, num_pairs, 0, 1, RANK, NUM_PLANES, GROUPS, BLOCK_R)
                    right = load_b(b, matrix, n, r, 0, 1, OUT, RANK, GROUPS, BLOCK_R)
                    acc = fma(acc, s, join_b(right, GROUPS, BLOCK_R), there)
    target = out + pairs.to(tl.int64)[:, None] * OUT + n[None, :]
    mask = there[:, None] if OUT % BLOCK_N == 0 else there[:, None] & (n < OUT)[None, :]
    tl.store(target, (acc * scale[:, None]).to(out.dtype.element_ty), mask=mask)
    return again


@triton.jit(
    do_not_specialize=["num_pairs", "num_experts", "first_tile", "waits_from"],
    do_not_specialize_on_alignment=["schedule", "topk_weights"],
)
def down_tiles(
    h,
    w,
    bias,
    out,
    shrunk,
    b,
    schedule,
    topk_weights,
    h_matrix,
    b_matrix,
    num_pairs,
    num_experts,
    first_tile,
    waits_from,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_I: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    IN_ORDER: tl.constexpr,
    PRELOAD: tl.constexpr,
    STREAM: tl.constexpr,
    LORA_STAGES: tl.constexpr,
    TMA: tl.constexpr,
    H_TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for each block of columns of each tile: ``out[p] = weight * (w[e] @ h[p] + bias + B[v] @ s[p])``.

    The schedule and the router weights are complete from the start. With LoRA the kernel before is its shrink, so all
    but ``shrunk`` is; without, the kernel waits for ``h``. ``IN_ORDER``: the rows of ``h`` stand in the sorted order;
    ``H_TMA``: full tiles read them through ``h_matrix``. ``SPLIT``: gate_up came in two launches, and this kernel
    starts when the first one is complete. If it goes in one, ``waits_from`` is the first tile that is not; if in two,
    the first has ``waits_from`` as the second of gate_up has, and the second -1: all of ``h`` is complete then. The
    rest as for `gate_up_tiles`.
    """
    block, tile = place(OUT, BLOCK_N, GROUP_TILES)
    if SPLIT and waits_from >= 0:
        if tile >= waits_from:
            wait_for_producer(PDL)
            release_consumer(PDL)
    else:
        release_consumer(PDL)
    is_first = tile == 0
    if SPLIT:
        tile += first_tile
    expert, start, count = load_tile(schedule, num_pairs, tile // PARTS)
    start, count = part_of_tile(start, count, tile, PARTS, BLOCK_M)
    if (expert >= 0) & (start >= 0) & (count > 0):
        if HALVES and count <= BLOCK_M // 2:
            again = _down_tile(
                h,
                h_matrix,
                w,
                bias,
                out,
                schedule,
                topk_weights,
                shrunk,
                b,
                b_matrix,
                block,
                expert,
                start,
                count,
                num_pairs,
                num_experts,
                STRIDE_E,
                STRIDE_N,
                STRIDE_I,
                IN,
                OUT,
                HAS_BIAS,
                RANK,
                NUM_PLANES,
                SHARED,
                GROUPS,
                BLOCK_R,
                BLOCK_M // 2,
                BLOCK_N,
                BLOCK_K,
                HAS_RUNS,
                IN_ORDER,
                PRELOAD,
                STREAM,
                LORA_STAGES,
                TMA,
                False,
                SPLIT,
                PDL,
            )
        else:
            again = _down_tile(
                h,
                h_matrix,
                w,
                bias,
                out,
                schedule,
                topk_weights,
                shrunk,
                b,
                b_matrix,
                block,
                expert,
                start,
                count,
                num_pairs,
                num_experts,
                STRIDE_E,
                STRIDE_N,
                STRIDE_I,
                IN,
                OUT,
                HAS_BIAS,
                RANK,
                NUM_PLANES,
                SHARED,
                GROUPS,
                BLOCK_R,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                HAS_RUNS,
                IN_ORDER,
                PRELOAD,
                STREAM,
                LORA_STAGES,
                TMA,
                H_TMA,
                SPLIT,
                PDL,
            )
        if STREAM and again:
            # in low steps: what is hardly ever done must not need more registers
            rows: tl.constexpr = BLOCK_M // 2 if HALVES else BLOCK_M
            tl.debug_barrier()
            for skipped in range(0, count, rows):
                _down_tile(
                    h,
                    h_matrix,
                    w,
                    bias,
                    out,
                    schedule,
                    topk_weights,
                    shrunk,
                    b,
                    b_matrix,
                    block,
                    expert,
                    start + skipped,
                    tl.minimum(count - skipped, rows),
                    num_pairs,
                    num_experts,
                    STRIDE_E,
                    STRIDE_N,
                    STRIDE_I,
                    IN,
                    OUT,
                    HAS_BIAS,
                    RANK,
                    NUM_PLANES,
                    SHARED,
                    GROUPS,
                    16,
                    rows,
                    BLOCK_N,
                    BLOCK_K,
                    HAS_RUNS,
                    IN_ORDER,
                    PRELOAD,
                    0,
                    LORA_STAGES,
                    TMA,
                    False,
                    SPLIT,
                    PDL,
                )
    elif is_first or not SPLIT:
        wait_for_producer(PDL)


@triton.jit(do_not_specialize=["num_experts"], do_not_specialize_on_alignment=["topk_ids"])
def sum_pairs(
    pairs,
    topk_ids,
    out,
    factor,
    num_experts,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens, blocks of columns): the sum over a token's known experts, in fp32, in order."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_producer(PDL)
    release_consumer(PDL)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        known = known_experts(topk_ids, pair, True, num_experts) < num_experts
        row = pairs + pair.to(tl.int64) * SIZE + column
        # read once: it must not push the next layer's weights out of L2
        acc += tl.load(row, mask=(column < SIZE) & known, other=0.0, eviction_policy="evict_first").to(tl.float32)
    target = out + token.to(tl.int64) * SIZE + column
    tl.store(target, (acc * factor).to(out.dtype.element_ty), mask=column < SIZE)
