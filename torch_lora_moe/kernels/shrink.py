"""Shrink: rank vectors ``s[p] = A[v] @ x`` of all pairs, in split-K planes of fp32.

Few pairs take one program each and stream their own matrix (`shrink_pairs`, no sort, no tensor cores: the bytes of A
are the time; `shrink_streams` inside the whole layer, with copies in flight). Many pairs are sorted, so that the pairs
of a virtual expert are neighbours: a run, which meets its matrix in one tensor-core product (`shrink_runs`).
Each lets the kernel after it start once the one before it is complete: all but the rank vectors is there then. Behind
a product in two launches (``SPLIT``) it starts when the first of them is complete, and so does the kernel after it.
"""

import triton
import triton.language as tl

from .common import fma, load_row, load_run, num_runs, release_consumer, virtual_ids, wait_for_producer


@triton.jit
def _is_late(virtual, schedule, first_tiles, num_pairs, num_experts):
    """Whether an expert has rows beyond the first tiles; their experts ascend."""
    expert = tl.load(schedule + 2 * (num_pairs + 1) + first_tiles)
    return (expert >= 0) & (virtual % num_experts >= expert)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "pairs_per_row", "num_experts", "max_loras", "first_tiles"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled", "schedule"],
)
def shrink_pairs(
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
    first_tiles,
    STRIDE_X: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of A's rows, planes); ``EVEN_PLANES``: the planes are full chunks of full blocks.

    ``EARLY``: all but ``x`` is complete from the start, and A's first columns are loaded before the wait. ``SPLIT``: so
    is the input of the experts of the first ``first_tiles`` tiles of ``schedule``.
    """
    pair = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    plane = tl.program_id(2)
    columns = plane * CHUNK + tl.arange(0, BLOCK_K)
    if not EARLY:
        wait_for_producer(PDL)
    if SPLIT or not EARLY:
        release_consumer(PDL)
    virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
    weight = tl.where(virtual >= 0, virtual // num_experts if SHARED else virtual, 0).to(tl.int64)
    a_rows = a + weight * (ROWS * IN) + rows[:, None] * IN
    known = (rows < ROWS) & (virtual >= 0)
    if EARLY:
        inside = tl.full([BLOCK_K], True, tl.int1) if EVEN_PLANES else columns < IN
        values = tl.load(a_rows + columns[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        if not SPLIT:
            wait_for_producer(PDL)
            release_consumer(PDL)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    if virtual >= 0:
        if SPLIT and _is_late(virtual, schedule, first_tiles, num_pairs, num_experts):
            wait_for_producer(PDL)
        x_row = x + (pair // pairs_per_row).to(tl.int64) * STRIDE_X
        if EARLY:
            acc += values.to(tl.float32) * load_row(x_row, columns, inside, BLOCK_R)
        for start in range(BLOCK_K if EARLY else 0, CHUNK, BLOCK_K):
            k = start + columns
            inside = tl.full([BLOCK_K], True, tl.int1) if EVEN_PLANES else k < IN
            values = tl.load(a_rows + k[None, :], mask=known[:, None] & inside[None, :], other=0.0)
            acc += values.to(tl.float32) * load_row(x_row, k, inside, BLOCK_R)
    target = out + (plane.to(tl.int64) * num_pairs + pair) * ROWS + rows
    tl.store(target, tl.sum(acc, 1), mask=rows < ROWS)
    # the end of this kernel means the end of the one before
    if SPLIT and tl.program_id(0) == 0:
        wait_for_producer(PDL)


@triton.jit
def _multiply(
    x_rows,
    there,
    a_rows,
    known,
    columns,
    IN: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x @ A.T`` over one plane's columns, for rows of x that are ``there`` and rows of A that are ``known``."""
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, CHUNK, BLOCK_K):
        k = start + columns
        inside = tl.full([BLOCK_K], True, tl.int1) if EVEN_PLANES else k < IN
        left = tl.load(x_rows + k[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        right = tl.load(a_rows + k[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        acc = fma(acc, left, right, there)
    return acc


@triton.jit
def _clear_skipped(
    out,
    rows,
    topk_ids,
    mapping,
    enabled,
    num_pairs,
    top_k,
    num_experts,
    max_loras,
    ROWS: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Zeros for the pairs that LoRA skips, which stand anywhere in the order or nowhere."""
    zeros = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, num_pairs, tl.num_programs(0) * BLOCK_M):
        pairs = start + tl.arange(0, BLOCK_M)
        there = pairs < num_pairs
        virtual = virtual_ids(topk_ids, mapping, enabled, pairs, there, top_k, num_experts, max_loras, HAS_ENABLED)
        clear = (there & (virtual < 0))[:, None] & (rows[None, :] < ROWS)
        tl.store(out + pairs[:, None].to(tl.int64) * ROWS + rows[None, :], zeros, mask=clear)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "pairs_per_row", "num_experts", "max_loras", "first_tiles", "part"],
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
    first_tiles,
    part,
    STRIDE_X: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    CLEAR: tl.constexpr,
    IN_ORDER: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (runs times ``PIECES``, blocks of A's rows, planes): ``PIECES`` programs share the rows of a run; they take
    turns where there are more runs than programs. ``IN_ORDER``: the rows of ``x`` stand in the sorted order.
    ``SPLIT``: those of the first ``first_tiles`` tiles are complete from the start. The launch with ``part`` 0 takes
    them, the one with 1 the others, which are complete when it starts.
    """
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    plane = tl.program_id(2)
    local = tl.arange(0, BLOCK_M)
    columns = plane * CHUNK + tl.arange(0, BLOCK_K)
    out += plane.to(tl.int64) * num_pairs * ROWS
    if not SPLIT:
        wait_for_producer(PDL)
    release_consumer(PDL)
    if CLEAR:
        _clear_skipped(
            out,
            rows,
            topk_ids,
            mapping,
            enabled,
            num_pairs,
            top_k,
            num_experts,
            max_loras,
            ROWS,
            HAS_ENABLED,
            BLOCK_M,
            BLOCK_R,
        )
    run, used = tl.program_id(0) // PIECES, num_runs(schedule, num_pairs)
    if SPLIT:
        bound = tl.load(schedule + 3 * (num_pairs + 1) + first_tiles)
        bound = tl.where(bound < 0, num_pairs, bound)
    while run < used:
        virtual, first, count = load_run(schedule, num_pairs, used - 1 - run if SPLIT and part > 0 else run)
        if SPLIT:
            # the rows of this run that are this launch's; where there are none, those after it have none either
            inside = tl.minimum(tl.maximum(bound - first, 0), count)
            first, count = tl.where(part > 0, first + inside, first), tl.where(part > 0, count - inside, inside)
            run = tl.where(count > 0, run, used)
        weight = (virtual // num_experts if SHARED else virtual).to(tl.int64)
        a_rows = a + weight * (ROWS * IN) + rows[:, None] * IN
        for piece in range(tl.program_id(0) % PIECES * BLOCK_M, count, PIECES * BLOCK_M):
            there = piece + local < count
            pairs = tl.load(schedule + first + piece + local, mask=there, other=0)
            x_rows = first + piece + local if IN_ORDER else pairs // pairs_per_row
            acc = _multiply(
                x + x_rows.to(tl.int64)[:, None] * STRIDE_X,
                there,
                a_rows,
                rows < ROWS,
                columns,
                IN,
                CHUNK,
                EVEN_PLANES,
                BLOCK_M,
                BLOCK_R,
                BLOCK_K,
            )
            target = out + pairs[:, None].to(tl.int64) * ROWS + rows[None, :]
            tl.store(target, acc, mask=there[:, None] & (rows[None, :] < ROWS))
        run += tl.num_programs(0) // PIECES
    # the end of this kernel means the end of the one before
    if SPLIT and tl.program_id(0) == 0:
        wait_for_producer(PDL)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "pairs_per_row", "num_experts", "max_loras", "first_tiles"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled", "schedule"],
)
def shrink_streams(
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
    first_tiles,
    STRIDE_X: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_PLANES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `shrink_pairs`, the matrix through the tensor cores: one row of sixteen counts, but its bytes are on their way
    in shared memory while the last ones are multiplied.
    """
    pair = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    plane = tl.program_id(2)
    there = tl.arange(0, 16) == 0
    if not SPLIT:
        wait_for_producer(PDL)
    release_consumer(PDL)
    virtual = virtual_ids(topk_ids, mapping, enabled, pair, True, top_k, num_experts, max_loras, HAS_ENABLED)
    if virtual >= 0:
        if SPLIT and _is_late(virtual, schedule, first_tiles, num_pairs, num_experts):
            wait_for_producer(PDL)
        weight = (virtual // num_experts if SHARED else virtual).to(tl.int64)
        x_row = x + (pair // pairs_per_row).to(tl.int64) * STRIDE_X + tl.zeros([16], tl.int32)[:, None]
        a_rows = a + weight * (ROWS * IN) + rows[:, None] * IN
        columns = plane * CHUNK + tl.arange(0, BLOCK_K)
        acc = _multiply(x_row, there, a_rows, rows < ROWS, columns, IN, CHUNK, EVEN_PLANES, 16, BLOCK_R, BLOCK_K)
        target = (
            out + (plane.to(tl.int64) * num_pairs + pair) * ROWS + rows[None, :] + tl.zeros([16], tl.int32)[:, None]
        )
        tl.store(target, acc, mask=there[:, None] & (rows < ROWS)[None, :])
    # the end of this kernel means the end of the one before
    if SPLIT and tl.program_id(0) == 0:
        wait_for_producer(PDL)
