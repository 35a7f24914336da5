"""The layer for so few tokens that a sort would not pay: each program streams weights past a vector.

No sort and no tensor cores: the bytes of the weights are the time, so loads depend on each other as little as they can
and nothing branches around them. The second product sums over the experts of its token; the rank vectors of its LoRA
are made by the first programs of the same launch, while the others stream the base weight.
"""

import triton
import triton.language as tl

from .activation import activate
from .common import known_experts, load_row, release_consumer, virtual_ids, wait_for_count, wait_for_producer


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
def _loads_first():
    """Between loads and the products of what they load: else the compiler mixes them to spare registers, and fewer
    loads are on their way at once.
    """
    tl.debug_barrier()


@triton.jit
def _products(weight, values, HELD: tl.constexpr):
    """``weight * values`` in fp32, summed over each ``HELD`` neighbours of a row."""
    products = weight.to(tl.float32) * values
    if HELD == 1:
        return products
    else:
        return tl.sum(tl.reshape(products, [weight.shape[0], weight.shape[1] // HELD, HELD]), 2)


@triton.jit
def _counter(shrunk, num_pairs, RANK: tl.constexpr):
    """The int32 that stands behind the rank vectors of all pairs, from the next multiple of eight entries on."""
    return (shrunk + (num_pairs * RANK + 7) // 8 * 8).to(tl.pointer_type(tl.int32), bitcast=True)


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
    next_shrunk,
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
    NEXT_RANK: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of columns of the activation): ``out[p] = act(w[e] @ x + bias + B[v] @ s[p])``.

    ``RANK`` 0: no LoRA. ``EARLY``: the kernel before is the shrink, so all but ``shrunk`` is complete from the start.
    ``UNROLL`` steps of ``BLOCK_K`` columns are on their way at once. ``NEXT_RANK``: that of the next kernel's LoRA (0:
    none), which counts behind its rank vectors ``next_shrunk`` from the zero that this one leaves there.
    """
    if not EARLY:
        wait_for_producer(PDL)
    release_consumer(PDL)
    if NEXT_RANK > 0 and (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(_counter(next_shrunk, num_pairs, NEXT_RANK), 0)
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
    # what a thread loads at once it adds up by itself, which spares registers for more loads
    held: tl.constexpr = 128 // w.dtype.element_ty.primitive_bitwidth if STRIDE_I == 1 else 1
    gate_acc = tl.zeros([BLOCK_N, BLOCK_K // held], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K // held], tl.float32)
    x_row = x + (pair // top_k).to(tl.int64) * STRIDE_X
    row = tl.where(known, expert, 0).to(tl.int64)
    rows = w + row * STRIDE_E + (n * step).to(tl.int64)[:, None] * STRIDE_N
    # behind a loop, B would hold up the end
    b_first: tl.constexpr = RANK > 0 and RANK <= 64 and IN > BLOCK_K * UNROLL
    if b_first:
        gate_b, up_b = _matrices(b, n, virtual, inside, num_experts, SLICE, IS_GATED, RANK, RANK_POW2, SHARED)
    for outer in range(0, IN, BLOCK_K * UNROLL):
        gates = ()
        ups = ()
        for inner in tl.static_range(UNROLL):
            k = outer + inner * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = here[:, None] & (k < IN)[None, :] if IN % (BLOCK_K * UNROLL) != 0 else here[:, None]
            source = rows + k.to(tl.int64)[None, :] * STRIDE_I
            # read once: it pushes nothing else out of L2, which may have to be written back
            gates += (tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first"),)
            if IS_GATED:
                ups += (tl.load(source + to_up * STRIDE_N, mask=mask, other=0.0, eviction_policy="evict_first"),)
        if IN > BLOCK_K * UNROLL:
            _loads_first()
        for inner in tl.static_range(UNROLL):
            k = outer + inner * BLOCK_K + tl.arange(0, BLOCK_K)
            value = load_row(x_row, k, known & (k < IN), BLOCK_N)
            gate_acc += _products(gates[inner], value, held)
            if IS_GATED:
                up_acc += _products(ups[inner], value, held)
    if RANK > 0 and not b_first:
        gate_b, up_b = _matrices(b, n, virtual, inside, num_experts, SLICE, IS_GATED, RANK, RANK_POW2, SHARED)
    gate, up = tl.sum(gate_acc, 1), tl.sum(up_acc, 1)
    if HAS_BIAS:
        bias_row = bias + row * (slices * SLICE) + n * step
        gate += tl.load(bias_row, mask=here, other=0.0).to(tl.float32)
        if IS_GATED:
            up += tl.load(bias_row + to_up, mask=here, other=0.0).to(tl.float32)
    if EARLY:
        wait_for_producer(PDL)
    if RANK > 0:
        adapted = virtual >= 0
        s = _rank_vector(shrunk, pair, num_pairs, adapted, 0, slices * RANK, RANK, RANK_POW2, NUM_PLANES)
        gate += tl.sum(gate_b.to(tl.float32) * s[None, :], 1)
        if IS_GATED:
            s = _rank_vector(shrunk, pair, num_pairs, adapted, 1, slices * RANK, RANK, RANK_POW2, NUM_PLANES)
            up += tl.sum(up_b.to(tl.float32) * s[None, :], 1)
    h = activate(gate, up, swiglu_alpha, swiglu_limit, IS_GATED, ACTIVATION)
    tl.store(out + pair.to(tl.int64) * SLICE + n, h.to(out.dtype.element_ty), mask=here)


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
    tl.atomic_add(_counter(shrunk, num_pairs, RANK), 1, sem="release")


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
                    acc += _products(first[k * UNROLL + inner], value, held)
            for outer in range(BLOCK_K * UNROLL if k < PRELOAD else 0, IN, BLOCK_K * UNROLL):
                loaded = ()
                for inner in tl.static_range(UNROLL):
                    loaded += (_load_weight(rows, outer + inner * BLOCK_K, here, IN, STRIDE_I, BLOCK_K),)
                _loads_first()
                for inner in tl.static_range(UNROLL):
                    i = outer + inner * BLOCK_K + tl.arange(0, BLOCK_K)
                    value = load_row(h_row, i, known & (i < IN), BLOCK_N) * scale
                    acc += _products(loaded[inner], value, held)
            if HAS_BIAS:
                rest += scale * tl.load(bias + row * OUT + n, mask=here, other=0.0).to(tl.float32)
        if RANK > 0:
            wait_for_count(_counter(shrunk, num_pairs, RANK), shrinkers, PDL)
            s = tl.load(shrunk + pairs[:, None] * RANK + ranks[None, :], mask=there, other=0.0).to(tl.float32)
            delta = tl.sum(matrices.to(tl.float32) * (s * scales[:, None])[:, None, :], 2)
            rest += tl.sum(delta, 0)
        target = out + token.to(tl.int64) * OUT + n
        tl.store(target, ((tl.sum(acc, 1) + rest) * factor).to(out.dtype.element_ty), mask=inside)
