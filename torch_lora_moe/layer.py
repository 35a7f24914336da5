"""The whole layer on a GPU, from the stages: route, grouped GEMMs, LoRA between them, activation, sum over experts."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_lora_moe import checks, routing
from torch_lora_moe.checks import FusedArguments, like
from torch_lora_moe.config import power_of_two
from torch_lora_moe.kernels import experts as kernels
from torch_lora_moe.launch import Plan, lora_add_, on_device, remember, route

_PLANS: dict[object, LayerPlan] = {}


class LayerPlan:
    """The launches of the base layer for one set of shapes."""

    def __init__(self, call: FusedArguments) -> None:
        (self.num_tokens, self.top_k), self.num_experts = call.topk_ids.shape, call.w13.shape[0]
        self.num_pairs = num_pairs = self.num_tokens * self.top_k
        self.max_loras = call.max_loras
        inner, hidden = call.w2.shape[2], call.w2.shape[1]
        x_stride = call.hidden_states.stride(0)
        self.gate_up = self._gemm(call.w13, x_stride, call.w13_bias, call.interleaved, False)
        self.down = self._gemm(call.w2, inner, call.w2_bias, False, True)
        block = min(1024, max(16, power_of_two(inner)))
        act = {"SIZE": inner, "IS_GATED": call.is_gated, "ACTIVATION": call.activation, "BLOCK": block}
        self.act = Plan(kernels.activate_rows, (num_pairs, -(-inner // block), 1), act, aligned=2)
        block = min(1024, max(16, power_of_two(hidden)))
        grid = (self.num_tokens, -(-hidden // block), 1)
        self.sum = Plan(kernels.sum_pairs, grid, {"SIZE": hidden, "BLOCK": block}, aligned=3)

    def _gemm(self, w: Tensor, x_stride: int, bias: Tensor | None, interleaved: bool, weighted: bool) -> Plan:
        _, out_features, in_features = w.shape
        rows = routing.expert_tile_rows(self.num_pairs, self.num_experts)
        block_n = min(128 if rows >= 64 else 64, max(16, power_of_two(out_features)))
        block_k = min(64, max(16, power_of_two(in_features)))
        constants = {
            "STRIDE_X": x_stride,
            **dict(zip(("STRIDE_E", "STRIDE_N", "STRIDE_I"), w.stride(), strict=True)),
            "IN": in_features,
            "OUT": out_features,
            "INTERLEAVED": interleaved,
            "HAS_BIAS": bias is not None,
            "HAS_WEIGHTS": weighted,
            "BLOCK_M": rows,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        }
        tiles = min(self.num_pairs, self.num_pairs // rows + self.num_experts)
        wide = w.element_size() == 4
        grid = (-(-out_features // block_n), tiles, 1)
        return Plan(kernels.expert_gemm, grid, constants, (4, 2 if wide else 4), aligned=6)

    def __call__(self, call: FusedArguments) -> Tensor:
        """Runs the layer."""
        x, ids = call.hidden_states, call.topk_ids
        if self.num_pairs == 0:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        schedule = call.schedule
        if schedule is None:
            enabled = call.adapter_enabled if self.max_loras else None
            schedule = route(ids, call.token_lora_mapping, enabled, self.num_experts, self.max_loras)
        gate_up = x.new_empty(self.num_pairs, call.w13.shape[1])
        self._run_gemm(self.gate_up, x, call.w13, call.w13_bias, gate_up, schedule, call.topk_weights, self.top_k)
        self._add_lora(call, x, gate_up, call.gate_up_a, call.gate_up_b, schedule, call.num_slices)
        h = x.new_empty(self.num_pairs, call.w2.shape[2])
        self.act((gate_up, h), call.swiglu_alpha, call.swiglu_limit)
        y = x.new_empty(self.num_pairs, call.w2.shape[1])
        self._run_gemm(self.down, h, call.w2, call.w2_bias, y, schedule, call.topk_weights, 1)
        self._add_lora(call, h, y, call.down_a, call.down_b, schedule, 1)
        out = x.new_empty(x.shape)
        sizes = (call.routed_scaling_factor, self.top_k, self.num_experts)
        self.sum((y, ids, out), *sizes)
        return out

    def _run_gemm(
        self,
        plan: Plan,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        out: Tensor,
        schedule: Tensor,
        weights: Tensor,
        pairs_per_row: int,
    ) -> None:
        plan((x, w, w if bias is None else bias, out, schedule, weights), self.num_pairs, pairs_per_row)

    def _add_lora(
        self,
        call: FusedArguments,
        x: Tensor,
        rows: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        schedule: Tensor,
        slices: int,
    ) -> None:
        if a is None or b is None or call.token_lora_mapping is None:
            return
        weights = call.topk_weights if a is call.down_a else None
        tokens = (call.topk_ids, call.token_lora_mapping, call.adapter_enabled, schedule)
        lora_add_(rows.view(self.num_tokens, self.top_k, -1), x, a, b, *tokens, weights, slices)


@on_device
def fused_experts(*args: object, **kwargs: object) -> Tensor:
    """The whole layer with LoRA on both projections."""
    call = FusedArguments(*args, **kwargs)  # type: ignore[arg-type]
    key = tuple(like(value) if isinstance(value, Tensor) else value for value in call)
    plan = _PLANS.get(key)
    if plan is None:
        checks.check_fused(call)
        plan = LayerPlan(call)
        remember(_PLANS, key, plan)
    return plan(call)
