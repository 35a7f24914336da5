// lora_moe::fused_experts: the whole layer on sorted rows, all intermediates in fp32.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "grouped.h"
#include "kernels.h"

namespace lora_moe {
namespace {

struct Activation {
  std::string name;
  bool is_gated;
  float alpha, limit;

  float unary(float x) const {
    if (name == "silu") return x / (1 + std::exp(-x));
    if (name == "gelu") return 0.5f * x * (1 + std::erf(x * 0.70710678118654752f));
    if (name == "gelu_tanh") return 0.5f * x * (1 + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    return x > 0 ? x * x : x != x ? x : 0;  // relu2
  }
  float gated(float gate, float up) const {
    if (name != "swigluoai") return unary(gate) * up;
    // NaN passes through a clamp
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return (up + 1) * gate / (1 + std::exp(-alpha * gate));
  }
};

Activation make_activation(std::string name, bool is_gated, bool interleaved, double alpha, double limit) {
  static const std::vector<std::string> known{"silu", "gelu", "gelu_tanh", "relu2", "swigluoai"};
  if (std::find(known.begin(), known.end(), name) == known.end()) {
    fail("activation", "'" + name + "'", "one of silu, gelu, gelu_tanh, relu2, swigluoai");
  }
  if (!is_gated && (name == "swigluoai" || interleaved)) fail("is_gated", "False", "True with this activation");
  return {std::move(name), is_gated, static_cast<float>(alpha), static_cast<float>(limit)};
}

void add_bias(const char* name, const Optional& bias, int64_t num_experts, Rows& rows, const std::vector<Group>& groups) {
  if (!bias) return;
  check_shape(name, *bias, {num_experts, rows.size()});
  check_contiguous(name, *bias);
  const Floats floats(name, *bias);
  std::vector<float> values(rows.size());
  for (const Group& group : groups) {
    to_float(floats.data, floats.type, group.weight * rows.size(), rows.size(), values.data());
    for (int64_t row = group.begin; row < group.end; ++row) {
      for (int64_t n = 0; n < rows.size(); ++n) rows[row][n] += values[n];
    }
  }
}

// Alternating gate and up become gate first, then up.
void deinterleave(Rows& rows, int64_t count) {
  const int64_t half = rows.size() / 2;
  std::vector<float> copy(rows.size());
  for (int64_t row = 0; row < count; ++row) {
    std::copy_n(rows[row], rows.size(), copy.data());
    for (int64_t i = 0; i < half; ++i) {
      rows[row][i] = copy[2 * i];
      rows[row][half + i] = copy[2 * i + 1];
    }
  }
}

// rows[i] += B * (A * x[i]) for the sorted pairs that have an adapter.
void add_lora(const std::optional<LoraPair>& lora, const Routing& routing, const std::vector<int32_t>& pairs,
              const std::vector<const float*>& x, Rows& rows) {
  if (!lora) return;
  std::vector<int32_t> adapted;
  std::vector<const float*> inputs;
  std::vector<float*> outputs;
  for (size_t i = 0; i < pairs.size(); ++i) {
    if (routing.virtual_expert(pairs[i]) < 0) continue;
    adapted.push_back(pairs[i]);
    inputs.push_back(x[i]);
    outputs.push_back(rows[i]);
  }
  Rows s = shrink(lora->a, lora->shared_a, routing, adapted, inputs);
  Rows delta = expand(lora->b, lora->shared_b, lora->num_slices, routing, adapted, s);
  for (size_t i = 0; i < adapted.size(); ++i) {
    for (int64_t n = 0; n < rows.size(); ++n) outputs[i][n] += delta[i][n];
  }
}

Rows activate(Rows& gate_up, int64_t count, const Activation& activation) {
  const int64_t inner = activation.is_gated ? gate_up.size() / 2 : gate_up.size();
  Rows h(count, inner);
  run_tasks(count, count * inner * 16, [&](int64_t row) {
    const float* in = gate_up[row];
    float* out = h[row];
    for (int64_t i = 0; i < inner; ++i) {
      out[i] = activation.is_gated ? activation.gated(in[i], in[inner + i]) : activation.unary(in[i]);
    }
  });
  return h;
}

std::optional<LoraPair> optional_pair(const char* name_a, const Optional& a, const char* name_b, const Optional& b,
                                      int64_t in_features, int64_t out_features, int64_t slices, int64_t experts) {
  if (!a && !b) return std::nullopt;
  if (!a) fail(name_a, "None", "a tensor, as its other half is given");
  if (!b) fail(name_b, "None", "a tensor, as its other half is given");
  return lora_pair(name_a, *a, name_b, *b, in_features, out_features, slices, experts);
}

// out[t] = factor * sum over k of topk_weights[t, k] * y of the pair, in the order of k.
void sum_experts(Tensor& out, const Tensor& topk_weights, const Routing& routing, const std::vector<int32_t>& pairs,
                 Rows& y, double factor) {
  check_shape("topk_weights", topk_weights, {routing.num_tokens, routing.top_k});
  check_contiguous("topk_weights", topk_weights);
  const Floats weights("topk_weights", topk_weights), target("out", out);
  std::vector<const float*> by_pair(routing.num_pairs, nullptr);
  for (size_t i = 0; i < pairs.size(); ++i) by_pair[pairs[i]] = y[i];
  run_tasks(routing.num_tokens, routing.num_pairs * y.size(), [&](int64_t token) {
    std::vector<float> sum(y.size());
    for (int64_t pair = token * routing.top_k; pair < (token + 1) * routing.top_k; ++pair) {
      if (!by_pair[pair]) continue;
      const float weight = load(weights.data, weights.type, pair);
      for (int64_t n = 0; n < y.size(); ++n) sum[n] += weight * by_pair[pair][n];
    }
    for (int64_t n = 0; n < y.size(); ++n) {
      store(target.data, target.type, token * y.size() + n, static_cast<float>(factor) * sum[n]);
    }
  });
}

}  // namespace

Tensor fused_experts(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids,
                     Optional schedule, Optional gate_up_a, Optional gate_up_b, Optional down_a, Optional down_b,
                     Optional token_lora_mapping, Optional adapter_enabled, Optional w13_bias, Optional w2_bias,
                     std::string activation_name, bool is_gated, bool interleaved, double routed_scaling_factor,
                     double swiglu_alpha, double swiglu_limit) {
  const Activation activation = make_activation(activation_name, is_gated, interleaved, swiglu_alpha, swiglu_limit);
  const Stack gate_up_stack = base_stack("w13", w13), down_stack = base_stack("w2", w2);
  const int64_t num_experts = w13.size(0), hidden = gate_up_stack.k, inner = down_stack.k, slices = is_gated ? 2 : 1;
  check_shape("w13", w13, {num_experts, slices * inner, hidden});
  check_shape("w2", w2, {num_experts, hidden, inner});
  check_shape("topk_ids", topk_ids, {-1, -1});
  check_shape("hidden_states", hidden_states, {topk_ids.size(0), hidden});
  const auto gate_up_lora = optional_pair(
      "gate_up_a", gate_up_a, "gate_up_b", gate_up_b, hidden, slices * inner, slices, num_experts);
  const auto down_lora = optional_pair("down_a", down_a, "down_b", down_b, inner, hidden, 1, num_experts);
  const int64_t max_loras = gate_up_a ? gate_up_a->size(0) : down_a ? down_a->size(0) : 0;
  if (down_a && down_a->size(0) != max_loras) fail("down_a", "other slots", "as many as gate_up_a");
  if (max_loras && !token_lora_mapping) fail("token_lora_mapping", "None", "a tensor, as lora is given");
  const Routing routing(topk_ids, token_lora_mapping, adapter_enabled, num_experts, max_loras);
  if (schedule) check_shape("schedule", *schedule, {kScheduleRows, routing.num_pairs + 1});

  const auto pairs = routing.order();
  const auto groups = groups_of(pairs, [&](int32_t pair) { return routing.experts[pair]; });
  const InputRows tokens("hidden_states", hidden_states);
  std::vector<const float*> x;
  for (int32_t pair : pairs) x.push_back(tokens[pair / routing.top_k]);

  Rows gate_up(pairs.size(), slices * inner);
  multiply_groups(gate_up_stack, groups, x, gate_up.pointers());
  add_bias("w13_bias", w13_bias, num_experts, gate_up, groups);
  if (interleaved) deinterleave(gate_up, pairs.size());
  add_lora(gate_up_lora, routing, pairs, x, gate_up);

  Rows h = activate(gate_up, pairs.size(), activation);
  const auto h_rows = h.pointers();
  const std::vector<const float*> h_inputs(h_rows.begin(), h_rows.end());
  Rows y(pairs.size(), hidden);
  multiply_groups(down_stack, groups, h_inputs, y.pointers());
  add_bias("w2_bias", w2_bias, num_experts, y, groups);
  add_lora(down_lora, routing, pairs, h_inputs, y);

  Tensor out = torch::stable::new_empty(hidden_states, {routing.num_tokens, hidden});
  sum_experts(out, topk_weights, routing, pairs, y, routed_scaling_factor);
  return out;
}

}  // namespace lora_moe
