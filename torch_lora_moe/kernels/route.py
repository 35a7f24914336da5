"""Route: pairs ordered by (expert, slot) and the table of expert tiles, see ``routing`` for the layout.

Up to a few thousand pairs `route_ranked` orders them in one launch: every program ranks its own pairs against all
others, so there is no histogram over virtual experts and nothing to zero. Beyond that three launches: tokens ordered by
slot, a histogram by expert for each chunk of that order, and a stable scatter. `cut_runs` then finds the runs of LoRA.

Where ids decide on a position, the kernels load them themselves: of what a called function loads, ahead-of-time
compilation cannot tell that it is only read.
"""

import triton
import triton.language as tl

from .common import (
    effective_slots,
    experts_of,
    in_range,
    known_experts,
    release_consumer,
    slots_of,
    wait_for_producer,
)

# Where no composite key can be, for pairs of unknown experts.
NOWHERE = tl.constexpr(2**62)


@triton.jit
def _composite(keys, index, size, used, WIDE: tl.constexpr):
    """``key * size + index``, distinct and in the wanted order; in 64 bits only where 32 are too few."""
    if WIDE:
        return tl.where(used, keys.to(tl.int64) * size + index, NOWHERE)
    return tl.where(used, keys * size + index, 2147483647)


@triton.jit
def _bits_of(flags):
    """Up to 32 flags (nonzero: set) as the bits of one number."""
    return tl.sum(tl.where(flags != 0, 1 << tl.arange(0, flags.shape[0]), 0), 0)


@triton.jit
def _bit(bits, wide):
    """The flag of each slot that is in range, of any others something."""
    return (bits >> (wide & 31)) & 1


@triton.jit
def _token_pairs(tokens, num_tokens, top_k, K_POW2: tl.constexpr):
    """Pairs ``[tokens, K_POW2]`` of a block of tokens and which of them exist."""
    k = tl.arange(0, K_POW2)
    return tokens[:, None] * top_k + k[None, :], (tokens < num_tokens)[:, None] & (k < top_k)[None, :]


