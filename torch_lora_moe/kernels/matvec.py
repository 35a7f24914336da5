"""What the layer of few tokens has in common: each program streams weights past a vector.

No sort and no tensor cores: the bytes of the weights are the time, so loads depend on each other as little as they can
and nothing branches around them. ``matvec_gate_up`` makes the activations, ``matvec_down`` the layer's result.
"""

import triton
import triton.language as tl

from .common import load_row


@triton.jit
def loads_first():
    """Between loads and the products of what they load: else the compiler mixes them to spare registers, and fewer
    loads are on their way at once.
    """
    tl.debug_barrier()


@triton.jit
def products(weight, values, HELD: tl.constexpr):
    """``weight * values`` in fp32, summed over each ``HELD`` neighbours of a row."""
    result = weight.to(tl.float32) * values
    if HELD == 1:
        return result
    else:
        return tl.sum(tl.reshape(result, [weight.shape[0], weight.shape[1] // HELD, HELD]), 2)


@triton.jit
def row_sums(
    x_row,
    rows,
    here,
    known,
    to_up,
    IN: tl.constexpr,
    STRIDE_I: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Products of a vector with ``BLOCK_N`` rows of a weight and with those ``to_up`` entries behind them.

    ``rows``: where rows start, zero where not ``here``; ``known``: whether the vector counts. ``UNROLL`` steps of
    ``BLOCK_K`` columns are on their way at once.
    """
    # what a thread loads at once it adds up by itself, which spares registers for more loads
    held: tl.constexpr = 128 // rows.dtype.scalar.element_ty.primitive_bitwidth if STRIDE_I == 1 else 1
    gate_acc = tl.zeros([BLOCK_N, BLOCK_K // held], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K // held], tl.float32)
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
                ups += (tl.load(source + to_up, mask=mask, other=0.0, eviction_policy="evict_first"),)
        if IN > BLOCK_K * UNROLL:
            loads_first()
        for inner in tl.static_range(UNROLL):
            k = outer + inner * BLOCK_K + tl.arange(0, BLOCK_K)
            value = load_row(x_row, k, known & (k < IN), BLOCK_N)
            gate_acc += products(gates[inner], value, held)
            if IS_GATED:
                up_acc += products(ups[inner], value, held)
    return tl.sum(gate_acc, 1), tl.sum(up_acc, 1)


@triton.jit
def counter(shrunk, num_pairs, RANK: tl.constexpr):
    """The int32 that stands behind the rank vectors of all pairs, from the next multiple of eight entries on."""
    return (shrunk + (num_pairs * RANK + 7) // 8 * 8).to(tl.pointer_type(tl.int32), bitcast=True)
