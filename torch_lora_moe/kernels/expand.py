"""Expand: ``output[p] += weight * B[v] @ s[p]`` in place, for the pairs that LoRA does not skip.

The planes of a split-K shrink are added here, in their own order. As with the shrink, few pairs take one program each
(`expand_pairs`) and many go by the runs of the sorted order (`expand_runs`).
"""

import triton
import triton.language as tl

from .common import load_run, num_runs, prefetch, release_consumer, virtual_ids, wait_for_producer


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
    BEHIND_SHRINK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of each slice of the output columns); ``BEHIND_SHRINK`` as for `expand_runs`."""
    pair = tl.program_id(0)
    blocks: tl.constexpr = (SLICE + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(1) // blocks
    within = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, RANK_POW2)
    inside = within < SLICE
    n = part * SLICE + within
    size: tl.constexpr = NUM_SLICES * SLICE * RANK
    if PDL and not BEHIND_SHRINK:
        early = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
        if early >= 0:
            weight = (early // num_experts if SHARED else early).to(tl.int64)
            prefetch(b + weight * size + tl.where(inside, n, 0) * RANK)
    if not BEHIND_SHRINK:
        wait_for_producer(PDL)
        release_consumer(PDL)
    virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
    if virtual >= 0:
        weight = (virtual // num_experts if SHARED else virtual).to(tl.int64)
        pointers = b + weight * size + n[:, None] * RANK + ranks[None, :]
        values = tl.load(pointers, mask=inside[:, None] & (ranks < RANK)[None, :], other=0.0).to(tl.float32)
        token, k = (pair // top_k).to(tl.int64), (pair % top_k).to(tl.int64)
        target = output + token * STRIDE_M + k * STRIDE_K + n.to(tl.int64) * STRIDE_N
        before = tl.load(target, mask=inside).to(tl.float32)
        if HAS_WEIGHTS:
            scale = tl.load(topk_weights + pair).to(tl.float32)
        if BEHIND_SHRINK:
            wait_for_producer(PDL)
            release_consumer(PDL)
        s = tl.zeros([RANK_POW2], tl.float32)
        for plane in range(num_planes):
            source = shrunk + ((plane * num_pairs + pair).to(tl.int64) * NUM_SLICES + part) * RANK + ranks
            s += tl.load(source, mask=ranks < RANK, other=0.0)
        delta = tl.sum(values * s[None, :], 1)
        if HAS_WEIGHTS:
            delta *= scale
        tl.store(target, (before + delta).to(output.dtype.element_ty), mask=inside)
    # a program without an adapter waits too, so that the end of this kernel means the end of the one before
    if BEHIND_SHRINK:
        wait_for_producer(PDL)


@triton.jit
def _load_b(b_rows, ranks, n_inside, RANK: tl.constexpr):
    """A tile ``[columns, ranks]`` of B."""
    return tl.load(b_rows + ranks[None, :], mask=n_inside[:, None] & (ranks < RANK)[None, :], other=0.0)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "num_experts"],
    do_not_specialize_on_alignment=["schedule", "topk_weights"],
)
def expand_runs(
    output,
    shrunk,
    b,
    schedule,
    topk_weights,
    num_pairs,
    top_k,
    num_experts,
    STRIDE_M: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    RANK: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BEHIND_SHRINK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (runs, blocks of each slice of the output columns); the programs take turns where there are more runs.

    Nothing waits for anything it does not need: B, the output and the rank vectors are all on their way at once. With
    ``BEHIND_SHRINK`` the kernel before is the shrink that makes ``shrunk``; it let this one start after its own wait,
    so all else that is read here is complete. With ``EVEN_ROWS`` the pairs of all tokens are ``STRIDE_K`` apart.
    """
    blocks: tl.constexpr = (SLICE + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(1) // blocks
    within = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = within < SLICE
    columns = (part * SLICE + within).to(tl.int64) * STRIDE_N
    local = tl.arange(0, BLOCK_M)
    plane_size = tl.cast(num_pairs, tl.int64) * (NUM_SLICES * RANK)
    if not BEHIND_SHRINK:
        wait_for_producer(PDL)
        release_consumer(PDL)
    run, used = tl.program_id(0), num_runs(schedule, num_pairs)
    while run < used:
        virtual, first, count = load_run(schedule, num_pairs, run)
        weight = (virtual // num_experts if SHARED else virtual).to(tl.int64)
        b_rows = b + (weight * NUM_SLICES + part) * (SLICE * RANK) + within[:, None] * RANK
        if RANK <= BLOCK_R:
            right = _load_b(b_rows, tl.arange(0, BLOCK_R), inside, RANK)
        # no loads ahead of their turn: those of the first turn would be of rank vectors that nobody has waited for
        for piece in tl.range(0, count, BLOCK_M, num_stages=1):
            there = piece + local < count
            pairs = tl.load(schedule + first + piece + local, mask=there, other=0)
            rows = pairs.to(tl.int64)
            if EVEN_ROWS:
                target = output + (rows * STRIDE_K)[:, None] + columns[None, :]
            else:
                target = output + (rows // top_k * STRIDE_M + rows % top_k * STRIDE_K)[:, None] + columns[None, :]
            mask = there[:, None] & inside[None, :]
            # output passes through once: it must not push the matrices out of L2
            before = tl.load(target, mask=mask, other=0.0, eviction_policy="evict_first")
            if HAS_WEIGHTS:
                scale = tl.load(topk_weights + pairs, mask=there, other=0.0).to(tl.float32)
            if BEHIND_SHRINK:
                wait_for_producer(PDL)
                release_consumer(PDL)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in tl.static_range(0, RANK, BLOCK_R):
                ranks = start + tl.arange(0, BLOCK_R)
                source = shrunk + (rows * NUM_SLICES + part)[:, None] * RANK + ranks[None, :]
                s_mask = there[:, None] & (ranks < RANK)[None, :]
                s = tl.load(source, mask=s_mask, other=0.0)
                for plane in tl.static_range(1, NUM_PLANES):
                    s += tl.load(source + plane * plane_size, mask=s_mask, other=0.0)
                if RANK > BLOCK_R:
                    right = _load_b(b_rows, ranks, inside, RANK)
                acc = tl.dot(s.to(right.dtype), right.T, acc, input_precision="ieee")
            if HAS_WEIGHTS:
                acc *= scale[:, None]
            value = (before.to(tl.float32) + acc).to(output.dtype.element_ty)
            tl.store(target, value, mask=mask, eviction_policy="evict_first")
        run += tl.num_programs(0)
    # a program without a run waits too, so that the end of this kernel means the end of the one before
    if BEHIND_SHRINK:
        wait_for_producer(PDL)
