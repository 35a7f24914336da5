// The schemas of every op, letter for letter those of torch_lora_moe/ops.py (a test compares them).
#pragma once

namespace lora_moe {

inline constexpr const char* kSchemas[] = {
    "route(Tensor topk_ids, Tensor? token_lora_mapping, Tensor? adapter_enabled, "
    "SymInt num_experts, SymInt max_loras) -> Tensor",

    "lora_shrink(Tensor hidden_states, Tensor lora_a, Tensor topk_ids, Tensor token_lora_mapping, "
    "Tensor? adapter_enabled, Tensor? schedule, SymInt num_experts, SymInt split_k=1) -> Tensor",

    "lora_expand_add_(Tensor(a!) output, Tensor shrunk, Tensor lora_b, Tensor topk_ids, "
    "Tensor token_lora_mapping, Tensor? adapter_enabled, Tensor? schedule, Tensor? topk_weights, "
    "SymInt num_experts, SymInt num_slices=1) -> ()",

    "lora_add_(Tensor(a!) output, Tensor hidden_states, Tensor lora_a, Tensor lora_b, Tensor topk_ids, "
    "Tensor token_lora_mapping, Tensor? adapter_enabled, Tensor? schedule, Tensor? topk_weights, "
    "SymInt num_slices=1) -> ()",

    "fused_experts(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? schedule=None, Tensor? gate_up_a=None, Tensor? gate_up_b=None, Tensor? down_a=None, "
    "Tensor? down_b=None, Tensor? token_lora_mapping=None, Tensor? adapter_enabled=None, "
    "Tensor? w13_bias=None, Tensor? w2_bias=None, str activation='silu', bool is_gated=True, "
    "bool interleaved=False, float routed_scaling_factor=1.0, float swiglu_alpha=1.702, "
    "float swiglu_limit=7.0) -> Tensor",
};

}  // namespace lora_moe
