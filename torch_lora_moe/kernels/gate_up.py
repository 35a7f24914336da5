"""The first expert product over the tiles of the sorted order: base, bias, LoRA B and the activation in one pass.

The whole base product runs before the kernel waits for the rank vectors of the shrink before it.
"""

import triton
import triton.language as tl

from .activation import activate
from .common import INTERPRETED, fma, release_consumer, wait_for_producer
from .tiles import (
    join_b,
    load_b,
    load_shrunk,
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
def _moved(values):
    """A copy in other registers.

    Where later products add to the halves of one accumulator, ptxas lets no product of the kernel run beside another
    (its warning C7511).
    """
    if INTERPRETED:
        return values
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=1)


@triton.jit
def _gate_up_tile(
    x,
    w,
    bias,
    out,
    schedule,
    shrunk,
    b,
    b_matrix,
    block,
    expert,
    start,
    count,
    num_pairs,
    pairs_per_row,
    num_experts,
    swiglu_alpha,
    swiglu_limit,
    STRIDE_X: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_I: tl.constexpr,
    IN: tl.constexpr,
    SLICE: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    JOINT: tl.constexpr,
    EARLY: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``BLOCK_N`` columns of the activation of one tile.

    Returns whether they are to be computed again without ``STREAM``: not all is finite, and where that is B, it met
    rows of other adapters.
    """
    local = tl.arange(0, BLOCK_M)
    there = local < count
    # runs and their first matrix are loaded before the base product where registers are left for that
    EARLY_RUNS: tl.constexpr = STREAM > 0 and BLOCK_M < 128
    again = tl.full([], False, tl.int1)
    pairs = tl.load(schedule + start + local, mask=there, other=0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    slices: tl.constexpr = 2 if IS_GATED else 1
    x_rows = x + (pairs // pairs_per_row).to(tl.int64)[:, None] * STRIDE_X
    out_size: tl.constexpr = slices * SLICE

    if RANK > 0:
        begin, end = slots_of_tile(schedule, start, count, num_pairs, HAS_RUNS)
        if EARLY_RUNS:
            runs = runs_of_rows(schedule, start, count, num_pairs, HAS_RUNS, BLOCK_M)
            matrix = matrix_of_run(schedule, start, begin, end, num_pairs, num_experts, HAS_RUNS, SHARED)
        if PRELOAD:
            own, matrix = take_slots(
                begin, end, schedule, start, num_pairs, num_experts, HAS_RUNS, SHARED, GROUPS, BLOCK_M
            )
            early_gate_b = load_b(b, matrix, n, 0, 0, slices, SLICE, RANK, GROUPS, BLOCK_R)
            if IS_GATED:
                early_up_b = load_b(b, matrix, n, 0, 1, slices, SLICE, RANK, GROUPS, BLOCK_R)

    # gate and up of the columns are one product, of columns next to each other where the rows are interleaved
    both: tl.constexpr = INTERLEAVED or JOINT
    wide: tl.constexpr = 2 * BLOCK_N if both else BLOCK_N
    row = block * (2 * BLOCK_N if INTERLEAVED else BLOCK_N)
    acc = tl.zeros([BLOCK_M, wide], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, IN, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = there[:, None] & (k < IN)[None, :] if IN % BLOCK_K != 0 else there[:, None]
        left = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
        if JOINT:
            right = tl.reshape(w.load([expert * 2, row, first]), [wide, BLOCK_K])
        else:
            right = load_weight(w, expert, row, first, out_size, IN, STRIDE_E, STRIDE_N, STRIDE_I, wide, BLOCK_K, TMA)
        acc = fma(acc, left, right, there)
        if IS_GATED and not both:
            right = load_weight(
                w, expert, SLICE + row, first, out_size, IN, STRIDE_E, STRIDE_N, STRIDE_I, BLOCK_N, BLOCK_K, TMA
            )
            up = fma(up, left, right, there)
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
    elif JOINT:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N]), (0, 2, 1)))
        gate, up = _moved(gate), _moved(up)
    else:
        gate = acc
    if HAS_BIAS:
        bias_row, step = bias + expert * out_size, 2 if INTERLEAVED else 1
        gate += tl.load(bias_row + n * step, mask=n < SLICE, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            skipped: tl.constexpr = 1 if INTERLEAVED else SLICE
            up += tl.load(bias_row + skipped + n * step, mask=n < SLICE, other=0.0).to(tl.float32)[None, :]

    if EARLY or SPLIT:
        wait_for_producer(PDL)
    if SPLIT:
        release_consumer(PDL)
    if RANK > 0:
        if PRELOAD:
            s = load_shrunk(shrunk, b, pairs, own, 0, num_pairs, 0, slices, RANK, NUM_PLANES, GROUPS, BLOCK_R)
            if IS_GATED:
                up_s = load_shrunk(shrunk, b, pairs, own, 0, num_pairs, 1, slices, RANK, NUM_PLANES, GROUPS, BLOCK_R)
                up = fma(up, up_s, join_b(early_up_b, GROUPS, BLOCK_R), there)
            gate = fma(gate, s, join_b(early_gate_b, GROUPS, BLOCK_R), there)
            begin += GROUPS
        if STREAM:
            parts: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
            if begin < end:
                if not EARLY_RUNS:
                    runs = runs_of_rows(schedule, start, count, num_pairs, HAS_RUNS, BLOCK_M)
                    matrix = matrix_of_run(schedule, start, begin, end, num_pairs, num_experts, HAS_RUNS, SHARED)
                r = tl.arange(0, BLOCK_R)
                rows = shrunk + pairs.to(tl.int64)[:, None] * (slices * RANK) + r[None, :]
                for step in tl.range(begin * parts, end * parts, num_stages=STREAM):
                    run, part = step // parts, step % parts * BLOCK_R
                    b_row = matrix * out_size + block * BLOCK_N
                    matrix = matrix_of_run(
                        schedule, start, (step + 1) // parts, end, num_pairs, num_experts, HAS_RUNS, SHARED
                    )
                    mine = (runs == run)[:, None]
                    if RANK % BLOCK_R != 0:
                        mine = mine & (part + r < RANK)[None, :]
                    if IS_GATED:
                        up_s = tl.load(rows + part + RANK, mask=mine, other=0.0)
                        up = fma(up, up_s, b_matrix.load([b_row + SLICE, part]), there)
                    s = tl.load(rows + part, mask=mine, other=0.0)
                    gate = fma(gate, s, b_matrix.load([b_row, part]), there)
                again = not_all_finite(gate + up, there)
        else:
            for slot in tl.range(begin, end, GROUPS, num_stages=LORA_STAGES):
                mine, matrix = take_slots(
                    slot, end, schedule, start, num_pairs, num_experts, HAS_RUNS, SHARED, GROUPS, BLOCK_M
                )
                for r in tl.static_range(0, RANK, BLOCK_R):
                    s = load_shrunk(shrunk, b, pairs, mine, r, num_pairs, 0, slices, RANK, NUM_PLANES, GROUPS, BLOCK_R)
                    gate_b = load_b(b, matrix, n, r, 0, slices, SLICE, RANK, GROUPS, BLOCK_R)
                    if IS_GATED:
                        up_s = load_shrunk(
                            shrunk, b, pairs, mine, r, num_pairs, 1, slices, RANK, NUM_PLANES, GROUPS, BLOCK_R
                        )
                        up_b = load_b(b, matrix, n, r, 1, slices, SLICE, RANK, GROUPS, BLOCK_R)
                        up = fma(up, up_s, join_b(up_b, GROUPS, BLOCK_R), there)
                    gate = fma(gate, s, join_b(gate_b, GROUPS, BLOCK_R), there)
    value = activate(gate, up, swiglu_alpha, swiglu_limit, IS_GATED, ACTIVATION)
    out_rows = start + local if IN_ORDER else pairs
    target = out + out_rows.to(tl.int64)[:, None] * SLICE + n[None, :]
    mask = there[:, None] if SLICE % BLOCK_N == 0 else there[:, None] & (n < SLICE)[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)
    return again


@triton.jit(
    do_not_specialize=[
        "num_pairs",
        "pairs_per_row",
        "num_experts",
        "swiglu_alpha",
        "swiglu_limit",
        "first_tile",
        "waits_from",
    ],
    do_not_specialize_on_alignment=["schedule"],
)
def gate_up_tiles(
    x,
    w,
    bias,
    out,
    shrunk,
    b,
    schedule,
    b_matrix,
    num_pairs,
    pairs_per_row,
    num_experts,
    swiglu_alpha,
    swiglu_limit,
    first_tile,
    waits_from,
    STRIDE_X: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_I: tl.constexpr,
    IN: tl.constexpr,
    SLICE: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    JOINT: tl.constexpr,
    EARLY: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for each block of columns of each tile: ``out[p] = act(w[e] @ x + bias + B[v] @ s[p])``.

    ``RANK`` 0: no LoRA. ``PARTS`` programs share the rows of a tile. ``HALVES``: what has at most half of its rows is
    computed as such. ``HAS_RUNS``: the schedule has runs. ``IN_ORDER``: the rows of ``out`` stand in the sorted order.
    ``PRELOAD``: B of the first step of LoRA is loaded before the base product. ``STREAM``: LoRA goes run by run, so
    many of them on their way at once, B through the descriptor ``b_matrix``.
    ``JOINT``: ``w`` is a descriptor of three dimensions that brings gate and up of a block of columns at once.
    ``EARLY``: the kernel before is the shrink, so all but ``shrunk`` is complete from the start.
    ``SPLIT``: the tiles go in two launches, this one takes those from ``first_tile`` on. ``waits_from`` is -1 in the
    first; in the second, whose programs start beside the last ones of the first, those of its tiles from ``waits_from``
    on wait for it before all else, the others behind their base product. None lets the kernel after it start before it
    has waited, so that for that kernel the first launch is complete.
    """
    block, tile = place(SLICE, BLOCK_N, GROUP_TILES)
    if SPLIT and waits_from >= 0:
        if tile >= waits_from:
            wait_for_producer(PDL)
            release_consumer(PDL)
    else:
        if not EARLY:
            wait_for_producer(PDL)
        release_consumer(PDL)
    is_first = tile == 0
    if SPLIT:
        tile += first_tile
    # as `load_tile`, but here: of what a called function loads to find where to store, ahead-of-time compilation cannot
    # tell that it is only read
    entry, stride = schedule + 2 * (num_pairs + 1) + tile // PARTS, num_pairs + 1
    expert, start, count = tl.load(entry), tl.load(entry + stride), tl.load(entry + 2 * stride)
    start, count = part_of_tile(start, count, tile, PARTS, BLOCK_M)
    # all three in the condition, so that none of them is loaded after the others
    if (expert >= 0) & (start >= 0) & (count > 0):
        if HALVES and count <= BLOCK_M // 2:
            again = _gate_up_tile(
                x,
                w,
                bias,
                out,
                schedule,
                shrunk,
                b,
                b_matrix,
                block,
                expert,
                start,
                count,
                num_pairs,
                pairs_per_row,
                num_experts,
                swiglu_alpha,
                swiglu_limit,
                STRIDE_X,
                STRIDE_E,
                STRIDE_N,
                STRIDE_I,
                IN,
                SLICE,
                IS_GATED,
                INTERLEAVED,
                ACTIVATION,
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
                JOINT,
                EARLY,
                SPLIT,
                PDL,
            )
        else:
            again = _gate_up_tile(
                x,
                w,
                bias,
                out,
                schedule,
                shrunk,
                b,
                b_matrix,
                block,
                expert,
                start,
                count,
                num_pairs,
                pairs_per_row,
                num_experts,
                swiglu_alpha,
                swiglu_limit,
                STRIDE_X,
                STRIDE_E,
                STRIDE_N,
                STRIDE_I,
                IN,
                SLICE,
                IS_GATED,
                INTERLEAVED,
                ACTIVATION,
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
                JOINT,
                EARLY,
                SPLIT,
                PDL,
            )
        if STREAM and again:
            # in low steps: what is hardly ever done must not need more registers
            rows: tl.constexpr = BLOCK_M // 2 if HALVES else BLOCK_M
            tl.debug_barrier()
            for skipped in range(0, count, rows):
                _gate_up_tile(
                    x,
                    w,
                    bias,
                    out,
                    schedule,
                    shrunk,
                    b,
                    b_matrix,
                    block,
                    expert,
                    start + skipped,
                    tl.minimum(count - skipped, rows),
                    num_pairs,
                    pairs_per_row,
                    num_experts,
                    swiglu_alpha,
                    swiglu_limit,
                    STRIDE_X,
                    STRIDE_E,
                    STRIDE_N,
                    STRIDE_I,
                    IN,
                    SLICE,
                    IS_GATED,
                    INTERLEAVED,
                    ACTIVATION,
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
                    JOINT,
                    EARLY,
                    SPLIT,
                    PDL,
                )
    # those of the first tile in any case, so that the end of this kernel means the end of the one before
    if (EARLY or SPLIT) and is_first:
        wait_for_producer(PDL)
