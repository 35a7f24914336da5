"""What the kernels of several stages share: a pair's effective ids, and overlap with the kernel before."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# The interpreter has no assembly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def in_range(ids, size):
    """Which ids are at least 0 and less than ``size``; compared as wide as they came."""
    return (ids >= 0) & (ids < size)


@triton.jit
def slots_of(wide, flags, max_loras):
    """Adapter slots as int32 from ids and whether each is enabled (nonzero), -1 where out of range or disabled."""
    return tl.where(in_range(wide, max_loras) & (flags != 0), wide, -1).to(tl.int32)


@triton.jit
def experts_of(wide, num_experts):
    """Experts as int32 from ids, ``num_experts`` where out of range."""
    return tl.where(in_range(wide, num_experts), wide, num_experts).to(tl.int32)


@triton.jit
def effective_slots(mapping, enabled, tokens, mask, max_loras, HAS_MAPPING: tl.constexpr, HAS_ENABLED: tl.constexpr):
    """Adapter slot of each token as int32, -1 where it is out of range or disabled."""
    slots = tl.full(tokens.shape, -1, tl.int32)
    if HAS_MAPPING:
        wide = tl.load(mapping + tokens, mask=mask, other=-1)
        flags = tl.load(enabled + wide, mask=in_range(wide, max_loras), other=0) if HAS_ENABLED else 1
        slots = slots_of(wide, flags, max_loras)
    return slots


@triton.jit
def known_experts(topk_ids, pairs, mask, num_experts):
    """Expert of each pair as int32, ``num_experts`` where it is out of range."""
    return experts_of(tl.load(topk_ids + pairs, mask=mask, other=-1), num_experts)


@triton.jit
def virtual_ids(topk_ids, mapping, enabled, pairs, mask, top_k, num_experts, max_loras, HAS_ENABLED: tl.constexpr):
    """``slot * num_experts + expert`` of each pair, -1 where LoRA skips it."""
    experts = known_experts(topk_ids, pairs, mask, num_experts)
    slots = effective_slots(mapping, enabled, pairs // top_k, mask, max_loras, True, HAS_ENABLED)
    return tl.where((slots >= 0) & (experts < num_experts), slots * num_experts + experts, -1)


@triton.jit
def num_runs(schedule, num_pairs):
    """How many runs a schedule holds."""
    return tl.load(schedule + 5 * (num_pairs + 1) + num_pairs)


@triton.jit
def load_run(schedule, num_pairs, run):
    """Virtual expert, first sorted row and number of rows of a run."""
    entry = schedule + 5 * (num_pairs + 1) + run
    stride = num_pairs + 1
    return tl.load(entry), tl.load(entry + stride), tl.load(entry + 2 * stride)


@triton.jit
def fma(acc, left, right, there):
    """``acc + left @ right.T``; ``there``: the rows that count."""
    if left.dtype == tl.float32:
        # a sum of its own for each block, which the mask keeps the compiler from joining: one long chain of additions
        # would lose a digit
        return acc + tl.where(there[:, None], tl.dot(left, right.T, input_precision="ieee"), 0.0)
    else:
        return tl.dot(left, right.T, acc)


@triton.jit
def wait_for_producer(PDL: tl.constexpr):
    """Until the kernel before has finished and its writes are visible; nothing it may write is read earlier."""
    if PDL:
        gdc_wait()


@triton.jit
def release_consumer(PDL: tl.constexpr):
    """Lets the next kernel start early; it waits by itself before it reads what this one writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Brings lines into L2 and reads nothing, so it is safe even while an earlier kernel writes them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_count(counter, count, PDL: tl.constexpr):
    """Until ``count`` other programs of this launch have counted; what they stored before is visible then.

    They must have lower numbers than this program, so that they are on the GPU when it waits.
    """
    if not PDL:
        # in operations that the interpreter and a compiler around the kernel understand
        seen = tl.atomic_add(counter, 0, sem="acquire")
        while seen < count:
            seen = tl.atomic_add(counter, 0, sem="acquire")
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred missing;
            again:
            ld.acquire.gpu.global.u32 $0, [$1];
            setp.lt.u32 missing, $0, $2;
            @missing bra again;
            }""",
            "=&r,l,r",
            [counter.to(tl.int64), count],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_row(row, k, mask, BLOCK_N: tl.constexpr):
    """``row[k]`` as fp32, to be multiplied with a tile of ``BLOCK_N`` rows.

    For few rows each of them loads it: a vector of one dimension reaches the layout of a tile only through shared
    memory, behind a barrier that holds up the loads after it. For many the repeated loads cost more.
    """
    if BLOCK_N > 8:
        return tl.load(row + k, mask=mask, other=0.0).to(tl.float32)[None, :]
    else:
        same = tl.zeros([BLOCK_N], tl.int32)[:, None]
        return tl.load(row + k[None, :] + same, mask=mask[None, :] & (same == 0), other=0.0).to(tl.float32)
