// lora_shrink, lora_expand_add_ and lora_add_: LoRA of one projection, each group of pairs reading its matrix once.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "grouped.h"
#include "kernels.h"

namespace lora_moe {
namespace {

std::vector<int32_t> adapted_pairs(const Routing& routing) {
  auto pairs = routing.order();
  pairs.erase(
      std::remove_if(pairs.begin(), pairs.end(), [&](int32_t pair) { return routing.virtual_expert(pair) < 0; }),
      pairs.end());
  return pairs;
}

// The input rows of sorted pairs: hidden_states has a row for each token or for each pair.
std::vector<const float*> rows_of(const InputRows& x, int64_t count, const Routing& routing,
                                  const std::vector<int32_t>& pairs) {
  if (count != routing.num_tokens && count != routing.num_pairs) {
    fail("hidden_states", std::to_string(count) + " rows", "one for each token or one for each pair");
  }
  std::vector<const float*> rows;
  for (int32_t pair : pairs) rows.push_back(x[count == routing.num_pairs ? pair : pair / routing.top_k]);
  return rows;
}

void check_schedule(const Optional& schedule, const Routing& routing) {
  if (schedule) check_shape("schedule", *schedule, {kScheduleRows, routing.num_pairs + 1});
}

// output[t, k] += weight * delta for each pair.
void add_rows(Tensor& output, Rows& delta, const std::vector<int32_t>& pairs, const Routing& routing,
              const Optional& topk_weights) {
  const Floats out("output", output);
  std::optional<Floats> scales;
  if (topk_weights) {
    check_shape("topk_weights", *topk_weights, {routing.num_tokens, routing.top_k});
    check_contiguous("topk_weights", *topk_weights);
    scales.emplace("topk_weights", *topk_weights);
  }
  run_tasks(pairs.size(), pairs.size() * delta.size(), [&](int64_t row) {
    const int64_t pair = pairs[row], token = pair / routing.top_k, k = pair % routing.top_k;
    const int64_t base = token * out.strides[0] + k * out.strides[1];
    const float scale = scales ? load(scales->data, scales->type, pair) : 1.0f;
    const float* values = delta[row];
    for (int64_t n = 0; n < delta.size(); ++n) {
      const int64_t index = base + n * out.strides[2];
      store(out.data, out.type, index, load(out.data, out.type, index) + scale * values[n]);
    }
  });
}

void check_output(const Tensor& output, const Tensor& topk_ids) {
  check_shape("topk_ids", topk_ids, {-1, -1});
  check_shape("output", output, {topk_ids.size(0), topk_ids.size(1), -1});
}

}  // namespace

Tensor lora_shrink(Tensor hidden_states, Tensor lora_a, Tensor topk_ids, Tensor mapping, Optional enabled,
                   Optional schedule, int64_t num_experts, int64_t split_k) {
  if (split_k < 1) fail("split_k", std::to_string(split_k), "at least 1");
  const Stack a = lora_stack("lora_a", lora_a);
  const Routing routing(topk_ids, mapping, enabled, num_experts, lora_a.size(0));
  check_schedule(schedule, routing);
  check_shape("hidden_states", hidden_states, {-1, a.k});
  const int64_t experts = lora_a.size(1);
  if (experts != 1 && experts != num_experts) {
    fail("lora_a", std::to_string(experts) + " experts", std::to_string(num_experts) + " or 1");
  }

  Tensor planes = torch::stable::new_zeros(
      hidden_states, {split_k, routing.num_pairs, a.n}, torch::headeronly::ScalarType::Float);
  auto* out = static_cast<float*>(planes.data_ptr());
  const InputRows x("hidden_states", hidden_states);
  const auto pairs = adapted_pairs(routing);
  auto rows = rows_of(x, hidden_states.size(0), routing, pairs);
  const int64_t chunk = (a.k + split_k - 1) / split_k;
  for (int64_t plane = 0; plane * chunk < a.k; ++plane) {
    const int64_t begin = plane * chunk, count = std::min(chunk, a.k - begin);
    Rows s = shrink(a.columns(begin, count), experts == 1, routing, pairs, rows);
    for (size_t i = 0; i < pairs.size(); ++i) {
      std::copy_n(s[i], a.n, out + (plane * routing.num_pairs + pairs[i]) * a.n);
      rows[i] += count;
    }
  }
  return planes;
}

void lora_expand_add_(Tensor output, Tensor shrunk, Tensor lora_b, Tensor topk_ids, Tensor mapping, Optional enabled,
                      Optional schedule, Optional topk_weights, int64_t num_experts, int64_t num_slices) {
  check_output(output, topk_ids);
  const Stack b = lora_stack("lora_b", lora_b);
  const Routing routing(topk_ids, mapping, enabled, num_experts, lora_b.size(0));
  check_schedule(schedule, routing);
  check_shape("lora_b", lora_b, {-1, -1, output.size(2), -1});
  if (num_slices < 1 || b.n % num_slices) {
    fail("num_slices", std::to_string(num_slices), "a divisor of the output columns");
  }
  const int64_t experts = lora_b.size(1), size = num_slices * b.k;
  if (experts != 1 && experts != num_experts) {
    fail("lora_b", std::to_string(experts) + " experts", std::to_string(num_experts) + " or 1");
  }
  check_shape("shrunk", shrunk, {-1, routing.num_pairs, size});
  check_contiguous("shrunk", shrunk);
  if (float_type("shrunk", shrunk) != Float::f32) fail("shrunk", "another dtype", "fp32");

  const auto pairs = adapted_pairs(routing);
  const auto* planes = static_cast<const float*>(shrunk.data_ptr());
  Rows s(pairs.size(), size);
  for (size_t i = 0; i < pairs.size(); ++i) {
    for (int64_t plane = 0; plane < shrunk.size(0); ++plane) {
      const float* source = planes + (plane * routing.num_pairs + pairs[i]) * size;
      for (int64_t r = 0; r < size; ++r) s[i][r] += source[r];
    }
  }
  Rows delta = expand(b, experts == 1, num_slices, routing, pairs, s);
  add_rows(output, delta, pairs, routing, topk_weights);
}

void lora_add_(Tensor output, Tensor hidden_states, Tensor lora_a, Tensor lora_b, Tensor topk_ids, Tensor mapping,
               Optional enabled, Optional schedule, Optional topk_weights, int64_t num_slices) {
  check_output(output, topk_ids);
  check_shape("lora_a", lora_a, {-1, -1, -1, -1});
  check_shape("lora_b", lora_b, {-1, -1, -1, -1});
  check_shape("hidden_states", hidden_states, {-1, -1});
  const int64_t num_experts = std::max(lora_a.size(1), lora_b.size(1));
  const LoraPair lora = lora_pair("lora_a", lora_a, "lora_b", lora_b, hidden_states.size(1), output.size(2),
                                  num_slices, num_experts);
  const Routing routing(topk_ids, mapping, enabled, num_experts, lora_a.size(0));
  check_schedule(schedule, routing);
  const InputRows x("hidden_states", hidden_states);
  const auto pairs = adapted_pairs(routing);
  const auto rows = rows_of(x, hidden_states.size(0), routing, pairs);
  Rows s = shrink(lora.a, lora.shared_a, routing, pairs, rows);
  Rows delta = expand(lora.b, lora.shared_b, num_slices, routing, pairs, s);
  add_rows(output, delta, pairs, routing, topk_weights);
}

}  // namespace lora_moe
