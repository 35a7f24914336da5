"""Expand: ``output[p] += weight * B[v] @ s[p]`` in place, for the pairs that LoRA does not skip.

The planes of a split-K shrink are added here, in their own order. As with the shrink, few pairs take one program each
(`expand_pairs`) and many are sorted into runs of one virtual expert (`expand_runs`).
"""

import triton
import triton.language as tl

from .common import prefetch, release_consumer, run_starts, virtual_ids, wait_for_producer


@triton.jit(do_not_specialize=["num_pairs", "top_k", "num_experts", "max_loras", "num_planes"])
def expand_pairs(
    output,
    shrunk,
    b,
    topk_ids,
    mapping,
    enabled,
    topk_weights,
    num_pairs,
    top_k,
    num_experts,
    max_loras,
    num_planes,
    STRIDE_M: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of each slice of the output columns)."""
    pair = tl.program_id(0)
    blocks: tl.constexpr = (SLICE + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(1) // blocks
    within = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, RANK_POW2)
    inside = within < SLICE
    n = part * SLICE + within
    size: tl.constexpr = NUM_SLICES * SLICE * RANK
    if PDL:
        early = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
        if early >= 0:
            weight = (early // num_experts if SHARED else early).to(tl.int64)
            prefetch(b + weight * size + tl.where(inside, n, 0) * RANK)
    wait_for_producer(PDL)
    release_consumer(PDL)
    virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
    if virtual >= 0:
        weight = (virtual // num_experts if SHARED else virtual).to(tl.int64)
        pointers = b + weight * size + n[:, None] * RANK + ranks[None, :]
        values = tl.load(pointers, mask=inside[:, None] & (ranks < RANK)[None, :], other=0.0).to(tl.float32)
        s = tl.zeros([RANK_POW2], tl.float32)
        for plane in range(num_planes):
            source = shrunk + ((plane * num_pairs + pair).to(tl.int64) * NUM_SLICES + part) * RANK + ranks
            s += tl.load(source, mask=ranks < RANK, other=0.0)
        delta = tl.sum(values * s[None, :], 1)
        if HAS_WEIGHTS:
            delta *= tl.load(topk_weights + pair).to(tl.float32)
        token, k = (pair // top_k).to(tl.int64), (pair % top_k).to(tl.int64)
        target = output + token * STRIDE_M + k * STRIDE_K + n.to(tl.int64) * STRIDE_N
        value = tl.load(target, mask=inside).to(tl.float32) + delta
        tl.store(target, value.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_pairs", "top_k", "num_experts", "num_planes"])
def expand_runs(
    output,
    shrunk,
    b,
    schedule,
    topk_weights,
    num_pairs,
    top_k,
    num_experts,
    num_planes,
    STRIDE_M: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    RANK: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WINDOW: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (windows of sorted pairs x column blocks, columns fastest so that neighbours finish an output row)."""
    blocks: tl.constexpr = (SLICE + BLOCK_N - 1) // BLOCK_N
    window = tl.program_id(0) // (NUM_SLICES * blocks) * WINDOW
    column = tl.program_id(0) % (NUM_SLICES * blocks)
    part = column // blocks
    within = (column % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = within < SLICE
    n = part * SLICE + within
    local = tl.arange(0, WINDOW)
    wait_for_producer(PDL)
    release_consumer(PDL)

    ids = schedule + num_pairs + 1
    plane_size = num_pairs.to(tl.int64) * NUM_SLICES * RANK
    starts = run_starts(ids, window, num_pairs, WINDOW, LONGEST)
    row = tl.min(tl.where(starts, local, WINDOW), 0)
    while row < WINDOW:
        first = window + row
        group = tl.load(ids + first)
        weight = (group // num_experts if SHARED else group).to(tl.int64)
        b_rows = b + weight * (NUM_SLICES * SLICE * RANK) + n[:, None] * RANK
        end = tl.minimum((first // LONGEST + 1) * LONGEST, num_pairs)
        while first < end:
            index = first + tl.arange(0, BLOCK_M)
            members = tl.load(ids + index, mask=index < end, other=-1) == group
            pairs = tl.load(schedule + index, mask=members, other=0)
            token, k = (pairs // top_k).to(tl.int64), (pairs % top_k).to(tl.int64)
            target = output + (token * STRIDE_M + k * STRIDE_K)[:, None] + n.to(tl.int64)[None, :] * STRIDE_N
            mask = members[:, None] & inside[None, :]
            before = tl.load(target, mask=mask, other=0.0)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            s_rows = shrunk + (pairs.to(tl.int64)[:, None] * NUM_SLICES + part) * RANK
            for start in tl.static_range(0, RANK, BLOCK_R):
                ranks = start + tl.arange(0, BLOCK_R)
                right = tl.load(b_rows + ranks[None, :], mask=inside[:, None] & (ranks < RANK)[None, :], other=0.0)
                s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
                for plane in range(num_planes):
                    source = s_rows + plane * plane_size + ranks[None, :]
                    s += tl.load(source, mask=members[:, None] & (ranks < RANK)[None, :], other=0.0)
                acc = tl.dot(s.to(right.dtype), right.T, acc, input_precision="ieee")
            if HAS_WEIGHTS:
                acc *= tl.load(topk_weights + pairs, mask=members, other=0.0).to(tl.float32)[:, None]
            tl.store(target, (before.to(tl.float32) + acc).to(output.dtype.element_ty), mask=mask)
            # a block with other pairs in it is the last of the run
            first = tl.where(tl.sum(members.to(tl.int32), 0) == BLOCK_M, first + BLOCK_M, end)
        row = tl.min(tl.where(starts & (local > row), local, WINDOW), 0)
