// The CPU kernels of the ops, with the arguments of their schemas.
#pragma once

#include "arguments.h"

namespace lora_moe {

Tensor route(Tensor topk_ids, Optional token_lora_mapping, Optional adapter_enabled, int64_t num_experts,
             int64_t max_loras);

Tensor lora_shrink(Tensor hidden_states, Tensor lora_a, Tensor topk_ids, Tensor token_lora_mapping,
                   Optional adapter_enabled, Optional schedule, int64_t num_experts, int64_t split_k);

void lora_expand_add_(Tensor output, Tensor shrunk, Tensor lora_b, Tensor topk_ids, Tensor token_lora_mapping,
                      Optional adapter_enabled, Optional schedule, Optional topk_weights, int64_t num_experts,
                      int64_t num_slices);

void lora_add_(Tensor output, Tensor hidden_states, Tensor lora_a, Tensor lora_b, Tensor topk_ids,
               Tensor token_lora_mapping, Optional adapter_enabled, Optional schedule, Optional topk_weights,
               int64_t num_slices);

Tensor fused_experts(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids,
                     Optional schedule, Optional gate_up_a, Optional gate_up_b, Optional down_a, Optional down_b,
                     Optional token_lora_mapping, Optional adapter_enabled, Optional w13_bias, Optional w2_bias,
                     std::string activation, bool is_gated, bool interleaved, double routed_scaling_factor,
                     double swiglu_alpha, double swiglu_limit);

}  // namespace lora_moe
