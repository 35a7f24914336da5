"""The whole layer on a GPU pair by pair, for one token or so few that a sort would cost more than it spares.

Three launches, two without LoRA on gate_up: the rank vectors beside the first part of gate_up's sums, the rest of it
with LoRA B and the activation (``kernels.matvec_gate_up``), and down, which makes its own rank vectors and sums over
experts (``kernels.matvec_down``). ``vectors`` says how the products are cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_lora_moe.checks import NUM_TENSORS, FusedArguments
from torch_lora_moe.config import power_of_two
from torch_lora_moe.kernels import matvec_down, matvec_gate_up
from torch_lora_moe.plans import Plan, overlaps
from torch_lora_moe.steps import Run, Steps
from torch_lora_moe.vectors import GateUpPrograms, down_programs, down_vector_config, gate_up_programs


def weight_strides(w: Tensor) -> dict[str, Any]:
    """Strides of a base weight, as kernels name them."""
    return dict(zip(("STRIDE_E", "STRIDE_N", "STRIDE_I"), w.stride(), strict=True))


class LayerSteps(Steps):
    """The call of the op."""

    def __call__(self, call: FusedArguments) -> Tensor:  # type: ignore[override]
        """The layer."""
        out = self.make(call[:NUM_TENSORS], call)  # type: ignore[arg-type]
        assert out is not None
        return out


class TokenPlan(LayerSteps):
    """The launches of a layer pair by pair: nothing is sorted."""

    def __init__(self, call: FusedArguments) -> None:
        x, w13, w2, (num_tokens, top_k) = call.hidden_states, call.w13, call.w2, call.topk_ids.shape
        self.num_pairs, self.top_k, self.num_experts = num_tokens * top_k, top_k, w13.shape[0]
        self.max_loras, self.inner, self.pdl = call.max_loras, w2.shape[2], overlaps(x.device)
        self.has_enabled = self.max_loras > 0 and call.adapter_enabled is not None
        self.gate_up_rank = 0 if call.gate_up_b is None else call.gate_up_b.shape[3]
        self.down_rank = rank = 0 if call.down_b is None else call.down_b.shape[3]
        # entries for down's rank vectors, and behind them for the count of the programs that have made theirs
        self.rank_vectors = -(-self.num_pairs * rank // 8) * 8 + 8 if rank else 0
        sizes = (self.num_pairs, self.inner, w13.shape[2], self.gate_up_rank, call.num_slices)
        how = gate_up_programs(*sizes, w13.stride(2) == 1, w13.element_size())
        # columns whose sums the first launch makes
        self.first = how.first
        self.sums = self._sums(call, how) if self.gate_up_rank else None
        self.gate_up, self.down = self._gate_up(call, how), self._down(call)

    def _gate_up_constants(self, call: FusedArguments) -> dict[str, Any]:
        """What both launches of gate_up say about their input."""
        return {
            "STRIDE_X": call.hidden_states.stride(0),
            **weight_strides(call.w13),
            "IN": call.w13.shape[2],
            "SLICE": self.inner,
            "IS_GATED": call.is_gated,
            "INTERLEAVED": call.interleaved,
        }

    def _sums(self, call: FusedArguments, how: GateUpPrograms) -> Plan:
        config, rank = how.sums, self.gate_up_rank
        constants = {
            **self._gate_up_constants(call),
            "HAS_ENABLED": self.has_enabled,
            "RANK": rank,
            "SHARED": call.gate_up_a is not None and call.gate_up_a.shape[1] < self.num_experts,
            "BLOCK_R": how.shrink.block_n,
            "BLOCK_I": how.shrink.block_k,
            "UNROLL_I": how.shrink.unroll,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "UNROLL": config.unroll,
            "PDL": self.pdl,
        }
        grid = (self.num_pairs, -(-rank // how.shrink.block_n) + -(-how.first // config.block_n), 1)
        return Plan(matvec_gate_up.gate_up_sums, grid, constants, (config.num_warps, 1), self.pdl, aligned=5)

    def _gate_up(self, call: FusedArguments, how: GateUpPrograms) -> Plan:
        config, rank = how.rest, self.gate_up_rank
        constants = {
            **self._gate_up_constants(call),
            "ACTIVATION": call.activation,
            "HAS_BIAS": call.w13_bias is not None,
            "HAS_ENABLED": self.has_enabled,
            "RANK": rank,
            "RANK_POW2": power_of_two(max(rank, 1)),
            "SHARED": call.gate_up_b is not None and call.gate_up_b.shape[1] < self.num_experts,
            "BLOCK_F": how.finish_rows,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "UNROLL": config.unroll,
            "NEXT_RANK": self.down_rank,
            "PDL": self.pdl,
        }
        blocks = -(-self.first // how.finish_rows) + -(-(self.inner - self.first) // config.block_n)
        options = (config.num_warps, 1)
        return Plan(matvec_gate_up.gate_up_pairs, (self.num_pairs, blocks, 1), constants, options, self.pdl, aligned=8)

    def _down(self, call: FusedArguments) -> Plan:
        w, rank = call.w2, self.down_rank
        num_tokens, hidden = call.hidden_states.shape
        tokens = (self.top_k, self.num_pairs)
        config = down_vector_config(num_tokens * hidden, w.shape[2], rank, w.stride(2) == 1, *tokens)
        programs = num_tokens * -(-hidden // config.block_n)
        sizes = (self.num_pairs, w.shape[2], rank, w.element_size(), self.top_k)
        how = down_programs(config, programs, *sizes)
        programs += self.num_pairs * -(-rank // how.shrink_rows)
        constants = {
            **weight_strides(w),
            "IN": w.shape[2],
            "OUT": w.shape[1],
            "TOP_K": self.top_k,
            "K_POW2": power_of_two(self.top_k),
            "HAS_BIAS": call.w2_bias is not None,
            "HAS_ENABLED": self.has_enabled,
            "RANK": rank,
            "RANK_POW2": power_of_two(max(rank, 1)),
            "SHARED": call.down_b is not None and call.down_b.shape[1] < self.num_experts,
            "SHARED_A": call.down_a is not None and call.down_a.shape[1] < self.num_experts,
            "BLOCK_R": how.shrink_rows,
            "BLOCK_I": how.shrink_columns,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "UNROLL": config.unroll,
            "PRELOAD": how.preloaded,
            "PDL": self.pdl,
        }
        grid, registers = (programs, 1, 1), how.registers if self.pdl else None
        options = (config.num_warps, 1)
        return Plan(matvec_down.down_tokens, grid, constants, options, self.pdl, aligned=7, registers=registers)

    def run(self, run: Run, call: FusedArguments) -> None:
        """Makes the launches of the layer."""
        x, ids, w13, w2 = call.hidden_states, call.topk_ids, call.w13, call.w2
        mapping = ids if call.token_lora_mapping is None else call.token_lora_mapping
        enabled = ids if call.adapter_enabled is None else call.adapter_enabled
        h, out = run.new(x, (self.num_pairs, self.inner)), run.new_result(x, x.shape)
        down_shrunk = run.new(x, (self.rank_vectors,)) if self.down_rank else h
        slots = (self.top_k, self.num_experts, self.max_loras)
        sums, shrunk, b = h, h, w13
        if self.sums is not None and call.gate_up_a is not None and call.gate_up_b is not None:
            sums = run.new(x, (self.num_pairs, call.num_slices * max(1, self.first)), torch.float32)
            shrunk, b = run.new(x, (self.num_pairs, call.num_slices * self.gate_up_rank)), call.gate_up_b
            run(self.sums, (x, w13, call.gate_up_a, sums, shrunk, ids, mapping, enabled), *slots, self.first)
        bias = w13 if call.w13_bias is None else call.w13_bias
        inputs = (x, w13, bias, h, sums, shrunk, b, down_shrunk, ids, mapping, enabled)
        run(self.gate_up, inputs, self.num_pairs, *slots, self.first, call.swiglu_alpha, call.swiglu_limit)
        bias = w2 if call.w2_bias is None else call.w2_bias
        a, b = (w2, w2) if call.down_a is None or call.down_b is None else (call.down_a, call.down_b)
        inputs = (h, w2, bias, out, down_shrunk, b, a, ids, mapping, enabled, call.topk_weights)
        run(self.down, inputs, self.num_pairs, self.num_experts, self.max_loras, call.routed_scaling_factor)
