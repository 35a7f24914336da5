"""gate_up of few tokens, pair by pair, with LoRA in two launches, the first beside the rank vectors.

What a kernel that waits for a shrink would lose until it starts, a first launch streams: it makes the rank vectors and
the bare sums of as many columns as the GPU holds at once. The second one makes the others, and adds LoRA to all.
"""

import triton
import triton.language as tl

from .activation import activate
from .common import known_experts, load_row, release_consumer, virtual_ids, wait_for_producer
from .matvec import counter, row_sums


@triton.jit(
    do_not_specialize=["top_k", "num_experts", "max_loras", "first"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled"],
)
def gate_up_sums(
    x,
    w,
    a,
    sums,
    shrunk,
    topk_ids,
    mapping,
    enabled,
    top_k,
    num_experts,
    max_loras,
    first,
    STRIDE_X: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_I: tl.constexpr,
    IN: tl.constexpr,
    SLICE: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    RANK: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    UNROLL_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of ``BLOCK_R`` ranks, then of the ``first`` columns of the activation): rank vectors
    ``shrunk[p] = A[v] @ x`` of pairs with an adapter, and ``sums[p] = w[e] @ x``, gate's and up's each in one piece.
    """
    wait_for_producer(PDL)
    release_consumer(PDL)
    pair, block = tl.program_id(0), tl.program_id(1)
    slices: tl.constexpr = 2 if IS_GATED else 1
    shrinkers: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    x_row = x + (pair // top_k).to(tl.int64) * STRIDE_X
    if block < shrinkers:
        rank = block * BLOCK_R + tl.arange(0, BLOCK_R)
        virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
        adapted = virtual >= 0
        which = tl.where(adapted, virtual // num_experts if SHARED else virtual, 0).to(tl.int64)
        a_rows = a + which * (slices * RANK * IN) + rank.to(tl.int64)[:, None] * IN
        there = (rank < RANK) & adapted
        gate_s, up_s = row_sums(x_row, a_rows, there, adapted, RANK * IN, IN, 1, IS_GATED, BLOCK_R, BLOCK_I, UNROLL_I)
        s = shrunk + pair * (slices * RANK) + rank
        # rounded as the product would
        tl.store(s, gate_s.to(shrunk.dtype.element_ty), mask=there)
        if IS_GATED:
            tl.store(s + RANK, up_s.to(shrunk.dtype.element_ty), mask=there)
    else:
        n = (block - shrinkers) * BLOCK_N + tl.arange(0, BLOCK_N)
        step: tl.constexpr = 2 if INTERLEAVED else 1
        to_up: tl.constexpr = STRIDE_N if INTERLEAVED else SLICE * STRIDE_N
        expert = known_experts(topk_ids, pair, True, num_experts)
        known = expert < num_experts
        here = (n < first) & known
        rows = w + tl.where(known, expert, 0).to(tl.int64) * STRIDE_E + (n * step).to(tl.int64)[:, None] * STRIDE_N
        gate, up = row_sums(x_row, rows, here, known, to_up, IN, STRIDE_I, IS_GATED, BLOCK_N, BLOCK_K, UNROLL)
        target = sums + pair * (slices * first) + n
        tl.store(target, gate, mask=here)
        if IS_GATED:
            tl.store(target + first, up, mask=here)


@triton.jit
def _matrices(
    b,
    n,
    virtual,
    inside,
    num_experts,
    SLICE: tl.constexpr,
    IS_GATED: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Rows ``n`` of a pair's LoRA B, those of gate and those of up; zero without an adapter."""
    slices: tl.constexpr = 2 if IS_GATED else 1
    which = tl.where(virtual >= 0, virtual // num_experts if SHARED else virtual, 0).to(tl.int64)
    ranks = tl.arange(0, RANK_POW2)
    pointers = b + which * (slices * SLICE * RANK) + n.to(tl.int64)[:, None] * RANK + ranks[None, :]
    mask = (inside & (virtual >= 0))[:, None] & (ranks < RANK)[None, :]
    gate = tl.load(pointers, mask=mask, other=0.0)
    up = tl.load(pointers + SLICE * RANK, mask=mask, other=0.0) if IS_GATED else gate
    return gate, up


@triton.jit
def _add_bias(gate, up, bias, columns, here, to_up, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums with the biases that stand at ``columns``, up's ``to_up`` behind gate's."""
    if HAS_BIAS:
        gate += tl.load(bias + columns, mask=here, other=0.0).to(tl.float32)
        if IS_GATED:
            up += tl.load(bias + columns + to_up, mask=here, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _lora(matrix, s_row, virtual, RANK: tl.constexpr, RANK_POW2: tl.constexpr):
    """Rows of a pair's LoRA B times a slice of its rank vector; zero without an adapter."""
    ranks = tl.arange(0, RANK_POW2)
    s = load_row(s_row, ranks, (virtual >= 0) & (ranks < RANK), matrix.shape[0])
    return tl.sum(matrix.to(tl.float32) * s, 1)


@triton.jit
def _finish(
    gate,
    up,
    gate_b,
    up_b,
    shrunk,
    out,
    pair,
    virtual,
    n,
    here,
    swiglu_alpha,
    swiglu_limit,
    SLICE: tl.constexpr,
    IS_GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    RANK_POW2: tl.constexpr,
):
    """Stores the activation of sums, to which LoRA comes if ``RANK`` is not 0."""
    if RANK > 0:
        s_row = shrunk + pair * (RANK * 2 if IS_GATED else RANK)
        gate += _lora(gate_b, s_row, virtual, RANK, RANK_POW2)
        if IS_GATED:
            up += _lora(up_b, s_row + RANK, virtual, RANK, RANK_POW2)
    h = activate(gate, up, swiglu_alpha, swiglu_limit, IS_GATED, ACTIVATION)
    tl.store(out + pair.to(tl.int64) * SLICE + n, h.to(out.dtype.element_ty), mask=here)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "num_experts", "max_loras", "first", "swiglu_alpha", "swiglu_limit"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled"],
)
def gate_up_pairs(
    x,
    w,
    bias,
    out,
    sums,
    shrunk,
    b,
    next_shrunk,
    topk_ids,
    mapping,
    enabled,
    num_pairs,
    top_k,
    num_experts,
    max_loras,
    first,
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
    SHARED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    NEXT_RANK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of ``BLOCK_F`` of the first columns of the activation, then of ``BLOCK_N`` of the others):
    ``out[p] = act(w[e] @ x + bias + B[v] @ s[p])``.

    ``RANK`` 0: no LoRA, and no launch before that has made ``sums`` of the ``first`` columns. ``NEXT_RANK``: that of
    the next kernel's LoRA (0: none), which counts behind its rank vectors ``next_shrunk`` from the zero that this one
    leaves there.
    """
    # with LoRA the kernel before is `gate_up_sums`: all but what that makes is complete from the start
    if RANK == 0:
        wait_for_producer(PDL)
    release_consumer(PDL)
    if NEXT_RANK > 0 and (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(counter(next_shrunk, num_pairs, NEXT_RANK), 0)
    pair, block = tl.program_id(0), tl.program_id(1)
    slices: tl.constexpr = 2 if IS_GATED else 1
    step: tl.constexpr = 2 if INTERLEAVED else 1
    to_up: tl.constexpr = 1 if INTERLEAVED else SLICE
    finishers = (first + BLOCK_F - 1) // BLOCK_F
    expert = known_experts(topk_ids, pair, True, num_experts)
    known = expert < num_experts
    row = tl.where(known, expert, 0).to(tl.int64)
    # without LoRA it stands for nothing, as do rows of B below
    virtual = expert
    if RANK > 0:
        virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
    if RANK > 0 and block < finishers:
        m = block * BLOCK_F + tl.arange(0, BLOCK_F)
        there = (m < first) & known
        b_gate, b_up = _matrices(b, m, virtual, m < first, num_experts, SLICE, IS_GATED, RANK, RANK_POW2, SHARED)
        zeros = tl.zeros([BLOCK_F], tl.float32)
        f_gate, f_up = _add_bias(
            zeros, zeros, bias, row * (slices * SLICE) + m * step, there, to_up, IS_GATED, HAS_BIAS
        )
        wait_for_producer(PDL)
        source = sums + pair * (slices * first) + m
        f_gate += tl.load(source, mask=there, other=0.0)
        if IS_GATED:
            f_up += tl.load(source + first, mask=there, other=0.0)
        _finish(
            f_gate,
            f_up,
            b_gate,
            b_up,
            shrunk,
            out,
            pair,
            virtual,
            m,
            there,
            swiglu_alpha,
            swiglu_limit,
            SLICE,
            IS_GATED,
            ACTIVATION,
            RANK,
            RANK_POW2,
        )
    else:
        n = (block - finishers) * BLOCK_N + tl.arange(0, BLOCK_N)
        if RANK > 0:
            n += first
        here = (n < SLICE) & known
        x_row = x + (pair // top_k).to(tl.int64) * STRIDE_X
        rows = w + row * STRIDE_E + (n * step).to(tl.int64)[:, None] * STRIDE_N
        # behind a loop, B would hold up the end
        b_first: tl.constexpr = RANK > 0 and RANK <= 64 and IN > BLOCK_K * UNROLL
        gate_b, up_b = n, n
        if b_first:
            gate_b, up_b = _matrices(b, n, virtual, n < SLICE, num_experts, SLICE, IS_GATED, RANK, RANK_POW2, SHARED)
        gate, up = row_sums(
            x_row, rows, here, known, to_up * STRIDE_N, IN, STRIDE_I, IS_GATED, BLOCK_N, BLOCK_K, UNROLL
        )
        if RANK > 0 and not b_first:
            gate_b, up_b = _matrices(b, n, virtual, n < SLICE, num_experts, SLICE, IS_GATED, RANK, RANK_POW2, SHARED)
        gate, up = _add_bias(gate, up, bias, row * (slices * SLICE) + n * step, here, to_up, IS_GATED, HAS_BIAS)
        if RANK > 0:
            wait_for_producer(PDL)
        _finish(
            gate,
            up,
            gate_b,
            up_b,
            shrunk,
            out,
            pair,
            virtual,
            n,
            here,
            swiglu_alpha,
            swiglu_limit,
            SLICE,
            IS_GATED,
            ACTIVATION,
            RANK,
            RANK_POW2,
        )
