"""Expand: ``output[p] += weight * B[v] @ s[p]`` in place, for the pairs that LoRA does not skip.

The planes of a split-K shrink are added here, in their own order. As with the shrink, few pairs take one program each
(`expand_pairs`) and many go in blocks of the sorted order (`expand_rows`).
"""

import triton
import triton.language as tl

from .common import prefetch, release_consumer, virtual_ids, wait_for_producer


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
def expand_rows(
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
    """Grid (blocks of sorted pairs, blocks of each slice of the output columns)."""
    block = tl.program_id(0) * BLOCK_M
    blocks: tl.constexpr = (SLICE + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(1) // blocks
    within = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = within < SLICE
    n = part * SLICE + within
    size: tl.constexpr = NUM_SLICES * SLICE * RANK
    local = tl.arange(0, BLOCK_M)
    wait_for_producer(PDL)
    release_consumer(PDL)
    pairs = tl.load(schedule + block + local, mask=block + local < num_pairs, other=-1)
    virtual = tl.load(schedule + num_pairs + 1 + block + local, mask=block + local < num_pairs, other=-1)
    row = tl.min(tl.where(virtual >= 0, local, BLOCK_M), 0)
    if row < BLOCK_M:
        token, k = (pairs // top_k).to(tl.int64), (pairs % top_k).to(tl.int64)
        target = output + (token * STRIDE_M + k * STRIDE_K)[:, None] + n.to(tl.int64)[None, :] * STRIDE_N
        mask = (virtual >= 0)[:, None] & inside[None, :]
        before = tl.load(target, mask=mask, other=0.0)
        s_rows = shrunk + (pairs.to(tl.int64)[:, None] * NUM_SLICES + part) * RANK
        plane_size = num_pairs.to(tl.int64) * NUM_SLICES * RANK
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        while row < BLOCK_M:
            group = tl.load(schedule + num_pairs + 1 + block + row)
            members = virtual == group
            weight = (group // num_experts if SHARED else group).to(tl.int64)
            for start in tl.static_range(0, RANK, BLOCK_R):
                ranks = start + tl.arange(0, BLOCK_R)
                s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
                for plane in range(num_planes):
                    source = s_rows + plane * plane_size + ranks[None, :]
                    s += tl.load(source, mask=members[:, None] & (ranks < RANK)[None, :], other=0.0)
                pointers = b + weight * size + n[:, None] * RANK + ranks[None, :]
                right = tl.load(pointers, mask=inside[:, None] & (ranks < RANK)[None, :], other=0.0)
                acc = tl.dot(s.to(right.dtype), right.T, acc, input_precision="ieee")
            row = tl.min(tl.where((virtual >= 0) & (local > row) & (~members), local, BLOCK_M), 0)
        if HAS_WEIGHTS:
            scores = tl.load(topk_weights + pairs, mask=virtual >= 0, other=0.0).to(tl.float32)
            acc *= scores[:, None]
        tl.store(target, (before.to(tl.float32) + acc).to(output.dtype.element_ty), mask=mask)
