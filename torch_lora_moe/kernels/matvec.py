"""The layer for one token, where no two pairs share an expert: each program streams rows of weights past a vector.

No sort and no tensor cores: the bytes of the weights are the time, so loads depend on each other as little as they can
and nothing branches around them. The second product sums over the experts of its token.
"""

import triton
import triton.language as tl

from .activation import activate
from .common import known_experts, load_row, release_consumer, virtual_ids, wait_for_producer


@triton.jit
def _rank_vector(
    shrunk,
    pair,
    num_pairs,
    mask,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
    NUM_PLANES: tl.constexpr,
):
    """A slice of a pair's rank vector, the sum of its planes; zero where not ``mask``."""
    ranks = tl.arange(0, RANK_POW2)
    s = tl.zeros([RANK_POW2], tl.float32)
    for plane in tl.static_range(NUM_PLANES):
        source = shrunk + (plane * num_pairs + pair).to(tl.int64) * ROWS + PART * RANK + ranks
        s += tl.load(source, mask=mask & (ranks < RANK), other=0.0)
    return s


@triton.jit
def _matrix(b, n, mask, RANK: tl.constexpr, RANK_POW2: tl.constexpr):
    """Rows ``n`` of a LoRA B in fp32."""
    ranks = tl.arange(0, RANK_POW2)
    pointers = b + n.to(tl.int64)[:, None] * RANK + ranks[None, :]
    return tl.load(pointers, mask=mask[:, None] & (ranks < RANK)[None, :], other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "num_experts", "max_loras", "swiglu_alpha", "swiglu_limit"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled"],
)
def gate_up_pairs(
    x,
    w,
    bias,
    out,
    shrunk,
    b,
    topk_ids,
    mapping,
    enabled,
    num_pairs,
    top_k,
    num_experts,
    max_loras,
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
    HAS_ENABLED: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of columns of the activation): ``out[p] = act(w[e] @ x + bias + B[v] @ s[p])``.

    ``RANK`` 0: no LoRA. ``EARLY``: the kernel before is the shrink, so all but ``shrunk`` is complete from the start.
    ``UNROLL`` steps of ``BLOCK_K`` columns are on their way at once.
    """
    if not EARLY:
        wait_for_producer(PDL)
    release_consumer(PDL)
    pair = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < SLICE
    slices: tl.constexpr = 2 if IS_GATED else 1
    step: tl.constexpr = 2 if INTERLEAVED else 1
    to_up: tl.constexpr = 1 if INTERLEAVED else SLICE
    expert = known_experts(topk_ids, pair, True, num_experts)
    if RANK > 0:
        virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
    known = expert < num_experts
    here = inside & known
    gate_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    x_row = x + (pair // top_k).to(tl.int64) * STRIDE_X
    row = tl.where(known, expert, 0).to(tl.int64)
    rows = w + row * STRIDE_E + (n * step).to(tl.int64)[:, None] * STRIDE_N
    for outer in range(0, IN, BLOCK_K * UNROLL):
        for inner in tl.static_range(UNROLL):
            k = outer + inner * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = here[:, None] & (k < IN)[None, :] if IN % (BLOCK_K * UNROLL) != 0 else here[:, None]
            value = load_row(x_row, k, known & (k < IN), BLOCK_N)
            source = rows + k.to(tl.int64)[None, :] * STRIDE_I
            gate_acc += tl.load(source, mask=mask, other=0.0).to(tl.float32) * value
            if IS_GATED:
                up_acc += tl.load(source + to_up * STRIDE_N, mask=mask, other=0.0).to(tl.float32) * value
    if RANK > 0:
        adapted = virtual >= 0
        which = tl.where(adapted, virtual // num_experts if SHARED else virtual, 0).to(tl.int64)
        rows_b = b + which * (slices * SLICE * RANK)
        gate_b = _matrix(rows_b, n, inside & adapted, RANK, RANK_POW2)
        if IS_GATED:
            up_b = _matrix(rows_b + SLICE * RANK, n, inside & adapted, RANK, RANK_POW2)
    gate, up = tl.sum(gate_acc, 1), tl.sum(up_acc, 1)
    if HAS_BIAS:
        bias_row = bias + row * (slices * SLICE) + n * step
        gate += tl.load(bias_row, mask=here, other=0.0).to(tl.float32)
        if IS_GATED:
            up += tl.load(bias_row + to_up, mask=here, other=0.0).to(tl.float32)
    if EARLY:
        wait_for_producer(PDL)
    if RANK > 0:
        s = _rank_vector(shrunk, pair, num_pairs, adapted, 0, slices * RANK, RANK, RANK_POW2, NUM_PLANES)
        gate += tl.sum(gate_b * s[None, :], 1)
        if IS_GATED:
            s = _rank_vector(shrunk, pair, num_pairs, adapted, 1, slices * RANK, RANK, RANK_POW2, NUM_PLANES)
            up += tl.sum(up_b * s[None, :], 1)
    h = activate(gate, up, swiglu_alpha, swiglu_limit, IS_GATED, ACTIVATION)
    tl.store(out + pair.to(tl.int64) * SLICE + n, h.to(out.dtype.element_ty), mask=here)


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
    HAS_BIAS: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens, blocks of columns): ``out[t] = factor * sum_k weight * (w[e] @ h[p] + bias + B[v] @ s[p])``."""
    release_consumer(PDL)
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < OUT
    wait_for_producer(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    rest = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = known_experts(topk_ids, pair, True, num_experts)
        known = expert < num_experts
        here = inside & known
        row = tl.where(known, expert, 0).to(tl.int64)
        scale = tl.load(topk_weights + pair, mask=known, other=0.0).to(tl.float32)
        rows = w + row * STRIDE_E + n.to(tl.int64)[:, None] * STRIDE_N
        for outer in range(0, IN, BLOCK_K * UNROLL):
            for inner in tl.static_range(UNROLL):
                i = outer + inner * BLOCK_K + tl.arange(0, BLOCK_K)
                mask = here[:, None] & (i < IN)[None, :] if IN % (BLOCK_K * UNROLL) != 0 else here[:, None]
                weight = tl.load(rows + i.to(tl.int64)[None, :] * STRIDE_I, mask=mask, other=0.0).to(tl.float32)
                acc += weight * (load_row(h + pair.to(tl.int64) * IN, i, known & (i < IN), BLOCK_N) * scale)
        if HAS_BIAS:
            rest += scale * tl.load(bias + row * OUT + n, mask=here, other=0.0).to(tl.float32)
        if RANK > 0:
            virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, TOP_K, num_experts, max_loras, HAS_ENABLED)
            adapted = virtual >= 0
            which = tl.where(adapted, virtual // num_experts if SHARED else virtual, 0).to(tl.int64)
            matrix = _matrix(b + which * (OUT * RANK), n, inside & adapted, RANK, RANK_POW2)
            s = _rank_vector(shrunk, pair, num_pairs, adapted, 0, RANK, RANK, RANK_POW2, NUM_PLANES)
            rest += scale * tl.sum(matrix * s[None, :], 1)
    result = (tl.sum(acc, 1) + rest) * factor
    tl.store(out + token.to(tl.int64) * OUT + n, result.to(out.dtype.element_ty), mask=inside)
