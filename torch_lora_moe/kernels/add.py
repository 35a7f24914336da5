"""Shrink and expand of sorted pairs in one launch: ``output[p] += weight * B[v] @ (A[v] @ x[p])``.

A program takes the runs of one virtual expert that start in its window: it multiplies their inputs by A, keeps the rank
vectors in registers, and walks along the output with B. Each matrix is read about once, the rank vectors never leave
the chip, and the products of one program hide behind the memory traffic of the others.
"""

import triton
import triton.language as tl

from .common import run_starts


@triton.jit
def _add_product(acc, left, right, members):
    """``acc + left @ right.T`` for the members."""
    if left.dtype == tl.float32:
        # a sum of its own for each block: one long chain of additions would lose a digit
        return acc + tl.where(members[:, None], tl.dot(left, right.T, input_precision="ieee"), 0.0)
    return tl.dot(left, right.T, acc)


@triton.jit
def _add_slice(
    s,
    scores,
    output_rows,
    b_rows,
    members,
    PART: tl.constexpr,
    STRIDE_N: tl.constexpr,
    SLICE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds one slice of the output columns."""
    ranks = tl.arange(0, RANK_POW2)
    for start in range(0, SLICE, BLOCK_N):
        within = start + tl.arange(0, BLOCK_N)
        n = PART * SLICE + within
        inside = within < SLICE if SLICE % BLOCK_N != 0 else tl.full([BLOCK_N], True, tl.int1)
        target = output_rows[:, None] + n.to(tl.int64)[None, :] * STRIDE_N
        mask = members[:, None] & inside[None, :]
        # output passes through once: it must not push the matrices out of L2
        before = tl.load(target, mask=mask, other=0.0, eviction_policy="evict_first")
        pointers = b_rows + n[:, None] * RANK + ranks[None, :]
        right = tl.load(pointers, mask=inside[:, None] & (ranks < RANK)[None, :], other=0.0)
        delta = tl.dot(s.to(right.dtype), right.T, input_precision="ieee") * scores[:, None]
        value = (before.to(tl.float32) + delta).to(output_rows.dtype.element_ty)
        tl.store(target, value, mask=mask, eviction_policy="evict_first")


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "pairs_per_row", "num_experts"],
    do_not_specialize_on_alignment=["schedule", "topk_weights"],
)
def add_runs(
    output,
    x,
    a,
    b,
    schedule,
    topk_weights,
    num_pairs,
    top_k,
    pairs_per_row,
    num_experts,
    STRIDE_X: tl.constexpr,
    STRIDE_M: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    IN: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
    A_SHARED: tl.constexpr,
    B_SHARED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WINDOW: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (windows of sorted pairs); one or two slices."""
    window = tl.program_id(0) * WINDOW
    local = tl.arange(0, WINDOW)
    ranks = tl.arange(0, RANK_POW2)
    columns = tl.arange(0, BLOCK_K)
    ids = schedule + num_pairs + 1
    starts = run_starts(ids, window, num_pairs, WINDOW, LONGEST)
    row = tl.min(tl.where(starts, local, WINDOW), 0)
    while row < WINDOW:
        first = window + row
        group = tl.load(ids + first)
        a_rows = a + (group // num_experts if A_SHARED else group).to(tl.int64) * (NUM_SLICES * RANK * IN)
        b_rows = b + (group // num_experts if B_SHARED else group).to(tl.int64) * (NUM_SLICES * SLICE * RANK)
        end = tl.minimum((first // LONGEST + 1) * LONGEST, num_pairs)
        while first < end:
            index = first + tl.arange(0, BLOCK_M)
            members = tl.load(ids + index, mask=index < end, other=-1) == group
            pairs = tl.load(schedule + index, mask=members, other=0)
            x_rows = x + (pairs // pairs_per_row).to(tl.int64)[:, None] * STRIDE_X
            s0 = tl.zeros([BLOCK_M, RANK_POW2], tl.float32)
            s1 = tl.zeros([BLOCK_M, RANK_POW2], tl.float32)
            for start in range(0, IN, BLOCK_K):
                k = start + columns
                inside = k < IN if IN % BLOCK_K != 0 else tl.full([BLOCK_K], True, tl.int1)
                left = tl.load(x_rows + k[None, :], mask=members[:, None] & inside[None, :], other=0.0)
                pointers = a_rows + ranks[:, None] * IN + k[None, :]
                mask = (ranks < RANK)[:, None] & inside[None, :]
                s0 = _add_product(s0, left, tl.load(pointers, mask=mask, other=0.0), members)
                if NUM_SLICES == 2:
                    s1 = _add_product(s1, left, tl.load(pointers + RANK * IN, mask=mask, other=0.0), members)
            scores = tl.full([BLOCK_M], 1.0, tl.float32)
            if HAS_WEIGHTS:
                scores = tl.load(topk_weights + pairs, mask=members, other=0.0).to(tl.float32)
            token, slot = (pairs // top_k).to(tl.int64), (pairs % top_k).to(tl.int64)
            rows = output + token * STRIDE_M + slot * STRIDE_K
            _add_slice(s0, scores, rows, b_rows, members, 0, STRIDE_N, SLICE, RANK, RANK_POW2, BLOCK_N)
            if NUM_SLICES == 2:
                _add_slice(s1, scores, rows, b_rows, members, 1, STRIDE_N, SLICE, RANK, RANK_POW2, BLOCK_N)
            # a block with other pairs in it is the last of the run
            first = tl.where(tl.sum(members.to(tl.int32), 0) == BLOCK_M, first + BLOCK_M, end)
        row = tl.min(tl.where(starts & (local > row), local, WINDOW), 0)
