"""The base layer's stages: grouped GEMM over expert tiles, activation, sum over the experts of a token."""

import triton
import triton.language as tl

from .common import known_experts


@triton.jit(
    do_not_specialize=["num_pairs", "pairs_per_row"],
    do_not_specialize_on_alignment=["schedule", "topk_weights"],
)
def expert_gemm(
    x,
    w,
    bias,
    out,
    schedule,
    topk_weights,
    num_pairs,
    pairs_per_row,
    STRIDE_X: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_I: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of output columns, expert tiles): ``out[p] = weight * (w[e] @ x[p] + bias[e])``, in pair order.

    With ``INTERLEAVED`` output columns alternate gate and up in ``w`` and are stored gate first.
    """
    stride = num_pairs + 1
    tile = tl.program_id(1)
    expert = tl.load(schedule + 2 * stride + tile)
    if expert >= 0:
        start = tl.load(schedule + 3 * stride + tile)
        count = tl.load(schedule + 4 * stride + tile)
        local = tl.arange(0, BLOCK_M)
        there = local < count
        pairs = tl.load(schedule + start + local, mask=there, other=0)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tl.arange(0, BLOCK_K)
        x_rows = x + (pairs // pairs_per_row).to(tl.int64)[:, None] * STRIDE_X
        w_rows = w + expert.to(tl.int64) * STRIDE_E + n.to(tl.int64)[:, None] * STRIDE_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, IN, BLOCK_K):
            k = first + columns
            inside = k < IN if IN % BLOCK_K != 0 else tl.full([BLOCK_K], True, tl.int1)
            left = tl.load(x_rows + k[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            right_mask = (n < OUT)[:, None] & inside[None, :]
            right = tl.load(w_rows + k.to(tl.int64)[None, :] * STRIDE_I, mask=right_mask, other=0.0)
            if x.dtype.element_ty == tl.float32:
                # a sum of its own for each block: one long chain of additions would lose a digit
                acc += tl.where(there[:, None], tl.dot(left, right.T, input_precision="ieee"), 0.0)
            else:
                acc = tl.dot(left, right.T, acc)
        if HAS_BIAS:
            acc += tl.load(bias + expert * OUT + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
        if HAS_WEIGHTS:
            acc *= tl.load(topk_weights + pairs, mask=there, other=0.0).to(tl.float32)[:, None]
        target_n = n // 2 + (n % 2) * (OUT // 2) if INTERLEAVED else n
        target = out + pairs.to(tl.int64)[:, None] * OUT + target_n[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=there[:, None] & (n < OUT)[None, :])


@triton.jit
def _erf_gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tanh_gelu(x):
    # 0.5 (1 + tanh(z)) = sigmoid(2 z)
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate_rows(
    gate_up,
    out,
    swiglu_alpha,
    swiglu_limit,
    SIZE: tl.constexpr,
    IS_GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (pairs, blocks of columns): ``act(gate) * up`` or ``act(x)``; rows of skipped pairs hold anything."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    source = gate_up + row * (2 * SIZE if IS_GATED else SIZE) + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "swigluoai":
        up = tl.load(source + SIZE, mask=mask, other=0.0).to(tl.float32)
        gate = tl.minimum(gate, swiglu_limit)
        up = tl.minimum(tl.maximum(up, -swiglu_limit), swiglu_limit)
        value = (up + 1) * gate * tl.sigmoid(swiglu_alpha * gate)
    else:
        if ACTIVATION == "silu":
            value = gate * tl.sigmoid(gate)
        elif ACTIVATION == "gelu":
            value = _erf_gelu(gate)
        elif ACTIVATION == "gelu_tanh":
            value = _tanh_gelu(gate)
        else:
            value = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0)
        if IS_GATED:
            value *= tl.load(source + SIZE, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["top_k", "num_experts"], do_not_specialize_on_alignment=["topk_ids"])
def sum_pairs(pairs, topk_ids, out, factor, top_k, num_experts, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tokens, blocks of columns): the sum over a token's known experts, in fp32, in order."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in range(top_k):
        pair = token * top_k + k
        known = known_experts(topk_ids, pair, True, num_experts) < num_experts
        row = pairs + pair.to(tl.int64) * SIZE + column
        acc += tl.load(row, mask=(column < SIZE) & known, other=0.0).to(tl.float32)
    target = out + token.to(tl.int64) * SIZE + column
    tl.store(target, (acc * factor).to(out.dtype.element_ty), mask=column < SIZE)
