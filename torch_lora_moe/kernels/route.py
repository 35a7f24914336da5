"""Route: pairs ordered by (expert, slot) and the table of expert tiles, see ``routing`` for the layout.

Up to a few thousand pairs `route_ranked` does it in one launch: every program ranks its own pairs against all others,
so there is no histogram over virtual experts and nothing to zero. Beyond that three launches: tokens ranked by slot,
a histogram by expert for each chunk of that order, and a stable scatter.
"""

import triton
import triton.language as tl

from .common import effective_slots, known_experts


@triton.jit
def _write_tiles(schedule, columns, num_pairs, counts, E_POW2: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Writes the expert-tile entries of ``columns``; ``counts`` are rows by expert, zero beyond the last one."""
    stride = num_pairs + 1
    experts = tl.arange(0, E_POW2)
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = tl.cumsum(tiles, 0)
    row_ends = tl.cumsum(counts, 0)
    total = tl.sum(tiles, 0)
    expert = tl.sum((tile_ends[None, :] <= columns[:, None]).to(tl.int32), 1)
    # the first tile, first row and row count of each column's expert, picked from the register vectors
    pick = experts[None, :] == expert[:, None]
    first_tile = tl.sum(tl.where(pick, (tile_ends - tiles)[None, :], 0), 1)
    first_row = tl.sum(tl.where(pick, (row_ends - counts)[None, :], 0), 1)
    rows = tl.sum(tl.where(pick, counts[None, :], 0), 1)
    skipped = (columns - first_tile) * TILE_ROWS
    used, mask = columns < total, columns < num_pairs
    tl.store(schedule + 2 * stride + columns, tl.where(used, expert, -1), mask=mask)
    tl.store(schedule + 3 * stride + columns, tl.where(used, first_row + skipped, -1), mask=mask)
    tl.store(schedule + 4 * stride + columns, tl.where(used, tl.minimum(rows - skipped, TILE_ROWS), -1), mask=mask)
    return total


@triton.jit
def _write_counts(schedule, num_pairs, num_known, num_tiles):
    """The last column: how many entries of each row are used."""
    stride = num_pairs + 1
    rows = tl.arange(0, 8)
    tl.store(schedule + rows * stride + num_pairs, tl.where(rows < 2, num_known, num_tiles), mask=rows < 5)


@triton.jit
def _fill_unused_tiles(schedule, columns, num_pairs):
    stride = num_pairs + 1
    unused = tl.full(columns.shape, -1, tl.int32)
    for row in tl.static_range(2, 5):
        tl.store(schedule + row * stride + columns, unused, mask=columns < num_pairs)


@triton.jit(do_not_specialize=["num_pairs", "top_k", "num_experts", "max_loras"])
def route_ranked(
    topk_ids,
    mapping,
    enabled,
    schedule,
    num_pairs,
    top_k,
    num_experts,
    max_loras,
    E_POW2: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HAS_MAPPING: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One launch: each program places ``BLOCK_P`` pairs and fills as many columns of the tile table."""
    mine = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = mine < num_pairs
    experts = known_experts(topk_ids, mine, mask, num_experts)
    slots = effective_slots(mapping, enabled, mine // top_k, mask, max_loras, HAS_MAPPING, HAS_ENABLED)
    keys = tl.where(experts < num_experts, experts * (max_loras + 1) + slots + 1, num_experts * (max_loras + 1))

    rank = tl.zeros([BLOCK_P], tl.int32)
    counts = tl.zeros([E_POW2], tl.int32)
    for start in range(0, num_pairs, BLOCK_Q):
        others = start + tl.arange(0, BLOCK_Q)
        there = others < num_pairs
        e = known_experts(topk_ids, others, there, num_experts)
        s = effective_slots(mapping, enabled, others // top_k, there, max_loras, HAS_MAPPING, HAS_ENABLED)
        key = tl.where(e < num_experts, e * (max_loras + 1) + s + 1, num_experts * (max_loras + 1))
        first = (key[None, :] < keys[:, None]) | ((key[None, :] == keys[:, None]) & (others[None, :] < mine[:, None]))
        rank += tl.sum((first & there[None, :]).to(tl.int32), 1)
        counts += tl.histogram(tl.where(there, e, num_experts), E_POW2)

    counts = tl.where(tl.arange(0, E_POW2) < num_experts, counts, 0)
    known = experts < num_experts
    stride = num_pairs + 1
    tl.store(schedule + rank, tl.where(known, mine, -1), mask=mask)
    virtual = tl.where(known & (slots >= 0), slots * num_experts + experts, -1)
    tl.store(schedule + stride + rank, virtual, mask=mask)

    total = tl.sum((counts + TILE_ROWS - 1) // TILE_ROWS, 0)
    if tl.program_id(0) * BLOCK_P < total:
        _write_tiles(schedule, mine, num_pairs, counts, E_POW2, TILE_ROWS)
    else:
        _fill_unused_tiles(schedule, mine, num_pairs)
    if tl.program_id(0) == 0:
        _write_counts(schedule, num_pairs, tl.sum(counts, 0), total)


@triton.jit(do_not_specialize=["num_tokens", "max_loras"])
def order_tokens(
    mapping,
    enabled,
    token_order,
    num_tokens,
    max_loras,
    HAS_ENABLED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """First launch of three: tokens by (slot, token), by rank against all others."""
    mine = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = mine < num_tokens
    slots = effective_slots(mapping, enabled, mine, mask, max_loras, True, HAS_ENABLED)
    rank = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, num_tokens, BLOCK_Q):
        others = start + tl.arange(0, BLOCK_Q)
        there = others < num_tokens
        s = effective_slots(mapping, enabled, others, there, max_loras, True, HAS_ENABLED)
        first = (s[None, :] < slots[:, None]) | ((s[None, :] == slots[:, None]) & (others[None, :] < mine[:, None]))
        rank += tl.sum((first & there[None, :]).to(tl.int32), 1)
    tl.store(token_order + rank, mine, mask=mask)


@triton.jit
def _pairs_in_order(token_order, index, mask, top_k, HAS_MAPPING: tl.constexpr):
    """Pair at each position of the order by (slot, pair)."""
    token = index // top_k
    if HAS_MAPPING:
        token = tl.load(token_order + token, mask=mask, other=0)
    return token * top_k + index % top_k


@triton.jit(do_not_specialize=["num_pairs", "top_k", "num_experts"])
def count_experts(
    topk_ids,
    token_order,
    ordered_experts,
    histograms,
    num_pairs,
    top_k,
    num_experts,
    E_POW2: tl.constexpr,
    HAS_MAPPING: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Second launch: the experts in slot order, and how often each occurs in each chunk of it."""
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask = index < num_pairs
    pairs = _pairs_in_order(token_order, index, mask, top_k, HAS_MAPPING)
    experts = known_experts(topk_ids, pairs, mask, num_experts)
    tl.store(ordered_experts + index, experts, mask=mask)
    # entries behind the last pair count as unknown experts, taken off again here
    counts = tl.histogram(experts, E_POW2)
    beyond = tl.sum((~mask).to(tl.int32), 0)
    bins = tl.arange(0, E_POW2)
    counts -= tl.where(bins == num_experts, beyond, 0)
    tl.store(histograms + tl.program_id(0) * E_POW2 + bins, counts)


@triton.jit(do_not_specialize=["num_pairs", "top_k", "num_experts", "max_loras", "num_chunks"])
def scatter_pairs(
    mapping,
    enabled,
    token_order,
    ordered_experts,
    histograms,
    schedule,
    num_pairs,
    top_k,
    num_experts,
    max_loras,
    num_chunks,
    E_POW2: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HAS_MAPPING: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Third launch: each chunk places its pairs behind those of the chunks before, stable by expert."""
    chunk = tl.program_id(0)
    bins = tl.arange(0, E_POW2)
    before = tl.zeros([E_POW2], tl.int32)
    counts = tl.zeros([E_POW2], tl.int32)
    for start in range(0, num_chunks, BLOCK_C):
        rows = start + tl.arange(0, BLOCK_C)
        part = tl.load(histograms + rows[:, None] * E_POW2 + bins[None, :], mask=rows[:, None] < num_chunks, other=0)
        counts += tl.sum(part, 0)
        before += tl.sum(tl.where(rows[:, None] < chunk, part, 0), 0)
    base = tl.cumsum(counts, 0) - counts + before

    index = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = index < num_pairs
    experts = tl.load(ordered_experts + index, mask=mask, other=num_experts)
    rank = tl.gather(base, experts, 0)
    for start in range(0, CHUNK, BLOCK_Q):
        others = chunk * CHUNK + start + tl.arange(0, BLOCK_Q)
        e = tl.load(ordered_experts + others, mask=others < num_pairs, other=-1)
        first = (e[None, :] == experts[:, None]) & (others[None, :] < index[:, None])
        rank += tl.sum(first.to(tl.int32), 1)

    pairs = _pairs_in_order(token_order, index, mask, top_k, HAS_MAPPING)
    slots = effective_slots(mapping, enabled, pairs // top_k, mask, max_loras, HAS_MAPPING, HAS_ENABLED)
    known = experts < num_experts
    stride = num_pairs + 1
    tl.store(schedule + rank, tl.where(known, pairs, -1), mask=mask)
    virtual = tl.where(known & (slots >= 0), slots * num_experts + experts, -1)
    tl.store(schedule + stride + rank, virtual, mask=mask)

    counts = tl.where(bins < num_experts, counts, 0)
    total = tl.sum((counts + TILE_ROWS - 1) // TILE_ROWS, 0)
    for start in range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK_T):
        columns = start + tl.arange(0, BLOCK_T)
        if start < total:
            _write_tiles(schedule, columns, num_pairs, counts, E_POW2, TILE_ROWS)
        else:
            _fill_unused_tiles(schedule, columns, num_pairs)
    if chunk == 0:
        _write_counts(schedule, num_pairs, tl.sum(counts, 0), total)
