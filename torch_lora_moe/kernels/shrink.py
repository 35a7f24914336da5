"""Shrink: rank vectors ``s[p] = A[v] @ x`` of all pairs, in split-K planes of fp32.

Few pairs take one program each and stream their own matrix (`shrink_pairs`, no sort, no tensor cores: the bytes of A
are the time). Many pairs are sorted, so that the pairs of a virtual expert are neighbours: a run, which meets its
matrix in one tensor-core product (`shrink_runs`).
"""

import triton
import triton.language as tl

from .common import release_consumer, run_starts, virtual_ids, wait_for_producer


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "pairs_per_row", "num_experts", "max_loras"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled"],
)
def shrink_pairs(
    x,
    a,
    out,
    topk_ids,
    mapping,
    enabled,
    num_pairs,
    top_k,
    pairs_per_row,
    num_experts,
    max_loras,
    STRIDE_X: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of A's rows, planes)."""
    pair = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    plane = tl.program_id(2)
    columns = plane * CHUNK + tl.arange(0, BLOCK_K)
    wait_for_producer(PDL)
    release_consumer(PDL)
    virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    if virtual >= 0:
        weight = (virtual // num_experts if SHARED else virtual).to(tl.int64)
        a_rows = a + weight * (ROWS * IN) + rows[:, None] * IN
        x_row = x + (pair // pairs_per_row).to(tl.int64) * STRIDE_X
        for start in range(0, CHUNK, BLOCK_K):
            k = start + columns
            inside = k < IN if IN % BLOCK_K != 0 or IN % CHUNK != 0 else tl.full([BLOCK_K], True, tl.int1)
            values = tl.load(a_rows + k[None, :], mask=(rows[:, None] < ROWS) & inside[None, :], other=0.0)
            acc += values.to(tl.float32) * tl.load(x_row + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = out + (plane.to(tl.int64) * num_pairs + pair) * ROWS + rows
    tl.store(target, tl.sum(acc, 1), mask=rows < ROWS)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "pairs_per_row", "num_experts", "max_loras"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled", "schedule"],
)
def shrink_runs(
    x,
    a,
    out,
    topk_ids,
    mapping,
    enabled,
    schedule,
    num_pairs,
    top_k,
    pairs_per_row,
    num_experts,
    max_loras,
    STRIDE_X: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    WINDOW: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (windows of sorted pairs, blocks of A's rows, planes): a program takes the runs that start in its window."""
    window = tl.program_id(0) * WINDOW
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    plane = tl.program_id(2)
    local = tl.arange(0, WINDOW)
    out += plane.to(tl.int64) * num_pairs * ROWS
    wait_for_producer(PDL)
    release_consumer(PDL)

    # pairs that LoRA skips stand anywhere in the order or nowhere: each program clears those of its own numbers
    own, there = window + local, window + local < num_pairs
    skipped = virtual_ids(topk_ids, mapping, enabled, own, there, top_k, num_experts, max_loras, HAS_ENABLED) < 0
    zeros = tl.zeros([WINDOW, BLOCK_R], tl.float32)
    clear = (skipped & there)[:, None] & (rows[None, :] < ROWS)
    tl.store(out + own[:, None].to(tl.int64) * ROWS + rows[None, :], zeros, mask=clear)

    ids = schedule + num_pairs + 1
    columns = plane * CHUNK + tl.arange(0, BLOCK_K)
    starts = run_starts(ids, window, num_pairs, WINDOW, LONGEST)
    row = tl.min(tl.where(starts, local, WINDOW), 0)
    while row < WINDOW:
        first = window + row
        group = tl.load(ids + first)
        weight = (group // num_experts if SHARED else group).to(tl.int64)
        a_rows = a + weight * (ROWS * IN) + rows[:, None] * IN
        end = tl.minimum((first // LONGEST + 1) * LONGEST, num_pairs)
        while first < end:
            index = first + tl.arange(0, BLOCK_M)
            members = tl.load(ids + index, mask=index < end, other=-1) == group
            pairs = tl.load(schedule + index, mask=members, other=0)
            x_rows = x + (pairs // pairs_per_row).to(tl.int64)[:, None] * STRIDE_X
            acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for start in range(0, CHUNK, BLOCK_K):
                k = start + columns
                inside = k < IN if IN % BLOCK_K != 0 or IN % CHUNK != 0 else tl.full([BLOCK_K], True, tl.int1)
                left = tl.load(x_rows + k[None, :], mask=members[:, None] & inside[None, :], other=0.0)
                right = tl.load(a_rows + k[None, :], mask=(rows[:, None] < ROWS) & inside[None, :], other=0.0)
                if x.dtype.element_ty == tl.float32:
                    # a sum of its own for each block: one long chain of additions would lose a digit
                    acc += tl.where(members[:, None], tl.dot(left, right.T, input_precision="ieee"), 0.0)
                else:
                    acc = tl.dot(left, right.T, acc)
            target = out + pairs[:, None].to(tl.int64) * ROWS + rows[None, :]
            tl.store(target, acc, mask=members[:, None] & (rows[None, :] < ROWS))
            # a block with other pairs in it is the last of the run
            first = tl.where(tl.sum(members.to(tl.int32), 0) == BLOCK_M, first + BLOCK_M, end)
        row = tl.min(tl.where(starts & (local > row), local, WINDOW), 0)
