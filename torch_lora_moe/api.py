"""The public functions: check the arguments, then call the ops of ``ops.py``.

Everything here traces under ``torch.compile(fullgraph=True)``; the routing cache is a dict and never reaches an op.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_lora_moe import checks, ops, routing
from torch_lora_moe.checks import FusedArguments
from torch_lora_moe.routing import RoutingCache


class MoELoRA(NamedTuple):
    """The adapter weights of one MoE layer, all slots stacked.

    Attributes:
        gate_up_a: ``[L, E or 1, G * R, H]``: the gate's ``R`` rows, then the up projection's; ``G`` is 2 when gated
            else 1. An expert dimension of 1 shares one matrix among all experts; it is never expanded in memory.
        gate_up_b: ``[L, E, G * I, R]``: gate rows use the gate's half of the rank vector, up rows the other half.
            Always gate rows first, also where the base weight is interleaved.
        down_a: ``[L, E, R, I]``.
        down_b: ``[L, E or 1, H, R]``.
        adapter_enabled: ``[L]`` bool or int32, optional; a disabled slot acts as "no adapter".

    Either pair may be None. The scaling is folded into B; ranks below ``R`` are zero-padded. All contiguous, in the
    dtype of the hidden states.
    """

    gate_up_a: Tensor | None
    gate_up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None
    adapter_enabled: Tensor | None = None


def fused_experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    lora: MoELoRA | None = None,
    token_lora_mapping: Tensor | None = None,
    *,
    activation: str = "silu",
    is_gated: bool = True,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    interleaved: bool = False,
    routed_scaling_factor: float = 1.0,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    routing_cache: RoutingCache | None = None,
) -> Tensor:
    """The whole MoE layer, each token with its own LoRA adapter.

    ``M`` tokens, ``K`` experts a token, ``E`` experts, ``H`` hidden size, ``I`` intermediate size, ``G`` 2 when gated.

    Args:
        hidden_states: ``[M, H]`` fp32, bf16 or fp16.
        w13: ``[E, G * I, H]`` gate and up projections, gate rows first; a transposed view of ``[E, H, G * I]`` is fine.
        w2: ``[E, H, I]`` down projection, likewise.
        topk_weights: ``[M, K]`` router weights, any float dtype.
        topk_ids: ``[M, K]`` int32 or int64 expert ids. An id outside ``[0, E)`` marks a pair that is skipped: nothing
            of it is read.
        lora: adapter weights, or None for the plain layer.
        token_lora_mapping: ``[M]`` int32 or int64 adapter slot of each token; outside ``[0, L)`` means no adapter.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu2`` or ``swigluoai`` (gpt-oss's clamped SwiGLU).
        is_gated: ``act(gate) * up`` rather than ``act(x)``.
        w13_bias, w2_bias: ``[E, G * I]`` and ``[E, H]``, optional.
        interleaved: rows of ``w13`` and ``w13_bias`` alternate gate, up, gate, up, ….
        routed_scaling_factor: multiplies the sum over experts.
        swiglu_alpha, swiglu_limit: the constants of ``swigluoai``.
        routing_cache: a dict that the caller owns for this one layer call; the schedule is kept in it.

    Returns:
        ``[M, H]``, a new tensor of the dtype of ``hidden_states``; accumulated in fp32 and rounded once.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what came and what was expected.
    """
    gate_up_a, gate_up_b, down_a, down_b, adapter_enabled = lora if lora is not None else (None,) * 5
    call = FusedArguments(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        None,
        gate_up_a,
        gate_up_b,
        down_a,
        down_b,
        token_lora_mapping,
        adapter_enabled,
        w13_bias,
        w2_bias,
        activation,
        is_gated,
        interleaved,
        routed_scaling_factor,
        swiglu_alpha,
        swiglu_limit,
    )
    if routing_cache is not None and _needs_schedule(call):
        if "schedule" not in routing_cache:
            checks.check_fused(call)
        max_loras = call.max_loras
        enabled = adapter_enabled if max_loras else None
        schedule = routing.cached_schedule(
            routing_cache, ops.route, topk_ids, token_lora_mapping, enabled, w13.shape[0], max_loras
        )
        call = call._replace(schedule=schedule)
    out: Tensor = ops.fused_experts(*call)
    return out


def _needs_schedule(call: FusedArguments) -> bool:
    try:
        sizes = (call.topk_ids.shape[0], call.topk_ids.shape[1], call.w13.shape[0], call.expert_bytes)
        return routing.layer_needs_schedule(*sizes, call.hidden_states.device.type)
    except (AttributeError, IndexError):
        # not the tensors that they should be: the check says which
        checks.check_fused(call)
        raise


def virtual_experts_lora_add(
    output: Tensor,
    hidden_states: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    token_lora_mapping: Tensor,
    *,
    mul_routed_weight: bool = False,
    adapter_enabled: Tensor | None = None,
    num_slices: int = 1,
    routing_cache: RoutingCache | None = None,
) -> None:
    """Adds the LoRA delta of one projection to the output of any base layer, in place.

    Args:
        output: ``[M, K, N]``, any strides: ``output[t, k] += B[l, e] @ (A[l, e] @ x)``. Pairs that LoRA skips (no
            adapter, a disabled one, an expert id outside ``[0, E)``) are neither read nor written.
        hidden_states: ``[M, in]``, shared by the pairs of a token, or ``[M * K, in]``, one row a pair.
        lora_a: ``[L, E or 1, num_slices * R, in]``.
        lora_b: ``[L, E or 1, N, R]``.
        topk_ids: ``[M, K]`` int32 or int64 expert ids.
        topk_weights: ``[M, K]``, read only with ``mul_routed_weight`` (else it may be None).
        token_lora_mapping: ``[M]`` int32 or int64 adapter slot of each token; outside ``[0, L)`` means no adapter.
        mul_routed_weight: multiply the delta by the pair's router weight.
        adapter_enabled: ``[L]`` bool or int32, optional.
        num_slices: 2 pairs the halves of A's rows with the halves of the output (gate and up).
        routing_cache: a dict that the caller owns for one layer call; gate_up and down share the schedule through it.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what came and what was expected.
    """
    weights = topk_weights if mul_routed_weight else None
    tokens = (topk_ids, token_lora_mapping, adapter_enabled)
    try:
        num_experts, max_loras = max(lora_a.shape[1], lora_b.shape[1]), lora_a.shape[0]
        sorts = routing.lora_needs_schedule(topk_ids.numel(), num_experts * max_loras, output.device.type)
    except (AttributeError, IndexError):
        # not the tensors that they should be: the check says which
        checks.check_lora_add(output, hidden_states, lora_a, lora_b, *tokens, None, weights, num_slices)
        raise
    if mul_routed_weight and weights is None:
        checks.check_lora_add(output, hidden_states, lora_a, lora_b, *tokens, None, weights, num_slices)
        raise TypeError("topk_weights: got NoneType, expected a tensor (mul_routed_weight is set)")
    schedule = None
    if sorts:
        if routing_cache is None or "schedule" not in routing_cache:
            checks.check_lora_add(output, hidden_states, lora_a, lora_b, *tokens, None, weights, num_slices)
        schedule = routing.cached_schedule(routing_cache, ops.route, *tokens, num_experts, max_loras)
    ops.lora_add_(output, hidden_states, lora_a, lora_b, *tokens, schedule, weights, num_slices)


def token_lora_mapping_from_segments(seg_indptr: Tensor, req_to_lora: Tensor, num_tokens: int) -> Tensor:
    """Per-token adapter slots from per-request segments, on the device and without a sync.

    Args:
        seg_indptr: ``[requests + 1]`` int32 or int64, ascending: request ``i`` owns tokens
            ``seg_indptr[i] <= t < seg_indptr[i + 1]``; empty requests are fine.
        req_to_lora: ``[requests]`` int32 or int64 adapter slot of each request.
        num_tokens: length of the result, padding included.

    Returns:
        ``[num_tokens]`` int32; -1 for tokens of no request.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, or a negative ``num_tokens``.
    """
    checks.check_segments(seg_indptr, req_to_lora, num_tokens)
    tokens = torch.arange(num_tokens, device=seg_indptr.device, dtype=seg_indptr.dtype)
    # index 0: before the first request; index requests + 1: behind the last
    request = torch.searchsorted(seg_indptr, tokens, right=True)
    return F.pad(req_to_lora.to(torch.int32), (1, 1), value=-1)[request]
