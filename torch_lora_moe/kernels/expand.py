"""Expand: ``output[p] += weight * B[v] @ s[p]`` in place, for the pairs that LoRA does not skip.

The planes of a split-K shrink are added here, in their own order. As with the shrink, few pairs take one program each
(`expand_pairs`) and many go in blocks of the sorted order (`expand_blocks`).
"""

import triton
import triton.language as tl

from .common import prefetch, release_consumer, virtual_ids, wait_for_producer


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "num_experts", "max_loras", "num_planes"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled", "topk_weights"],
)
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


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "num_experts", "num_planes"],
    do_not_specialize_on_alignment=["schedule", "topk_weights"],
)
def expand_blocks(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of sorted pairs, blocks of each slice of the output columns).

    The output is asked for first, so that it arrives while the block's virtual experts are multiplied one by one.
    """
    block = tl.program_id(0) * BLOCK_M
    blocks: tl.constexpr = (SLICE + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(1) // blocks
    within = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = within < SLICE
    n = part * SLICE + within
    local = tl.arange(0, BLOCK_M)
    wait_for_producer(PDL)
    release_consumer(PDL)

    there = block + local < num_pairs
    pairs = tl.load(schedule + block + local, mask=there, other=-1)
    virtual = tl.load(schedule + num_pairs + 1 + block + local, mask=there, other=-1)
    adapted = virtual >= 0
    row = tl.min(tl.where(adapted, local, BLOCK_M), 0)
    if row < BLOCK_M:
        token, k = (pairs // top_k).to(tl.int64), (pairs % top_k).to(tl.int64)
        target = output + (token * STRIDE_M + k * STRIDE_K)[:, None] + n.to(tl.int64)[None, :] * STRIDE_N
        mask = adapted[:, None] & inside[None, :]
        # output passes through once: it must not push the matrices out of L2
        before = tl.load(target, mask=mask, other=0.0, eviction_policy="evict_first")
        s_rows = shrunk + (pairs.to(tl.int64)[:, None] * NUM_SLICES + part) * RANK
        plane_size = num_pairs.to(tl.int64) * NUM_SLICES * RANK
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.static_range(0, RANK, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for plane in range(num_planes):
                source = s_rows + plane * plane_size + ranks[None, :]
                s += tl.load(source, mask=adapted[:, None] & (ranks < RANK)[None, :], other=0.0)
            row = tl.min(tl.where(adapted, local, BLOCK_M), 0)
            while row < BLOCK_M:
                group = tl.load(schedule + num_pairs + 1 + block + row)
                members = virtual == group
                weight = (group // num_experts if SHARED else group).to(tl.int64)
                b_rows = b + weight * (NUM_SLICES * SLICE * RANK) + n[:, None] * RANK
                right = tl.load(b_rows + ranks[None, :], mask=inside[:, None] & (ranks < RANK)[None, :], other=0.0)
                left = tl.where(members[:, None], s, 0.0).to(right.dtype)
                acc = tl.dot(left, right.T, acc, input_precision="ieee")
                row = tl.min(tl.where(adapted & (local > row) & (~members), local, BLOCK_M), 0)
        if HAS_WEIGHTS:
            acc *= tl.load(topk_weights + pairs, mask=adapted, other=0.0).to(tl.float32)[:, None]
        value = (before.to(tl.float32) + acc).to(output.dtype.element_ty)
        tl.store(target, value, mask=mask, eviction_policy="evict_first")
