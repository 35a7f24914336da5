"""down of few tokens: weights stream past the activations of a token's pairs, whose results are added up.

The rank vectors of LoRA are made by the first programs of the same launch, while the others stream the base weight.
"""

import triton
import triton.language as tl

from .common import known_experts, load_row, release_consumer, virtual_ids, wait_for_count, wait_for_producer
from .matvec import counter, loads_first, products


@triton.jit
def _shrink_for_others(
    h,
    a,
    shrunk,
    topk_ids,
    mapping,
    enabled,
    program,
    num_pairs,
    num_experts,
    max_loras,
    IN: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    RANK: tl.constexpr,
    SHARED_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    """``BLOCK_R`` entries of a pair's rank vector, whose first columns of A are there before ``h`` is; then counts
    itself as done.
    """
    blocks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    pair, rows = program // blocks, program % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, TOP_K, num_experts, max_loras, HAS_ENABLED)
    which = tl.where(virtual >= 0, virtual // num_experts if SHARED_A else virtual, 0).to(tl.int64)
    a_rows = a + which * (RANK * IN) + rows[:, None] * IN
    known = (rows < RANK) & (virtual >= 0)
    i = tl.arange(0, BLOCK_I)
    values = tl.load(a_rows + i[None, :], mask=known[:, None] & (i < IN)[None, :], other=0.0)
    wait_for_producer(PDL)
    if virtual >= 0:
        h_row = h + pair.to(tl.int64) * IN
        acc = values.to(tl.float32) * load_row(h_row, i, i < IN, BLOCK_R)
        for start in range(BLOCK_I, IN, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            values = tl.load(a_rows + i[None, :], mask=known[:, None] & (i < IN)[None, :], other=0.0)
            acc += values.to(tl.float32) * load_row(h_row, i, i < IN, BLOCK_R)
        tl.store(shrunk + pair * RANK + rows, tl.sum(acc, 1).to(shrunk.dtype.element_ty), mask=rows < RANK)
        # all of the program's stores come before its count
        tl.debug_barrier()
    tl.atomic_add(counter(shrunk, num_pairs, RANK), 1, sem="release")


@triton.jit
def _load_weight(rows, start, here, IN: tl.constexpr, STRIDE_I: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns ``start`` on of the rows that are ``here``."""
    i = start + tl.arange(0, BLOCK_K)
    mask = here[:, None] & (i < IN)[None, :]
    return tl.load(rows + i.to(tl.int64)[None, :] * STRIDE_I, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["num_pairs", "num_experts", "max_loras"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled", "topk_weights"],
)
def down_tokens(
    h,
    w,
    bias,
    out,
    shrunk,
    b,
    a,
    topk_ids,
    mapping,
    enabled,
    topk_weights,
    num_pairs,
    num_experts,
    max_loras,
    factor,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_I: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TOP_K: tl.constexpr,
    K_POW2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    PRELOAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs for ``BLOCK_R`` entries of a pair's rank vector each, then one for each block of columns of each token:
    ``out[t] = factor * sum_k weight * (w[e] @ h[p] + bias + B[v] @ s[p])``.

    The first ``UNROLL`` steps of ``PRELOAD`` pairs' weights are fetched before the kernel waits for ``h``.
    """
    release_consumer(PDL)
    program = tl.program_id(0)
    shrinkers = num_pairs * ((RANK + BLOCK_R - 1) // BLOCK_R)
    if RANK > 0 and program < shrinkers:
        _shrink_for_others(
            h,
            a,
            shrunk,
            topk_ids,
            mapping,
            enabled,
            program,
            num_pairs,
            num_experts,
            max_loras,
            IN,
            TOP_K,
            HAS_ENABLED,
            RANK,
            SHARED_A,
            BLOCK_R,
            BLOCK_I,
            PDL,
        )
    else:
        blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
        token = (program - shrinkers) // blocks
        n = (program - shrinkers) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < OUT
        experts = ()
        weights = ()
        first = ()
        for k in tl.static_range(TOP_K):
            experts += (known_experts(topk_ids, token * TOP_K + k, True, num_experts),)
            weights += (tl.load(topk_weights + token * TOP_K + k).to(tl.float32),)
        for k in tl.static_range(PRELOAD):
            known = experts[k] < num_experts
            rows = w + tl.where(known, experts[k], 0).to(tl.int64) * STRIDE_E + n.to(tl.int64)[:, None] * STRIDE_N
            for inner in tl.static_range(UNROLL):
                first += (_load_weight(rows, inner * BLOCK_K, inside & known, IN, STRIDE_I, BLOCK_K),)
        if RANK > 0:
            mine, ranks = tl.arange(0, K_POW2) < TOP_K, tl.arange(0, RANK_POW2)
            pairs = token * TOP_K + tl.arange(0, K_POW2)
            virtual = virtual_ids(topk_ids, mapping, enabled, pairs, mine, TOP_K, num_experts, max_loras, HAS_ENABLED)
            which = tl.where(virtual >= 0, virtual // num_experts if SHARED else virtual, 0).to(tl.int64)
            there = ((virtual >= 0) & mine)[:, None] & (ranks < RANK)[None, :]
            rows_b = b + which[:, None, None] * (OUT * RANK) + n.to(tl.int64)[None, :, None] * RANK
            matrices = tl.load(rows_b + ranks[None, None, :], mask=there[:, None, :] & inside[None, :, None], other=0.0)
            scales = tl.load(topk_weights + pairs, mask=mine & (virtual >= 0), other=0.0).to(tl.float32)
        wait_for_producer(PDL)
        held: tl.constexpr = 128 // w.dtype.element_ty.primitive_bitwidth if STRIDE_I == 1 else 1
        acc = tl.zeros([BLOCK_N, BLOCK_K // held], tl.float32)
        rest = tl.zeros([BLOCK_N], tl.float32)
        for k in tl.static_range(TOP_K):
            known = experts[k] < num_experts
            here = inside & known
            row = tl.where(known, experts[k], 0).to(tl.int64)
            # the weight of an unknown expert may be anything
            scale = tl.where(known, weights[k], 0.0)
            h_row = h + (token * TOP_K + k).to(tl.int64) * IN
            rows = w + row * STRIDE_E + n.to(tl.int64)[:, None] * STRIDE_N
            if k < PRELOAD:
                for inner in tl.static_range(UNROLL):
                    i = inner * BLOCK_K + tl.arange(0, BLOCK_K)
                    value = load_row(h_row, i, known & (i < IN), BLOCK_N) * scale
                    acc += products(first[k * UNROLL + inner], value, held)
            for outer in range(BLOCK_K * UNROLL if k < PRELOAD else 0, IN, BLOCK_K * UNROLL):
                loaded = ()
                for inner in tl.static_range(UNROLL):
                    loaded += (_load_weight(rows, outer + inner * BLOCK_K, here, IN, STRIDE_I, BLOCK_K),)
                loads_first()
                for inner in tl.static_range(UNROLL):
                    i = outer + inner * BLOCK_K + tl.arange(0, BLOCK_K)
                    value = load_row(h_row, i, known & (i < IN), BLOCK_N) * scale
                    acc += products(loaded[inner], value, held)
            if HAS_BIAS:
                rest += scale * tl.load(bias + row * OUT + n, mask=here, other=0.0).to(tl.float32)
        if RANK > 0:
            wait_for_count(counter(shrunk, num_pairs, RANK), shrinkers, PDL)
            s = tl.load(shrunk + pairs[:, None] * RANK + ranks[None, :], mask=there, other=0.0).to(tl.float32)
            delta = tl.sum(matrices.to(tl.float32) * (s * scales[:, None])[:, None, :], 2)
            rest += tl.sum(delta, 0)
        target = out + token.to(tl.int64) * OUT + n
        tl.store(target, ((tl.sum(acc, 1) + rest) * factor).to(out.dtype.element_ty), mask=inside)