@triton.jit
def _write_tiles(schedule, columns, mask, num_pairs, counts, BINS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Writes the expert-tile entries of ``columns``; ``counts`` are rows by expert, zero beyond the last one."""
    stride = num_pairs + 1
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    tile_ends, row_ends = tl.cumsum(tiles, 0), tl.cumsum(counts, 0)
    expert = tl.sum((tile_ends[None, :] <= columns[:, None]).to(tl.int32), 1)
    # the first tile, first row and row count of each column's expert, picked from the register vectors
    pick = tl.arange(0, BINS)[None, :] == expert[:, None]
    first_tile = tl.sum(tl.where(pick, (tile_ends - tiles)[None, :], 0), 1)
    first_row = tl.sum(tl.where(pick, (row_ends - counts)[None, :], 0), 1)
    rows = tl.sum(tl.where(pick, counts[None, :], 0), 1)
    skipped = (columns - first_tile) * TILE_ROWS
    used = columns < tl.sum(tiles, 0)
    tl.store(schedule + 2 * stride + columns, tl.where(used, expert, -1), mask=mask)
    tl.store(schedule + 3 * stride + columns, tl.where(used, first_row + skipped, -1), mask=mask)
    tl.store(schedule + 4 * stride + columns, tl.where(used, tl.minimum(rows - skipped, TILE_ROWS), -1), mask=mask)


@triton.jit
def _write_counts(schedule, num_pairs, counts, TILE_ROWS: tl.constexpr):
    """The last column: how many entries of each row are used; no runs yet."""
    rows = tl.arange(0, 16)
    num_known, num_tiles = tl.sum(counts, 0), tl.sum((counts + TILE_ROWS - 1) // TILE_ROWS, 0)
    target = schedule + rows * (num_pairs + 1) + num_pairs
    tl.store(target, tl.where(rows < 2, num_known, tl.where(rows < 5, num_tiles, 0)), mask=rows < 9)


@triton.jit
def _write_pairs(schedule, position, pairs, experts, slots, known, num_pairs, num_experts):
    """A pair and its virtual expert, -1 where LoRA skips it, at its place in the order."""
    tl.store(schedule + position, pairs, mask=known)
    virtual = tl.where(slots >= 0, slots * num_experts + experts, -1)
    tl.store(schedule + num_pairs + 1 + position, virtual, mask=known)


@triton.jit
def _fill_unused(schedule, columns, num_pairs, num_known, first_free_tile):
    """-1 behind the last known pair, in tile columns that no batch of this size reaches, and in all runs."""
    stride = num_pairs + 1
    unused = tl.full(columns.shape, -1, tl.int32)
    there = columns < num_pairs
    for row in tl.static_range(0, 2):
        tl.store(schedule + row * stride + columns, unused, mask=there & (columns >= num_known))
    for row in tl.static_range(2, 5):
        tl.store(schedule + row * stride + columns, unused, mask=there & (columns >= first_free_tile))
    for row in tl.static_range(5, 9):
        tl.store(schedule + row * stride + columns, unused, mask=there)


@triton.jit(
    do_not_specialize=["num_tokens", "num_pairs", "top_k", "num_experts", "max_loras", "most_tiles"],
    do_not_specialize_on_alignment=["topk_ids", "mapping", "enabled"],
)
def route_ranked(
    topk_ids,
    mapping,
    enabled,
    schedule,
    num_tokens,
    num_pairs,
    top_k,
    num_experts,
    max_loras,
    most_tiles,
    BINS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HAS_MAPPING: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    PDL: tl.constexpr,
    FEW_SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    K_POW2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One launch: programs that place ``BLOCK_P`` pairs each, then programs that fill ``BLOCK_C`` tile columns each.

    ``UNROLL`` blocks of ``BLOCK_T`` tokens are on their way at once. ``FEW_SLOTS``: ``enabled`` comes in one load.
    """
    wait_for_producer(PDL)
    release_consumer(PDL)
    rankers = (num_pairs + BLOCK_P - 1) // BLOCK_P
    flat: tl.constexpr = BLOCK_T * K_POW2
    if tl.program_id(0) < rankers:
        mine = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        there = mine < num_pairs
        experts = experts_of(tl.load(topk_ids + mine, mask=there, other=-1), num_experts)
        slots = tl.full([BLOCK_P], -1, tl.int32)
        if FEW_SLOTS:
            slot = tl.arange(0, 32)
            bits = _bits_of(tl.load(enabled + slot, mask=slot < max_loras, other=0))
        if HAS_MAPPING:
            own = tl.load(mapping + mine // top_k, mask=there, other=-1)
            own_flags = 1
            if FEW_SLOTS:
                own_flags = _bit(bits, own)
            elif HAS_ENABLED:
                own_flags = tl.load(enabled + own, mask=in_range(own, max_loras), other=0)
            slots = slots_of(own, own_flags, max_loras)
        known = experts < num_experts
        mine_key = _composite(experts * (max_loras + 1) + slots + 1, mine, num_pairs, known, WIDE)
        # added up once at the end: a sum over threads in each round would cost more than the comparisons
        smaller = tl.zeros([BLOCK_P, flat], tl.int32)
        all_known = tl.zeros([flat], tl.int32)
        for start in range(0, num_tokens, BLOCK_T * UNROLL):
            ids, wide, on = (), (), ()
            for part in tl.static_range(UNROLL):
                tokens = start + part * BLOCK_T + tl.arange(0, BLOCK_T)
                pairs, exist = _token_pairs(tokens, num_tokens, top_k, K_POW2)
                ids += (tl.load(topk_ids + pairs, mask=exist, other=-1),)
                if HAS_MAPPING:
                    wide += (tl.load(mapping + tokens, mask=tokens < num_tokens, other=-1),)
            # a load that waits for another holds up those behind it, so all others come before
            for part in tl.static_range(UNROLL if HAS_ENABLED else 0):
                if FEW_SLOTS:
                    on += (_bit(bits, wide[part]),)
                else:
                    on += (tl.load(enabled + wide[part], mask=in_range(wide[part], max_loras), other=0),)
            for part in tl.static_range(UNROLL):
                pairs, exist = _token_pairs(start + part * BLOCK_T + tl.arange(0, BLOCK_T), num_tokens, top_k, K_POW2)
                e, s = experts_of(ids[part], num_experts), tl.full([BLOCK_T], -1, tl.int32)
                if HAS_MAPPING:
                    s = slots_of(wide[part], on[part] if HAS_ENABLED else 1, max_loras)
                used = e < num_experts
                keys = _composite(e * (max_loras + 1) + s[:, None] + 1, pairs, num_pairs, used, WIDE)
                smaller += (tl.reshape(keys, [flat])[None, :] < mine_key[:, None]).to(tl.int32)
                all_known += tl.reshape(used.to(tl.int32), [flat])
        rank, num_known = tl.sum(smaller, 1), tl.sum(all_known, 0)
        _write_pairs(schedule, rank, mine, experts, slots, known, num_pairs, num_experts)
        _fill_unused(schedule, mine, num_pairs, num_known, most_tiles)
    else:
        counts = tl.zeros([BINS], tl.int32)
        for start in range(0, num_tokens, BLOCK_T * UNROLL):
            for part in tl.static_range(UNROLL):
                tokens = start + part * BLOCK_T + tl.arange(0, BLOCK_T)
                pairs, exist = _token_pairs(tokens, num_tokens, top_k, K_POW2)
                e = tl.reshape(experts_of(tl.load(topk_ids + pairs, mask=exist, other=-1), num_experts), [flat])
                counts += tl.histogram(e, BINS, mask=e < num_experts)
        columns = (tl.program_id(0) - rankers) * BLOCK_C + tl.arange(0, BLOCK_C)
        _write_tiles(schedule, columns, columns < most_tiles, num_pairs, counts, BINS, TILE_ROWS)
        if tl.program_id(0) == rankers:
            _write_counts(schedule, num_pairs, counts, TILE_ROWS)


@triton.jit(do_not_specialize=["num_tokens", "max_loras"], do_not_specialize_on_alignment=["mapping", "enabled"])
def order_tokens(
    mapping,
    enabled,
    token_order,
    num_tokens,
    max_loras,
    HAS_ENABLED: tl.constexpr,
    FEW_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """First launch of three: tokens by (slot, token); each program counts all of them by slot and places its chunk."""
    wait_for_producer(PDL)
    release_consumer(PDL)
    first, local = tl.program_id(0) * CHUNK, tl.arange(0, CHUNK)
    if FEW_SLOTS:
        slot = tl.arange(0, 32)
        bits = _bits_of(tl.load(enabled + slot, mask=slot < max_loras, other=0))
    mine = first + local
    there = mine < num_tokens
    own = tl.load(mapping + mine, mask=there, other=-1)
    before = tl.zeros([BINS], tl.int32)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_tokens, BLOCK_Q):
        tokens = start + tl.arange(0, BLOCK_Q)
        wide = tl.load(mapping + tokens, mask=tokens < num_tokens, other=-1)
        flags = 1
        if FEW_SLOTS:
            flags = _bit(bits, wide)
        elif HAS_ENABLED:
            flags = tl.load(enabled + wide, mask=in_range(wide, max_loras), other=0)
        s = slots_of(wide, flags, max_loras)
        counts += tl.histogram(s + 1, BINS, mask=tokens < num_tokens)
        if start < first:
            before += tl.histogram(s + 1, BINS, mask=tokens < first)
    own_flags = 1
    if FEW_SLOTS:
        own_flags = _bit(bits, own)
    elif HAS_ENABLED:
        own_flags = tl.load(enabled + own, mask=in_range(own, max_loras), other=0)
    slots = slots_of(own, own_flags, max_loras)
    same = (slots[None, :] == slots[:, None]) & (local[None, :] < local[:, None])
    position = tl.gather(tl.cumsum(counts, 0) - counts + before, slots + 1, 0) + tl.sum(same.to(tl.int32), 1)
    tl.store(token_order + position, mine, mask=there)


@triton.jit
def _pairs_in_order(token_order, index, mask, top_k, HAS_MAPPING: tl.constexpr):
    """Pair at each position of the order by (slot, pair)."""
    token = index // top_k
    if HAS_MAPPING:
        token = tl.load(token_order + token, mask=mask, other=0)
    return token * top_k + index % top_k


@triton.jit(do_not_specialize=["num_pairs", "top_k", "num_experts"], do_not_specialize_on_alignment=["topk_ids"])
def count_experts(
    topk_ids,
    token_order,
    ordered_experts,
    histograms,
    num_pairs,
    top_k,
    num_experts,
    BINS: tl.constexpr,
    HAS_MAPPING: tl.constexpr,
    PDL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Second launch: the experts in slot order, and how often each occurs in each chunk of it."""
    wait_for_producer(PDL)
    release_consumer(PDL)
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask = index < num_pairs
    pairs = _pairs_in_order(token_order, index, mask, top_k, HAS_MAPPING)
    experts = known_experts(topk_ids, pairs, mask, num_experts)
    tl.store(ordered_experts + index, experts, mask=mask)
    counts = tl.histogram(experts, BINS, mask=experts < num_experts)
    tl.store(histograms + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(
    do_not_specialize=["num_pairs", "top_k", "num_experts", "max_loras", "most_tiles", "num_chunks", "num_counted"],
    do_not_specialize_on_alignment=["mapping", "enabled"],
)
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
    most_tiles,
    num_chunks,
    num_counted,
    BINS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HAS_MAPPING: tl.constexpr,
    HAS_ENABLED: tl.constexpr,
    PDL: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Third launch: a program for each chunk places its pairs behind those of the chunks before, stable by expert;
    the programs after them fill ``BLOCK_C`` tile columns each.

    There are ``num_counted`` histograms, of ``COUNTED`` pairs each, which are several chunks.
    """
    wait_for_producer(PDL)
    release_consumer(PDL)
    chunk = tl.program_id(0)
    bins, local = tl.arange(0, BINS), tl.arange(0, CHUNK)
    index = chunk * CHUNK + local
    there = index < num_pairs
    experts = tl.load(ordered_experts + index, mask=there, other=num_experts)
    # of the chunks counted together with this one, those before it
    earlier = chunk * CHUNK // COUNTED * COUNTED + tl.arange(0, COUNTED)
    inside = earlier < tl.minimum(chunk * CHUNK, num_pairs)
    experts_before = tl.load(ordered_experts + earlier, mask=inside, other=num_experts)
    pairs = _pairs_in_order(token_order, index, there, top_k, HAS_MAPPING)
    # added up once at the end: a sum over threads in each round would cost more than the loads
    of_before = tl.zeros([BLOCK_H, BINS], tl.int32)
    of_all = tl.zeros([BLOCK_H, BINS], tl.int32)
    for start in range(0, num_counted, BLOCK_H):
        rows = start + tl.arange(0, BLOCK_H)
        part = tl.load(histograms + rows[:, None] * BINS + bins[None, :], mask=rows[:, None] < num_counted, other=0)
        of_all += part
        of_before += tl.where(rows[:, None] < chunk * CHUNK // COUNTED, part, 0)
    before, counts = tl.sum(of_before, 0), tl.sum(of_all, 0)
    if chunk >= num_chunks:
        columns = (chunk - num_chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
        _write_tiles(schedule, columns, columns < most_tiles, num_pairs, counts, BINS, TILE_ROWS)
        if chunk == num_chunks:
            _write_counts(schedule, num_pairs, counts, TILE_ROWS)
    else:
        slots = effective_slots(mapping, enabled, pairs // top_k, there, max_loras, HAS_MAPPING, HAS_ENABLED)
        known = experts < num_experts
        here = tl.histogram(experts, BINS, mask=known)
        before += tl.histogram(experts_before, BINS, mask=experts_before < num_experts)
        # first place of each expert's pairs of this chunk, less their place in the chunk's own order by expert
        base = tl.cumsum(counts - here, 0) - counts + here + before
        mine_key = _composite(experts, local, CHUNK, known, False)
        smaller = tl.zeros([CHUNK, BLOCK_Q], tl.int32)
        for start in range(0, CHUNK, BLOCK_Q):
            others = start + tl.arange(0, BLOCK_Q)
            exist = chunk * CHUNK + others < num_pairs
            e = tl.load(ordered_experts + chunk * CHUNK + others, mask=exist, other=num_experts)
            keys = _composite(e, others, CHUNK, e < num_experts, False)
            smaller += (keys[None, :] < mine_key[:, None]).to(tl.int32)
        position = tl.gather(base, tl.where(known, experts, 0), 0) + tl.sum(smaller, 1)
        _write_pairs(schedule, position, pairs, experts, slots, known, num_pairs, num_experts)
        _fill_unused(schedule, index, num_pairs, tl.sum(counts, 0), most_tiles)


@triton.jit
def _starts(ids, index, end, RUN_ROWS: tl.constexpr):
    """Virtual experts of sorted pairs, and which of them start a run."""
    mine = tl.load(ids + index, mask=index < end, other=-1)
    inner = index % RUN_ROWS != 0
    before = tl.load(ids + index - 1, mask=(index < end) & inner, other=-1)
    return mine, (mine >= 0) & (~inner | (mine != before))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["schedule"])
def cut_runs(
    schedule,
    num_pairs,
    RUN_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Last launch: each program numbers the runs of its chunk behind those of the chunks before."""
    wait_for_producer(PDL)
    release_consumer(PDL)
    stride = num_pairs + 1
    ids = schedule + stride
    first = tl.program_id(0) * CHUNK
    # a chunk is a multiple of RUN_ROWS, so its last run ends inside
    index = first + tl.arange(0, CHUNK)
    mine, starting = _starts(ids, index, num_pairs, RUN_ROWS)
    after = tl.load(ids + index + 1, mask=(index + 1 < num_pairs) & ((index + 1) % RUN_ROWS != 0), other=-1)
    num_known = tl.load(schedule + num_pairs)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, first, BLOCK):
        _, before = _starts(ids, start + tl.arange(0, BLOCK), first, RUN_ROWS)
        count += before.to(tl.int32)
    runs_before = tl.sum(count, 0)
    start = tl.associative_scan(tl.where(starting, index, 0), 0, _larger)
    run = runs_before + tl.cumsum(starting.to(tl.int32), 0) - 1
    ending = (mine >= 0) & (mine != after)
    tl.store(schedule + 5 * stride + run, mine, mask=ending)
    tl.store(schedule + 6 * stride + run, start, mask=ending)
    tl.store(schedule + 7 * stride + run, index - start + 1, mask=ending)
    tl.store(schedule + 8 * stride + index, tl.where(mine >= 0, run, run + 1), mask=index < num_known)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        rows = 5 + tl.arange(0, 4)
        total = runs_before + tl.sum(starting.to(tl.int32), 0)
        tl.store(schedule + rows * stride + num_pairs, tl.where(rows < 8, total, num_known))
